"""Images and features that a person can look at: reconstructions, patch tokens as colours, where the class token looks.

Attention of the class token shows objects in M. Caron et al., 2021, arXiv:2104.14294, figure 1; principal components
of patch tokens as red, green and blue are from M. Oquab et al. (DINOv2), 2023, arXiv:2304.07193, figure 1; the
similarity of one patch to all others, in which features that lose their locality become blotches, is from O. Simeoni
et al. (DINOv3), 2025, arXiv:2508.10104, section 4.

Legend: n pictures, N patches, D width, H attention heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.images.base import ImageEncoder
from objectives.parts.block_corruption import Corruption
from objectives.parts.multicrop import crops_of

__all__ = [
    "MAX_PICTURES",
    "as_pixels",
    "crops_and_features",
    "evaluating",
    "principal_colors",
    "reconstructions",
    "similarity_maps",
    "to_rgb",
]

MAX_PICTURES = 8
_CLIPPED = 0.02  # share of the patches at either end of a component that is shown as fully dark or bright
# From 0 to 1: violet, blue, green, yellow, as in matplotlib's viridis. Red is none of them.
_HEAT = (
    (0.267, 0.004, 0.329),
    (0.231, 0.322, 0.545),
    (0.129, 0.569, 0.549),
    (0.369, 0.788, 0.384),
    (0.992, 0.906, 0.145),
)
_MARK = (1.0, 0.0, 0.0)


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
        mean = attention.mean(1)  # (n, N)
        bright = mean / mean.amax(1, keepdim=True)
        pictures["attention"] = _resized(bright.unflatten(1, features.grid).unsqueeze(1).expand(-1, 3, -1, -1), size)
    return pictures


def principal_colors(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The first three principal components over all patches of all pictures, as red, green and blue.

    Args:
        patches: (n, N, D) with n N >= 3 and D >= 3.

    Returns:
        (n, 3, rows, columns) in [0, 1].
    """
    rows = patches.double().flatten(0, 1)  # (n N, D)
    rows = rows.where(rows.isfinite().all(), 0)  # of a run that has blown up: black, where `eigh` would raise
    rows = rows - rows.mean(0)
    axes = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -3:].flip(1)  # (D, 3), the strongest first
    largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))  # (1, 3)
    scores = rows @ (axes * largest.sign())  # (n N, 3); the sign makes the colours the same from run to run
    low, high = (scores.quantile(share, dim=0) for share in (_CLIPPED, 1 - _CLIPPED))
    colours = ((scores - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return colours.float().unflatten(0, (len(patches), *grid)).permute(0, 3, 1, 2)


def similarity_maps(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Cosine of the angle between the patch in the middle, which is marked in red, and each other one.

    The scale is the same for all pictures and steps: violet is 0 or less, yellow is 1.

    Args:
        patches: (n, N, D) with N = rows x columns.

    Returns:
        (n, 3, rows, columns) in [0, 1].
    """
    rows, columns = grid
    middle = rows // 2 * columns + columns // 2
    unit = functional.normalize(patches.float(), dim=-1)  # (n, N, D)
    cosine = (unit @ unit[:, middle, :, None])[..., 0]  # (n, N)
    # Not finite in a run that has blown up: as 0.
    place = cosine.nan_to_num(0.0, 0.0, 0.0).clamp(0, 1) * (len(_HEAT) - 1)  # along the colours
    below = place.floor().clamp_max(len(_HEAT) - 2)
    colours = torch.tensor(_HEAT, device=patches.device)
    maps = torch.lerp(colours[below.long()], colours[below.long() + 1], (place - below)[..., None])  # (n, N, 3)
    maps[:, middle] = torch.tensor(_MARK, device=patches.device)
    return maps.unflatten(1, grid).permute(0, 3, 1, 2)


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
