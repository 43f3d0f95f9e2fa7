"""Settings of the masked autoencoder of volumes. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import FLIP, TURN, VOLUME_ARRAY, VOLUME_FIELD

__all__ = ["VolumeMAEConfig"]


@dataclass
class VolumeMAEConfig:
    """Masked autoencoder of volumes: MAE (He et al. 2021, arXiv:2111.06377) with cubes of voxels for patches."""

    name: str = "volume_mae"
    mask_ratio: float = field(
        default=0.75, metadata={"range": (0.01, 0.99), "help": "share of the cubes hidden from the encoder"}
    )
    norm_pix_loss: bool = field(
        default=True, metadata={"help": "predict voxels normalised by their own cube's mean and deviation"}
    )
    decoder_dim: int = field(
        default=192, metadata={"range": (6, 4096), "help": "decoder width, an even number of at least 6"}
    )
    decoder_depth: int = field(default=4, metadata={"range": (1, 64), "help": "decoder blocks"})
    decoder_heads: int = field(default=6, metadata={"range": (1, 64), "help": "decoder attention heads"})
    flip: list[float] = field(default_factory=lambda: [0.0, 0.0, 0.0], metadata=FLIP)
    turn: float = field(default=0.0, metadata=TURN)
    volume_field: str | None = field(default=None, metadata=VOLUME_FIELD)
    volume_array: str | None = field(default=None, metadata=VOLUME_ARRAY)
