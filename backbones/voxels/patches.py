"""Volumes cut into cubes and put together again, and made a whole number of cubes long.

Legend: B batch, C channels, p voxels along the edge of a cube, N cubes, L = C * p^3 numbers per cube.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional

__all__ = ["from_patches", "padded_to", "to_patches"]


def to_patches(volumes: Tensor, patch_size: int) -> Tensor:
    """Volumes (B, C, X, Y, Z), whose sides are multiples of p, as row-major cubes (B, N, L), the channel first."""
    x, y, z = (side // patch_size for side in volumes.shape[2:])
    split = volumes.reshape(*volumes.shape[:2], x, patch_size, y, patch_size, z, patch_size)
    return split.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(len(volumes), x * y * z, -1)  # (B, N, L)


def from_patches(patches: Tensor, grid: tuple[int, int, int], patch_size: int) -> Tensor:
    """Inverse of `to_patches`: (B, N, L) on a grid of cubes -> (B, C, X, Y, Z)."""
    x, y, z = grid
    split = patches.reshape(len(patches), x, y, z, -1, patch_size, patch_size, patch_size)
    joined = split.permute(0, 4, 1, 5, 2, 6, 3, 7)
    return joined.reshape(len(patches), -1, x * patch_size, y * patch_size, z * patch_size)


def padded_to(volumes: Tensor, sides: Sequence[int]) -> Tensor:
    """Volumes (B, C, X, Y, Z) with zeros at the high end of each axis, (B, C, *sides); none of these is smaller."""
    missing = [want - have for want, have in zip(sides, volumes.shape[2:], strict=True)]
    return functional.pad(volumes, [0, missing[2], 0, missing[1], 0, missing[0]]) if any(missing) else volumes
