"""Settings of DINO. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import DistillationConfig, MultiCropConfig

__all__ = ["DINOConfig"]


@dataclass
class DINOConfig(DistillationConfig, MultiCropConfig):
    """Self-distillation (Caron et al. 2021, arXiv:2104.14294); defaults are the authors' ViT-S/16 run of 100 epochs."""

    name: str = "dino"
    num_prototypes: int = field(default=65536, metadata={"range": (2, 2**20), "help": "outputs of the head"})
    head_hidden_dim: int = field(default=2048, metadata={"range": (1, 65536), "help": "width of the head's layers"})
    head_bottleneck_dim: int = field(default=256, metadata={"range": (1, 65536), "help": "width before the prototypes"})
    center_momentum: float = field(
        default=0.9, metadata={"range": (0.0, 1.0), "help": "share of the teacher's center that is kept per step"}
    )
