"""Pictures of a user as one batch of pixels: PIL images, arrays and tensors, whichever axis their channels lie on.

What is of another type, range or number of channels than a backbone takes is refused rather than guessed at: its
features would be finite, plausible and wrong. NOT here: normalization (`backbones.images.base`); resizing, which is the
caller's choice.

Legend: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from backbones.errors import BackboneError

__all__ = ["as_batch", "require_unit_range"]

OVERSHOOT = 1 / 8  # bicubic resizing of floats leaves [0, 1] by up to this much at sharp edges
_TAKEN = "PIL images, uint8 in 0..255 or floating point in [0, 1]"


def as_batch(images: Any, in_chans: int, device: torch.device) -> Tensor:
    """One picture or several of one size as a tensor (B, C, H, W), uint8 or floating point.

    Args:
        images: A tensor, an array, a PIL image or a sequence of these. Tensors and arrays have 3 axes, or 4 with B in
            front; their channels come first or last. Where both could be meant, a tensor has them first and an array
            last. PIL images are turned as their EXIF says, and transparent parts are seen on white.
        in_chans: C.
        device: For what is no tensor; a tensor stays where it is.

    Raises:
        BackboneError: Of another type or shape; says which.
    """
    if isinstance(images, Sequence) and not isinstance(images, str | bytes):
        return _stacked([as_batch(image, in_chans, device) for image in images])
    channels_last = not isinstance(images, Tensor)
    if isinstance(images, Image.Image):
        images = _of_pil(images, in_chans)
    if isinstance(images, np.ndarray):
        _require_type(images.dtype.name, images.dtype == np.uint8 or images.dtype.kind == "f")
        images = torch.from_numpy(np.ascontiguousarray(images)).to(device)
    if not isinstance(images, Tensor):
        raise BackboneError(f"images of type {type(images).__name__} are not taken; give {_TAKEN} (tensor or array)")
    _require_type(str(images.dtype).removeprefix("torch."), images.dtype == torch.uint8 or images.is_floating_point())
    return _channels_first(images, in_chans, channels_last)


def require_unit_range(images: Tensor) -> None:
    """Refuse floats that are no shares of full brightness.

    Raises:
        BackboneError: Says the range that was found.
    """
    if images.numel() == 0:
        return
    low, high = (float(end) for end in torch.aminmax(images.detach()))
    if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):  # also where there is NaN
        remedy = "divide by 255, or give uint8" if low >= 0 and high > 2 else "do not normalize them before"
        remedy = "they hold NaN" if low != low or high != high else remedy
        raise BackboneError(f"floating-point images from {low:g} to {high:g}: expected values in [0, 1]; {remedy}")


def _of_pil(image: Image.Image, in_chans: int) -> np.ndarray[Any, Any]:
    """(H, W, C) uint8."""
    if image.mode.startswith(("I", "F")) or in_chans not in (1, 3):
        raise BackboneError(
            f"a PIL image of mode {image.mode} is not taken for {in_chans} channels; give an array with {in_chans}, "
            "uint8 in 0..255 or floating point in [0, 1]"
        )
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if in_chans == 1 and image.mode not in ("1", "L"):
        raise BackboneError(f"a PIL image of mode {image.mode} has colors, and the backbone takes 1 channel: mode L")
    pixels = np.array(image.convert("RGB" if in_chans == 3 else "L"))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _require_type(name: str, is_taken: bool) -> None:
    if not is_taken:
        raise BackboneError(f"images of type {name} are not taken; give {_TAKEN}")


def _channels_first(images: Tensor, in_chans: int, channels_last: bool) -> Tensor:
    if images.ndim == 2 and in_chans == 1:
        return images[None, None]
    if images.ndim in (3, 4):
        batch = images if images.ndim == 4 else images[None]
        is_first, is_last = batch.shape[1] == in_chans, batch.shape[3] == in_chans
        if is_last and (channels_last or not is_first):
            return batch.permute(0, 3, 1, 2)
        if is_first:
            return batch
    raise BackboneError(
        f"images of shape {tuple(images.shape)} are not taken; give {in_chans} channels, first or last: "
        f"(B, {in_chans}, H, W), ({in_chans}, H, W), (B, H, W, {in_chans}) or (H, W, {in_chans})"
    )


def _stacked(batches: Sequence[Tensor]) -> Tensor:
    if not batches:
        raise BackboneError("no images were given")
    kinds = {(tuple(batch.shape[2:]), str(batch.dtype).removeprefix("torch.")) for batch in batches}
    if len(kinds) > 1:
        found = ", ".join(f"{height} x {width} {dtype}" for (height, width), dtype in sorted(kinds)[:3])
        raise BackboneError(f"the images differ in size or type ({found}); bring them to one size first")
    return torch.cat(list(batches))
