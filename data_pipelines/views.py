"""Samples to views: the random crops an objective asks for, and the one crop evaluation looks at.

A view is plain data, so an objective states its needs without importing this package. Only crop, resize and flip
happen here; per-pixel operations (normalise, colour, blur) are cheaper on a batch on the device. Output is uint8
(C, H, W).

Random resized crop as in Szegedy et al. 2015 and torchvision: area and log aspect ratio uniform, 10 attempts, then a
centre crop. Crop and resize are one PIL pass (bicubic, antialiased); at the border of the crop the filter sees the
pixels beside it.

All draws come from one `ViewRandom` keyed by (seed, epoch, sample id, view), so pixels do not depend on ranks or
workers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom

__all__ = ["View", "eval_view", "random_resized_crop", "views_from"]

RESERVED_NAMES = ("sample_id", "seed")  # other entries of a batch
_CROP_ATTEMPTS = 10

ImageLike = npt.NDArray[np.uint8] | Image.Image


@dataclass(frozen=True)
class View:
    """One kind of crop.

    Attributes:
        name: entry of the batch.
        size: side in pixels.
        count: crops of this kind per sample.
        scale: least and greatest share of the image area, in (0, 1].
        ratio: least and greatest width / height.
        hflip: probability of a horizontal flip.
    """

    name: str
    size: int
    count: int = 1
    scale: tuple[float, float] = (0.2, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: float = 0.5

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or self.name in RESERVED_NAMES:
            raise DataError(
                f"view name {self.name!r} is not allowed; give a name other than {', '.join(RESERVED_NAMES)}"
            )
        for field, value in (("size", self.size), ("count", self.count)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise DataError(f"view {self.name!r}: {field}={value!r} is not allowed; it is an integer from 1")
        for field, pair, high in (("scale", self.scale, 1.0), ("ratio", self.ratio, math.inf)):
            if not _is_pair(pair) or not 0 < pair[0] <= pair[1] <= high or math.isinf(pair[1]):
                limit = f"0 < low <= high{' <= 1' if high == 1.0 else ''}"
                raise DataError(f"view {self.name!r}: {field}={pair!r} is not allowed; it is [low, high] with {limit}")
        if not _is_number(self.hflip) or not 0 <= self.hflip <= 1:
            raise DataError(f"view {self.name!r}: hflip={self.hflip!r} is not allowed; it is a probability in 0..1")


def views_from(specs: Sequence[Mapping[str, Any]]) -> tuple[View, ...]:
    """Views from the plain data an objective states.

    Raises:
        DataError: a key is unknown or missing, a value out of range, a name used twice, or no view at all.
    """
    allowed = [field.name for field in fields(View)]
    views: list[View] = []
    for spec in specs:
        for name in spec:
            if name not in allowed:
                near = difflib.get_close_matches(str(name), allowed, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise DataError(f"view {dict(spec)!r}: unknown key {name!r}; allowed: {', '.join(allowed)}{hint}")
        for name in ("name", "size"):
            if name not in spec:
                raise DataError(f"view {dict(spec)!r}: {name!r} is missing")
        pairs = {name: tuple(spec[name]) for name in ("scale", "ratio") if isinstance(spec.get(name), list)}
        views.append(View(**{**spec, **pairs}))
    require_distinct(views)
    return tuple(views)


def require_distinct(views: Sequence[View]) -> None:
    """Refuse an empty list and a name used twice."""
    names = [view.name for view in views]
    if not names:
        raise DataError("no view is asked for; a stream needs at least one")
    for name in names:
        if names.count(name) > 1:
            raise DataError(f"view name {name!r} is used twice; names are the entries of a batch")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(_is_number(part) for part in value)


def random_resized_crop(image: ImageLike, view: View, rng: ViewRandom) -> torch.Tensor:
    """Cut a random rectangle, resize it to a square and maybe flip it.

    Args:
        image: (H, W, 3) uint8 array, or an RGB PIL image (which saves a copy).
        view: which rectangles; `count` is the caller's business.
        rng: advanced by the draws made.

    Returns:
        (3, size, size) uint8.
    """
    photo = _photo(image)
    left, top, width, height = _draw_box(photo.width, photo.height, view, rng)
    is_flipped = rng.uniform(0.0, 1.0) < view.hflip
    box = (left, top, left + width, top + height)
    crop = np.asarray(photo.resize((view.size, view.size), Image.Resampling.BICUBIC, box=box))  # (size, size, 3)
    if is_flipped:
        crop = crop[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(crop.transpose(2, 0, 1)))  # (3, size, size)


def _draw_box(width: int, height: int, view: View, rng: ViewRandom) -> tuple[int, int, int, int]:
    """(left, top, width, height) of a random rectangle inside the image."""
    log_low, log_high = math.log(view.ratio[0]), math.log(view.ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*view.scale)
        ratio = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.below(width - w + 1), rng.below(height - h + 1), w, h
    ratio = min(max(width / height, view.ratio[0]), view.ratio[1])  # centre crop of the nearest allowed aspect
    w, h = max(1, min(width, round(height * ratio))), max(1, min(height, round(width / ratio)))
    return (width - w) // 2, (height - h) // 2, w, h


def eval_view(image: ImageLike, size: int) -> torch.Tensor:
    """Resize the shorter side and cut the centre, as ImageNet evaluation does.

    The shorter side becomes `size * 256 / 224`; when `size < 64` it becomes `size`, since there is no border to spare.

    Args:
        image: (H, W, 3) uint8 array or an RGB PIL image.
        size: side of the result in pixels.

    Returns:
        (3, size, size) uint8.
    """
    photo = _photo(image)
    shorter = size if size < 64 else round(size * 256 / 224)
    if photo.width <= photo.height:
        resized = (shorter, max(shorter, shorter * photo.height // photo.width))
    else:
        resized = (max(shorter, shorter * photo.width // photo.height), shorter)
    if resized != photo.size:
        photo = photo.resize(resized, Image.Resampling.BICUBIC)
    left, top = round((resized[0] - size) / 2), round((resized[1] - size) / 2)
    pixels = np.asarray(photo)[top : top + size, left : left + size]  # (size, size, 3)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))  # (3, size, size)


def _photo(image: ImageLike) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"image of shape {image.shape} and type {image.dtype} is not (H, W, 3) uint8")
    return Image.fromarray(image)
