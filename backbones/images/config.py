"""Settings of image encoders, as a recipe gives them below `backbone:`, and ImageNet's normalization. Imports no torch.

Field metadata: "help" says what it does, "range" = (lowest, highest) allowed, both ends included. NOT here: what the
settings mean together (`backbones.images.build` and, before a run starts, `pretrain.config.checks.model`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "INITIALIZATIONS", "ImageConfig"]

INITIALIZATIONS = ("timm", "mae")
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class ImageConfig:
    """Which image encoder to pretrain."""

    name: str = field(default="???", metadata={"help": "timm model name, e.g. vit_base_patch16_224"})  # mandatory
    image_size: int | None = field(
        default=None, metadata={"range": (1, 8192), "help": "side of the input in pixels; null: as the name says"}
    )
    patch_size: int | None = field(
        default=None, metadata={"range": (1, 1024), "help": "side of a patch in pixels; null: as the name says"}
    )
    in_chans: int = field(default=3, metadata={"range": (1, 1024), "help": "channels of the input"})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "further timm arguments, e.g. {depth: 6}"})
    pixel_mean: list[float] = field(
        default_factory=lambda: list(IMAGENET_MEAN),
        metadata={"help": "mean per channel of images in [0, 1]; default: ImageNet"},
    )
    pixel_std: list[float] = field(
        default_factory=lambda: list(IMAGENET_STD),
        metadata={"range": (1e-6, None), "help": "deviation per channel of images in [0, 1]; default: ImageNet"},
    )
    init: str = field(
        default="timm",
        metadata={
            "choices": INITIALIZATIONS,
            "help": "initial weights: timm's, or MAE's (Xavier, sin-cos positions), from which runs of minutes gain; "
            "the objective mae always takes its own, dinov3 in the place of timm's",
        },
    )
    kind: str = field(default="image", metadata={"help": "what it encodes: image, or a kind that a plug-in adds"})
