"""Settings of SiT. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.parts.settings import CROP_SCALE, FILL, FILLED_SHARE, TEACHER_MOMENTUM, CorruptionConfig

__all__ = ["SiTConfig"]


@dataclass
class SiTConfig(CorruptionConfig):
    """Masked reconstruction and momentum contrast (Atito et al., arXiv:2104.03602); defaults are the authors' code."""

    name: str = "sit"
    share: float = field(default=0.5, metadata=FILLED_SHARE)
    fill: str = field(default="zeros", metadata=FILL)
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=CROP_SCALE)
    # The authors take 5 for small data sets.
    reconstruction_weight: float = field(
        default=1.0, metadata={"range": (0.0, 1000.0), "help": "weight of the reconstruction; the contrast has 1"}
    )
    temperature: float = field(
        default=0.2, metadata={"range": (0.01, 10.0), "help": "softmax temperature of the contrast"}
    )
    projector_hidden_dim: int = field(
        default=4096, metadata={"range": (1, 65536), "help": "width of the projector's layers"}
    )
    projector_dim: int = field(
        default=256, metadata={"range": (1, 65536), "help": "width in which images are compared"}
    )
    teacher_momentum: float = field(default=0.996, metadata=TEACHER_MOMENTUM)
