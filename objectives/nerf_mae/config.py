"""Settings of the masked autoencoder of radiance grids. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import FLIP, TURN, VOLUME_ARRAY, VOLUME_FIELD

__all__ = ["NeRFMAEConfig"]


@dataclass
class NeRFMAEConfig:
    """NeRF-MAE (Irshad et al. 2024, arXiv:2404.01300); defaults are the paper's pretraining at 160^3 voxels."""

    name: str = "nerf_mae"
    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.01, 0.99), "help": "probability that a block is covered"}
    )
    # Of the paper's 40^3 tokens; grids of 64 voxels and less want 1 or 2, or most of an object is covered at once.
    mask_block: int = field(
        default=4, metadata={"range": (1, 256), "help": "tokens of the first stage along the edge of a block"}
    )
    mask_per: str = field(
        default="sample",
        metadata={
            "choices": ("sample", "batch"),
            "help": "each grid has blocks of its own; or all of a micro-batch the same (the paper), so that the loss "
            "depends on how samples are spread over workers",
        },
    )
    reduction: str = field(
        default="voxel",
        metadata={
            "choices": ("voxel", "sample"),
            "help": "what counts alike: each voxel of a micro-batch on all workers (the paper), or each grid, which is "
            "exact under accumulation too",
        },
    )
    occupied_alpha: float = field(
        default=0.01, metadata={"range": (0.0, 1.0), "help": "colors count where alpha is above this"}
    )
    rgb_weight: float = field(default=1.0, metadata={"range": (0.0, 1e6), "help": "weight of the loss of colors"})
    alpha_weight: float = field(default=1.0, metadata={"range": (0.0, 1e6), "help": "weight of the loss of alpha"})
    flip: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.0], metadata=FLIP)
    turn: float = field(default=0.5, metadata=TURN)
    volume_field: str | None = field(default=None, metadata=VOLUME_FIELD)
    volume_array: str | None = field(default=None, metadata=VOLUME_ARRAY)
