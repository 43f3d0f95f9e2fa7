"""Images that a person can look at: crops with what a backbone makes of them, and reconstructions.

Not here: features and attention as pictures (`backbones.images.pictures`).

Legend: n pictures, N patches, H attention heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.images.base import ImageEncoder
from backbones.images.pictures import attention_maps, principal_colors, similarity_maps
from objectives.parts.block_corruption import Corruption
from objectives.parts.multicrop import crops_of

__all__ = [
    "MAX_PICTURES",
    "as_pixels",
    "crops_and_features",
    "evaluating",
    "reconstructions",
    "to_rgb",
]

MAX_PICTURES = 8


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within: stochastic depth would draw from the global generator and change the next steps."""
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


def reconstructions(
    backbone: ImageEncoder, target: Tensor, corruption: Corruption, prediction: Tensor
) -> dict[str, Tensor]:
    """What an image was, what the encoder saw of it, and what was predicted.

    Returns:
        "clean", "corrupted" and "reconstruction" (masked pixels predicted, others kept), (n, 3, S, S) in [0, 1].
    """
    filled = torch.where(corruption.is_masked, prediction.to(target.dtype), target)
    shown = {"clean": target, "corrupted": corruption.apply(target), "reconstruction": filled}
    return {caption: as_pixels(backbone, images) for caption, images in shown.items()}


@torch.no_grad()
def crops_and_features(backbone: ImageEncoder, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Crops, and what a teacher's backbone makes of the first global one; all at the size of that.

    Args:
        backbone: float32, without stochastic depth.
        batch: as for `objectives.parts.multicrop.crops_of`.

    Returns:
        "global 1", "global 2", "local", "features", "similarity" and, where the backbone has a class token,
        "attention".
    """
    num = min(MAX_PICTURES, len(batch["global_1"]))
    shown = {name: batch[f"global_{name[-1]}"][:num] for name in ("global 1", "global 2")}
    shown["local"] = crops_of(batch)[-1][:num]
    if "local" not in batch:
        del shown["local"]
    x = backbone.normalized(shown["global 1"])  # (n, C, H, W)
    attention, size = backbone.attention(x), x.shape[-2:]  # (n, H, N) or None
    features = backbone.features(x)
    pictures = {name: _resized(to_rgb(images), size) for name, images in shown.items()}
    pictures["features"] = _resized(principal_colors(features.patches, features.grid), size)
    pictures["similarity"] = _resized(similarity_maps(features.patches, features.grid), size)
    if attention is not None:
        pictures["attention"] = _resized(attention_maps(attention, features.grid), size)
    return pictures


def to_rgb(images: Tensor) -> Tensor:
    """Images (n, C, H, W) to (n, 3, H, W), float in [0, 1]: the first three channels, or the first repeated.

    Args:
        images: uint8 in 0 .. 255, or floating point in [0, 1].
    """
    pixels = images.float() / 255 if images.dtype == torch.uint8 else images
    return pixels[:, :3] if images.shape[1] >= 3 else pixels[:, :1].expand(-1, 3, -1, -1)


def as_pixels(backbone: ImageEncoder, x: Tensor) -> Tensor:
    """The inverse of `backbone.normalized`, for people: normalised (n, C, H, W) to (n, 3, H, W) in [0, 1]."""
    return to_rgb((x * backbone.pixel_std + backbone.pixel_mean).clamp(0, 1))


def _resized(images: Tensor, size: torch.Size) -> Tensor:
    """To the common size, each pixel a square."""
    return functional.interpolate(images.float(), size=tuple(size), mode="nearest")
