"""Small RGB pictures of whatever a field holds: photos, masks, depth, arrays, point clouds, volumes, radiance grids.

Masks, and labels beside a volume, get one fixed colour per class, so the same class looks the same in every sheet.
Values without a natural scale are stretched from their 2nd to their 98th percentile. Pictures are for people: nothing
here is exact.

Legend: C channels, N points.
"""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from data_pipelines.field_kinds import ARRAY_KINDS, LABEL_ARRAYS, has_channels
from data_pipelines.fields import decode_field
from data_pipelines.inspection.grid_pictures import as_unit, looks_like_grid, middle_slices, seen_from_a_corner

__all__ = ["PICTURED", "class_colors", "thumbnail"]

PICTURED = ("image", "mask", "depth", *ARRAY_KINDS)  # kinds that may have a picture
_EMPTY = (32, 32, 32)
_MIN_SIDE = 8  # smaller arrays are numbers (a pose, a label), not pictures
_AZIMUTH, _ELEVATION = np.deg2rad(30), np.deg2rad(20)  # from where point clouds are seen

Pixels = npt.NDArray[np.uint8]  # (H, W, 3)


def thumbnail(
    kind: str, data: bytes, size: int, ignore_index: int | None = None, *, is_grid: bool = False
) -> Image.Image | None:
    """A picture of one field, `size` pixels high (volumes: three middle slices side by side, then those of labels).

    Args:
        kind: one of `PICTURED`.
        data: bytes of the field.
        size: of the square that the picture fits into; a volume fits into three of them, its labels into three more.
        ignore_index: value of masks that is drawn black.
        is_grid: a volume holds colors and alpha: it is seen from a corner, and cut level and upright.

    Returns:
        RGB picture; None when the values are no picture, such as a vector.

    Raises:
        DataError: the bytes do not decode.
    """
    value = decode_field(kind, data)
    planes = _grid_planes(value, size) if is_grid else []
    planes = planes or _planes(kind, value, size, ignore_index)
    if not planes:
        return None
    pictures = [_fit(plane, size) for plane in planes]
    whole = sum(picture.width for picture in pictures), max(picture.height for picture in pictures)
    joined, left = Image.new("RGB", whole, _EMPTY), 0
    for picture in pictures:
        joined.paste(picture, (left, 0))
        left += picture.width
    return joined


def _planes(kind: str, value: Any, size: int, ignore_index: int | None) -> list[Pixels]:
    """What to draw side by side."""
    if kind == "image":
        return [value]
    if kind == "mask":
        return _coloured(value, ignore_index)
    if kind == "depth":
        return [_stretched(np.where(plane > 0, plane, np.nan)) for plane in _maps(value)]
    labels = [value[name] for name in LABEL_ARRAYS if name in value and value[name].dtype.kind in "biu"]
    arrays = [array for name, array in value.items() if array.dtype.kind in "biuf" and array.size]
    arrays = [array for array in arrays if not any(array is one for one in labels)]
    if kind == "points":
        clouds = [array for array in arrays if array.ndim == 2 and array.shape[1] >= 3]
        return [_scatter(cloud[:, :3].astype(np.float64), size) for cloud in clouds[:1]]
    drawable = [array for array in arrays if array.ndim >= 2 and min(array.shape[-2:]) >= _MIN_SIDE]
    planes = _array_planes(kind, drawable[0]) if drawable else []
    return planes + [plane for array in labels[:1] if array.size for plane in _coloured(array, ignore_index)]


def _coloured(labels: npt.NDArray[Any], ignore_index: int | None) -> list[Pixels]:
    palette = class_colors(ignore_index)
    return [palette[plane.astype(np.int64) % len(palette)] for plane in _maps(labels)]


def _grid_planes(value: Any, size: int) -> list[Pixels]:
    grids = [as_unit(array) for array in value.values() if looks_like_grid(array)]
    return [seen_from_a_corner(grids[0], size), *middle_slices(grids[0])] if grids else []


def _array_planes(kind: str, array: npt.NDArray[Any]) -> list[Pixels]:
    if has_channels(kind, array.shape):
        return [_colours(array)]
    if array.ndim == 4:  # (C, X, Y, Z)
        return [_colours(plane) for plane in _middle(array)]
    return [_stretched(plane) for plane in _maps(array)]


def _maps(array: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """A map as it is, a volume as its middle slices, anything else not at all."""
    if array.ndim == 2:
        return [array]
    return _middle(array) if array.ndim == 3 else []


def _middle(volume: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
    """The middle plane across each of the last three axes."""
    return [np.take(volume, volume.shape[axis] // 2, axis=axis) for axis in (-3, -2, -1)]


def _colours(array: npt.NDArray[Any]) -> Pixels:
    """(C, H, W) -> the first three channels, each stretched; grey when there are fewer."""
    if len(array) < 3:
        return _stretched(array[0])
    return np.dstack([_stretched(channel)[..., 0] for channel in array[:3]])


def _stretched(values: npt.NDArray[Any]) -> Pixels:
    """(H, W) of any numbers -> grey; NaN and infinity are black."""
    values = values.astype(np.float64)
    is_finite = np.isfinite(values)
    if not is_finite.any():
        return np.zeros((*values.shape, 3), np.uint8)
    low, high = np.percentile(values[is_finite], (2, 98))
    grey = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * 255
    return np.repeat(np.where(is_finite, grey, 0).astype(np.uint8)[..., None], 3, axis=2)


def class_colors(ignore_index: int | None = None) -> Pixels:
    """(256, 3): hues a golden angle apart, so that neighbouring classes differ; light and dark in turn."""
    golden = 0.381966
    colours = [colorsys.hsv_to_rgb(n * golden % 1, 0.75, 0.95 if n % 2 == 0 else 0.65) for n in range(256)]
    palette = (np.array(colours) * 255).astype(np.uint8)
    if ignore_index is not None:
        palette[ignore_index % 256] = 0
    return palette


def _scatter(points: npt.NDArray[np.float64], size: int) -> Pixels:
    """(N, 3) seen from a fixed direction; near points are brighter and hide far ones."""
    points = points[np.isfinite(points).all(axis=1)]
    canvas = np.full((size, size, 3), 16, np.uint8)
    if len(points) == 0:
        return canvas
    points = points / max(float(np.abs(points).max()), 1e-12)  # the largest numbers have no difference and no length
    points = points - (points.min(axis=0) + points.max(axis=0)) / 2
    points = points / max(float(np.linalg.norm(points, axis=1).max()), 1e-12)
    x, y, z = points.T
    right, ahead = x * np.cos(_AZIMUTH) + z * np.sin(_AZIMUTH), z * np.cos(_AZIMUTH) - x * np.sin(_AZIMUTH)
    up, near = y * np.cos(_ELEVATION) - ahead * np.sin(_ELEVATION), ahead * np.cos(_ELEVATION) + y * np.sin(_ELEVATION)
    order = np.argsort(near)
    column, row = ((np.stack([right, -up]) * 0.48 + 0.5) * (size - 1)).round().astype(int)[:, order]
    shade = (near[order] + 1) / 2
    canvas[row, column] = np.stack([80 + 150 * shade, 110 + 130 * shade, 140 + 115 * shade], axis=1).astype(np.uint8)
    return canvas


def _fit(pixels: Pixels, size: int) -> Image.Image:
    """`size` pixels high or wide, whichever is reached first; enlarged without smoothing."""
    height, width = pixels.shape[:2]
    scale = size / max(height, width)
    target = max(1, round(width * scale)), max(1, round(height * scale))
    return Image.fromarray(pixels).resize(target, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
