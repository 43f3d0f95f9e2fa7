"""A fitted field as the arrays of a sample: colors and opacity, whole or cut into many smaller ones.

A grid is (4, X, Y, Z): red, green and blue in [0, 1] and alpha, x right, y ahead, z up. Alpha is that of a length of
1.6 voxels, which is the length of NeRF-MAE's grids (0.01 of a box of 160 voxels, Irshad et al. 2024); `alpha_step_vox`
of the description says so. As uint8 (times 255), voxels with alpha below 3 are 0 in all channels: they lie below the
threshold of 0.01 from which NeRF-MAE counts colors, and most of a grid is such voxels.

Legend: (X, Y, Z) voxels of a grid, S voxels of a side of a cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from data_pipelines.radiance.field import VoxelField

__all__ = ["ALPHA_STEP_VOX", "Cut", "cut_grid", "draw_cuts", "grid_of", "stored"]

ALPHA_STEP_VOX = 1.6
EMPTY_BELOW = 3  # of 255, alpha
_OCCUPIED = 0.01
_LEAST_OCCUPIED = 0.05  # share of the voxels of a cut that are occupied, or that of the whole grid if it is less
_TRIES = 50

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Cut:
    """A cube of a grid, turned and mirrored as NeRF-MAE does: about z, and along x and y.

    Attributes:
        origin: (x, y, z) of its first voxel in the grid.
        size: S.
        quarter_turns: from x towards y, after the cut.
        flip_x, flip_y: mirrors after the turns.
    """

    origin: tuple[int, int, int]
    size: int
    quarter_turns: int
    flip_x: bool
    flip_y: bool


def grid_of(field: VoxelField) -> npt.NDArray[np.float16]:
    """(4, X, Y, Z) colors and alpha at the nodes of a field."""
    alpha = field.alpha(ALPHA_STEP_VOX) * field.is_occupied
    return np.concatenate([field.colors().numpy(), alpha.numpy()[None]]).astype(np.float16)


def stored(grid: npt.NDArray[np.float16], dtype: str) -> Array:
    """A grid in the type it is stored as, one of `settings.DTYPES`."""
    if dtype == "float16":
        return grid
    values = (grid.astype(np.float32) * 255).round().astype(np.uint8)
    return values * (values[3] >= EMPTY_BELOW)


def draw_cuts(grid: npt.NDArray[np.float16], count: int, size: int, rng: np.random.Generator) -> list[Cut]:
    """Random cuts with something in them.

    A place counts when 5 % of its voxels are occupied (alpha of 0.01 or more), or as many as in the whole grid where
    that is less; of 50 places none of which does, the fullest is taken.

    Args:
        size: at most the shortest side of the grid.
    """
    occupied = grid[3] >= _OCCUPIED
    wanted = min(_LEAST_OCCUPIED, float(occupied.mean()))
    cuts = []
    for _ in range(count):
        best, share_of_best = (0, 0, 0), -1.0
        for _ in range(_TRIES):
            x, y, z = (int(rng.integers(side - size + 1)) for side in occupied.shape)
            share = float(occupied[x : x + size, y : y + size, z : z + size].mean())
            if share > share_of_best:
                best, share_of_best = (x, y, z), share
            if share >= wanted:
                break
        flip_x, flip_y = (bool(rng.integers(2)) for _ in range(2))
        cuts.append(Cut(best, size, int(rng.integers(4)), flip_x, flip_y))
    return cuts


def cut_grid(grid: Array, cut: Cut) -> Array:
    """(4, S, S, S) what a cut shows of a grid."""
    x, y, z = cut.origin
    part = grid[:, x : x + cut.size, y : y + cut.size, z : z + cut.size]
    part = np.rot90(part, cut.quarter_turns, axes=(1, 2))
    mirrored = tuple(axis for axis, is_mirrored in ((1, cut.flip_x), (2, cut.flip_y)) if is_mirrored)
    return np.ascontiguousarray(np.flip(part, mirrored))
