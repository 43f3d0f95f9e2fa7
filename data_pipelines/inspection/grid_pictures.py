"""Pictures of a radiance grid: seen from one side as a photo would show it, and cut through the middle.

For people: rays are parallel and take the nearest voxel. Transparent parts are white.

Legend: (4, X, Y, Z) red, green, blue and alpha in [0, 1], z up; P pixels of a picture.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["as_unit", "looks_like_grid", "middle_slices", "seen_from_a_corner"]

_AZIMUTH, _ELEVATION = math.radians(-60), math.radians(25)  # of the eye, from +x
_ALPHA_STEP_VOX = 1.6  # voxels that the alpha of a grid is for

Grid = npt.NDArray[np.float32]
Pixels = npt.NDArray[np.uint8]  # (H, W, 3)


def looks_like_grid(array: npt.NDArray[Any]) -> bool:
    """Whether an array has the shape and the type of values of a grid."""
    return array.ndim == 4 and len(array) == 4 and (array.dtype == np.uint8 or array.dtype.kind == "f")


def as_unit(array: npt.NDArray[Any]) -> Grid:
    """Values in [0, 1] of bytes or floats."""
    values = array.astype(np.float32)
    return values / np.float32(255) if array.dtype == np.uint8 else values.clip(0, 1)


def seen_from_a_corner(grid: Grid, size: int) -> Pixels:
    """(size, size, 3) the whole grid from above and the side, composited front to back."""
    sides = np.array(grid.shape[1:])
    toward_eye = np.array(
        [math.cos(_AZIMUTH) * math.cos(_ELEVATION), math.sin(_AZIMUTH) * math.cos(_ELEVATION), math.sin(_ELEVATION)]
    )
    right = np.array([-math.sin(_AZIMUTH), math.cos(_AZIMUTH), 0.0])
    up = np.cross(toward_eye, right)
    radius = float(np.linalg.norm(sides)) / 2  # voxels; a ball of it holds the grid
    across = ((np.arange(size) + 0.5) / size * 2 - 1) * radius
    plane = across[None, :, None] * right - across[:, None, None] * up  # (size, size, 3)
    starts = plane.reshape(-1, 3) + (sides - 1) / 2 + radius * toward_eye  # (P, 3)
    color, light = np.zeros((len(starts), 3), np.float32), np.ones(len(starts), np.float32)
    for step in range(math.ceil(2 * radius) + 1):  # one voxel each
        nodes = np.rint(starts - step * toward_eye).astype(int)
        hit = np.flatnonzero(((nodes >= 0) & (nodes < sides)).all(axis=1))
        values = grid[:, nodes[hit, 0], nodes[hit, 1], nodes[hit, 2]]  # (4, n)
        alpha = 1 - (1 - values[3]) ** (1 / _ALPHA_STEP_VOX)
        color[hit] += (light[hit] * alpha)[:, None] * values[:3].T
        light[hit] *= 1 - alpha
    return _bytes(color + light[:, None]).reshape(size, size, 3)


def middle_slices(grid: Grid) -> list[Pixels]:
    """The middle planes: level (x right, y up), and upright (x right, z up)."""
    level, upright = grid[:, :, :, grid.shape[3] // 2], grid[:, :, grid.shape[2] // 2]
    return [_bytes((part[:3] * part[3] + 1 - part[3]).transpose(2, 1, 0)[::-1]) for part in (level, upright)]


def _bytes(values: npt.NDArray[Any]) -> Pixels:
    return (values.clip(0, 1) * 255).round().astype(np.uint8)
