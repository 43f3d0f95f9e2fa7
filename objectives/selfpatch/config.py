"""Settings of SelfPatch. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from objectives.dino.config import DINOConfig
from objectives.parts.settings import FREEZE, GLOBAL_SCALE, LOCAL_SCALE

__all__ = ["SelfPatchConfig"]


@dataclass
class SelfPatchConfig(DINOConfig):
    """DINO with a loss on patches (Yun et al. 2022, arXiv:2206.07990); defaults are the authors' ViT-S/16 setting."""

    name: str = "selfpatch"
    # One epoch of the paper's 200.
    freeze_prototypes: float = field(default=0.005, metadata=FREEZE)
    global_scale: list[float] = field(default_factory=lambda: [0.25, 1.0], metadata=GLOBAL_SCALE)
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.25], metadata=LOCAL_SCALE)
    num_patch_prototypes: int = field(
        default=4096, metadata={"range": (2, 2**20), "help": "outputs of the head for patches"}
    )
    patch_loss_weight: float = field(
        default=0.1, metadata={"range": (0.0, 1000.0), "help": "weight of the loss on patches; that on images has 1"}
    )
    num_positives: int = field(
        default=4, metadata={"range": (1, 8), "help": "most similar neighbours that a patch learns from"}
    )
    borders: str = field(
        default="wrap",
        metadata={
            "choices": ("wrap", "clip"),
            "help": "neighbours beyond a border: those at the opposite one, as the authors' code has it, or none",
        },
    )
    aggregation_depth: int = field(
        default=2, metadata={"range": (1, 12), "help": "class-attention blocks that sum a set of patches up"}
    )
    aggregation_heads: int | None = field(
        default=None,
        metadata={"range": (1, 64), "help": "their attention heads; null: one per 64 channels, as in a ViT"},
    )
