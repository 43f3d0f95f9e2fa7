"""Sizes of an image encoder: does the model exist, and do images and crops consist of whole patches? Imports no torch.

Of encoders of another kind their own constructor knows what is right.
"""

from __future__ import annotations

import re
from typing import Any

from backbones.images.config import ImageConfig
from backbones.images.timm_names import model_names
from objectives.parts.settings import MultiCropConfig
from pretrain.config.mistakes import Mistakes
from pretrain.errors import nearest

__all__ = ["check_crops", "check_divisible", "check_image_encoder", "sizes"]

_MODEL_SIZES = re.compile(r"_patch(\d+)(?:_[a-z]\w*?)?_(\d+)(?:_|\.|$)")


def check_image_encoder(backbone: ImageConfig, mistakes: Mistakes) -> None:
    if not mistakes.sound("backbone.name"):
        return
    known = model_names()
    plain_name = backbone.name.partition(".")[0]
    if plain_name not in known:
        problem = f"unknown model; it is none of the {len(known)} registered names{nearest(plain_name, known)}"
        mistakes.add("backbone.name", backbone.name, problem)
        return
    image_size, patch_size = sizes(backbone)
    if mistakes.sound("backbone.image_size", "backbone.patch_size") and image_size and patch_size:
        check_divisible("backbone.image_size", image_size, patch_size, mistakes)
    channels = backbone.in_chans
    for key, numbers in (("backbone.pixel_mean", backbone.pixel_mean), ("backbone.pixel_std", backbone.pixel_std)):
        if mistakes.sound(key) and len(numbers) != channels:
            problem = f"{key} has {len(numbers)} numbers, expected one for each of {channels} channels"
            blamed = mistakes.latest(key, "backbone.in_chans")
            mistakes.add(blamed, channels if blamed.endswith("in_chans") else numbers, problem)


def check_crops(objective: Any, backbone: ImageConfig, mistakes: Mistakes) -> None:
    """Sides in pixels that an objective gives crops have to be whole patches."""
    patch_size = sizes(backbone)[1]
    if not isinstance(objective, MultiCropConfig) or patch_size is None or not mistakes.sound("backbone"):
        return
    if objective.num_local and objective.local_size and mistakes.sound("objective.local_size", "objective.num_local"):
        check_divisible("objective.local_size", objective.local_size, patch_size, mistakes)


def sizes(backbone: ImageConfig) -> tuple[int | None, int | None]:
    """Image and patch size in pixels, read from the model's name where the recipe leaves them open."""
    match = _MODEL_SIZES.search(backbone.name)
    patch_size, image_size = (int(match.group(1)), int(match.group(2))) if match else (None, None)
    return backbone.image_size or image_size, backbone.patch_size or patch_size


def check_divisible(key: str, image_size: int, patch_size: int, mistakes: Mistakes) -> None:
    if image_size % patch_size:
        below = image_size - image_size % patch_size
        sizes = [size for size in (below, below + patch_size) if size]
        problem = f"not a multiple of the patch size {patch_size}; nearest: {' or '.join(map(str, sizes))}"
        mistakes.add(key, image_size, problem)
