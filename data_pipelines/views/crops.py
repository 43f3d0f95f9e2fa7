"""Rectangles of a picture, and their pixels at another size.

Random resized crop as in Szegedy et al. 2015 and torchvision: area and log aspect ratio uniform, 10 attempts, then a
centre crop. How a rectangle is resized depends on what the picture holds:

* photos: bicubic with antialiasing, by `pil` or by `torch`. PIL does crop and resize in one pass, in which the filter
  sees the pixels beside the crop; torch crops first and is three times as fast on 8-bit pixels. Both work in integers
  and give the same on every CPU. They differ from each other by up to 2 of 255 levels, and by more in the outermost
  pixels, so a run has to stay with one.
* arrays of any number of channels: as photos by `torch`; 16-bit values are rounded and clipped, floats stay floats.
* values such as class ids and depth: the nearest pixel, nothing mixed, any type.

Not here: decoding (`decode`), which crops are wanted (`kinds.images`).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from data_pipelines.decode import Photo
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom

__all__ = [
    "ArrayPicture",
    "Box",
    "Crop",
    "ImageLike",
    "PhotoPicture",
    "Picture",
    "ValuePicture",
    "draw_box",
    "draw_overlapping_box",
    "eval_view",
    "photo_crop",
    "rgb_image",
]

ImageLike = npt.NDArray[np.uint8] | Image.Image
Array = npt.NDArray[Any]

_CROP_ATTEMPTS = 10
_OVERLAP_ATTEMPTS = 10
_FACTORS = (1, 2, 4, 8)  # by which a photo can be decoded smaller
_MOST_CHANNELS_AT_ONCE = 4  # torch has a fast path for 8-bit images of up to 4 channels


class Box(NamedTuple):
    """A rectangle in pixels; whole numbers in the picture it was drawn for."""

    left: float
    top: float
    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height

    def shared_area(self, other: Box) -> float:
        """Area of the intersection."""
        width = min(self.left + self.width, other.left + other.width) - max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - max(self.top, other.top)
        return max(0, width) * max(0, height)

    def scaled(self, across: float, down: float) -> Box:
        """The same rectangle in a picture resized by these factors."""
        return Box(self.left * across, self.top * down, self.width * across, self.height * down)


class Crop(NamedTuple):
    """What one crop shows: a rectangle of a picture of (width, height) pixels, mirrored or not."""

    box: Box
    is_flipped: bool
    frame: tuple[int, int]

    def box_in(self, width: int, height: int) -> Box:
        """The rectangle in another picture of the same frame, such as a mask or a reduced photo.

        Raises:
            DataError: the other picture has another aspect, so it shows something else.
        """
        if (width, height) == self.frame:
            return self.box
        own_width, own_height = self.frame
        if abs(width * own_height - own_width * height) > max(width + height, own_width + own_height):  # 1 px each
            raise DataError(
                f"{width} x {height} pixels do not show the same frame as the {own_width} x {own_height} "
                "that the crop was drawn for"
            )
        return self.box.scaled(width / own_width, height / own_height)

    def as_row(self) -> list[float]:
        """(left, top, width, height) as shares of the frame, and 1 when mirrored."""
        return [*self.box.scaled(1 / self.frame[0], 1 / self.frame[1]), float(self.is_flipped)]


def draw_box(width: int, height: int, scale: tuple[float, float], ratio: tuple[float, float], rng: ViewRandom) -> Box:
    """A random rectangle inside a picture of width x height pixels.

    Args:
        width: of the picture.
        height: of the picture.
        scale: least and greatest share of its area.
        ratio: least and greatest width / height of the rectangle.
        rng: advanced by the draws made.
    """
    log_low, log_high = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_ATTEMPTS):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(log_low, log_high))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return Box(rng.below(width - w + 1), rng.below(height - h + 1), w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])  # centre crop of the nearest allowed aspect
    w, h = max(1, min(width, round(height * aspect))), max(1, min(height, round(width / aspect)))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def draw_overlapping_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: ViewRandom,
    *,
    other: Box,
    share: float,
) -> Box:
    """A random rectangle whose intersection with `other` covers at least `share` of the smaller of the two.

    Drawn again up to 10 times; then the last one is moved, and cut where it is larger, to lie inside `other`.
    """
    for _ in range(_OVERLAP_ATTEMPTS):
        box = draw_box(width, height, scale, ratio, rng)
        if box.shared_area(other) >= share * min(box.area, other.area):
            return box
    w, h = min(box.width, other.width), min(box.height, other.height)
    left = min(max(box.left, other.left), other.left + other.width - w)
    top = min(max(box.top, other.top), other.top + other.height - h)
    return Box(left, top, w, h)


class Picture(ABC):
    """A decoded, or soon decoded, field from which crops are cut.

    Attributes:
        width, height: the frame in which crops are drawn.
        num_channels: of a crop.
        dtype: of a crop.
    """

    width: int
    height: int
    num_channels: int
    dtype: np.dtype[Any]

    def announce(self, crops: Sequence[Crop], size: int) -> None:
        """Be told of crops and their size in pixels, before any is cut, so that no more is decoded than they need.

        Raises:
            DataError: they were drawn for what has another aspect.
        """
        return None

    @abstractmethod
    def cut(self, crop: Crop, out: Array) -> None:
        """Write the pixels of a crop into `out` (num_channels, size, size)."""


class PhotoPicture(Picture):
    """An RGB photo; bicubic by PIL or torch (see above).

    Args:
        scaled: decode it at the smallest size at which none of the announced crops has to be enlarged.
    """

    num_channels, dtype = 3, np.dtype(np.uint8)

    def __init__(self, photo: Photo, resampler: str, *, scaled: bool = False) -> None:
        self.width, self.height = photo.width, photo.height
        self._photo, self._resampler, self._scaled = photo, resampler, scaled
        self._room = math.inf  # how many times larger than needed the crop is that is enlarged first

    def announce(self, crops: Sequence[Crop], size: int) -> None:
        if self._scaled:
            self._room = min(self._room, *(min(crop.box_in(self.width, self.height)[2:]) / size for crop in crops))
            self._photo.reduce(max(factor for factor in _FACTORS if factor <= max(1, self._room)))

    def cut(self, crop: Crop, out: Array) -> None:
        if self._resampler == "pil":
            image = self._photo.image
            out[...] = photo_crop(image, crop.box_in(*image.size), out.shape[-1], crop.is_flipped)
        else:
            pixels = self._photo.pixels  # (H, W, 3)
            values = torch.from_numpy(pixels).permute(2, 0, 1)
            _cut_bicubic(values, crop.box_in(pixels.shape[1], pixels.shape[0]), crop.is_flipped, out)


class ArrayPicture(Picture):
    """(C, H, W) numbers of any number of channels; bicubic by torch. Integers of 8 and 16 bits keep their type."""

    def __init__(self, values: Array) -> None:
        if values.dtype.kind not in "uif" or (values.dtype.kind != "f" and values.dtype.itemsize > 2):
            raise DataError(
                f"array of type {values.dtype} cannot be resized smoothly; it is 8 or 16 bit integers or floats, "
                "or the view says resize: nearest"
            )
        self.num_channels, self.height, self.width = values.shape
        self.dtype = np.dtype(np.float32) if values.dtype.kind == "f" else values.dtype
        self._values = values

    def cut(self, crop: Crop, out: Array) -> None:
        box = _whole(crop.box_in(self.width, self.height), self.width, self.height)
        region = np.array(self._values[:, box[1] : box[3], box[0] : box[2]])
        if self.dtype != np.uint8:
            region = region.astype(np.float32)  # exact for 16 bits
        values = torch.from_numpy(region)
        whole = Box(0, 0, region.shape[2], region.shape[1])
        if self.dtype in (np.uint8, np.float32):
            _cut_bicubic(values, whole, crop.is_flipped, out)
            return
        limits = np.iinfo(self.dtype)
        smooth = np.empty(out.shape, np.float32)
        _cut_bicubic(values, whole, crop.is_flipped, smooth)
        out[...] = smooth.round().clip(limits.min, limits.max)


class ValuePicture(Picture):
    """(C, H, W) values that must not mix: class ids, depth. Each pixel of a crop is the one nearest to its centre."""

    def __init__(self, values: Array) -> None:
        self.num_channels, self.height, self.width = values.shape
        self.dtype = values.dtype
        self._values = values

    def cut(self, crop: Crop, out: Array) -> None:
        box = crop.box_in(self.width, self.height)
        centres = (np.arange(out.shape[-1]) + 0.5) / out.shape[-1]
        cols = np.clip((box.left + centres * box.width).astype(np.intp), 0, self.width - 1)
        rows = np.clip((box.top + centres * box.height).astype(np.intp), 0, self.height - 1)
        out[...] = self._values[:, rows][:, :, cols[::-1] if crop.is_flipped else cols]  # two steps: 7 times as fast


def photo_crop(image: Image.Image, box: Box, size: int, is_flipped: bool) -> npt.NDArray[np.uint8]:
    """(3, size, size) uint8 of a rectangle of an RGB image, a transposed view; bicubic by PIL."""
    edges = (box.left, box.top, box.left + box.width, box.top + box.height)
    pixels = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC, box=edges))  # (size, size, 3)
    return (pixels[:, ::-1] if is_flipped else pixels).transpose(2, 0, 1)


def _cut_bicubic(values: Tensor, box: Box, is_flipped: bool, out: Array) -> None:
    """Rectangle of (C, H, W) to `out` (C, size, size), both uint8 or both float32; by torch, antialiased."""
    left, top, right, bottom = _whole(box, values.shape[2], values.shape[1])
    region, size = values[:, top:bottom, left:right], out.shape[-1]
    for first in range(0, len(out), _MOST_CHANNELS_AT_ONCE):
        part = region[first : first + _MOST_CHANNELS_AT_ONCE]
        if part.shape[1:] != (size, size):
            part = F.interpolate(part[None], (size, size), mode="bicubic", antialias=True)[0]
        target = torch.from_numpy(out[first : first + _MOST_CHANNELS_AT_ONCE])
        target.copy_(part.flip(2) if is_flipped else part)


def _whole(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """Edges (left, top, right, bottom) in whole pixels, at least one pixel each way, inside the picture."""
    left, top = min(round(box.left), width - 1), min(round(box.top), height - 1)
    right, bottom = round(box.left + box.width), round(box.top + box.height)
    return left, top, min(max(right, left + 1), width), min(max(bottom, top + 1), height)


def eval_view(image: ImageLike, size: int) -> Tensor:
    """Resize the shorter side and cut the centre, as ImageNet evaluation does.

    The shorter side becomes `size * 256 / 224`; when `size < 64` it becomes `size`, since there is no border to spare.

    Args:
        image: (H, W, 3) uint8 array or an RGB PIL image.
        size: side of the result in pixels.

    Returns:
        (3, size, size) uint8.
    """
    photo = rgb_image(image)
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


def rgb_image(image: ImageLike) -> Image.Image:
    """The PIL image of an array, or the image as it is.

    Raises:
        DataError: the array is not (H, W, 3) uint8.
    """
    if isinstance(image, Image.Image):
        return image
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise DataError(f"image of shape {image.shape} and type {image.dtype} is not (H, W, 3) uint8")
    return Image.fromarray(image)
