"""Settings of the distillation of features. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from objectives.parts.frozen_use import FrozenTeacherConfig, TeacherUse
from objectives.parts.settings import CROP_SCALE, TEACHER_MOMENTUM, AugmentationConfig

__all__ = ["FeatureDistillationConfig"]

_WEIGHT = {"range": (0.0, 1000.0)}
_WIDTH = {"range": (1, 65536)}


@dataclass
class FeatureDistillationConfig(FrozenTeacherConfig, AugmentationConfig):
    """A student's tokens predict those of a frozen teacher; the loss is that of AM-RADIO (arXiv:2312.06709)."""

    teacher_settings: ClassVar[str] = "objective.name=distillation"
    name: str = "distillation"
    teacher_dim: int = field(default=768, metadata=_WIDTH | {"help": "width of the teacher's tokens"})
    head_hidden_dim: int = field(default=1024, metadata=_WIDTH | {"help": "width of the layer that predicts them"})
    image_weight: float = field(default=1.0, metadata=_WEIGHT | {"help": "of the token of the whole image"})
    patch_weight: float = field(default=1.0, metadata=_WEIGHT | {"help": "of the patches"})
    length_share: float = field(
        default=0.1,
        metadata={"range": (0.0, 1.0), "help": "of smooth L1 in the error of patches; the rest is of their directions"},
    )
    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0], metadata=CROP_SCALE)
    teacher_momentum: float = field(
        default=0.996, metadata=TEACHER_MOMENTUM | {"help": "of the moving average that is exported; then to 1"}
    )

    def teacher_use(self) -> TeacherUse:
        """Nothing is learned without one."""
        return TeacherUse("name", self.name, "a teacher")
