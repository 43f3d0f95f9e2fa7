"""Volumes and radiance grids as pictures: slices, and views along an axis.

Legend: n volumes, C channels, (X, Y, Z) voxels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["front_views", "grid_slices", "volume_slices"]

_LEAST_SIDE = 96  # pixels of the longer side, where whole factors reach it


@torch.no_grad()
def volume_slices(volumes: Tensor, height: Tensor) -> Tensor:
    """The slice of each volume (n, C, X, Y, Z), in [0, 1], at a place `height` (n,) along the last axis.

    Returns:
        (n, 3, H, W) in [0, 1], the first axis to the right, the second up: the first three channels, or the first as
        grey.
    """
    idx = height.view(-1, 1, 1, 1, 1).expand(-1, *volumes.shape[1:4], 1)
    slices = volumes.gather(4, idx)[..., 0].float()  # (n, C, X, Y)
    colors = slices[:, :3] if slices.shape[1] >= 3 else slices[:, :1].expand(-1, 3, -1, -1)
    return _shown(colors)


@torch.no_grad()
def grid_slices(grids: Tensor, height: Tensor) -> Tensor:
    """Slices of radiance grids (n, 4, X, Y, Z), RGB and alpha in [0, 1], on white; otherwise as `volume_slices`."""
    alpha = grids[:, 3:]
    return volume_slices(grids[:, :3] * alpha + (1 - alpha), height)


@torch.no_grad()
def front_views(grids: Tensor) -> Tensor:
    """What is seen of radiance grids (n, 4, X, Y, Z) in the direction of the second axis, on white.

    Alpha compositing of parallel rays, one per (x, z): the color is the sum of T_y alpha_y c_y with T_y the product of
    1 - alpha over all voxels in front of y.

    Returns:
        (n, 3, H, W) in [0, 1], the first axis to the right, the third up.
    """
    grids = grids.float()
    alpha = grids[:, 3:]  # (n, 1, X, Y, Z)
    through = (1 - alpha).cumprod(3)  # behind each voxel
    in_front = torch.cat([torch.ones_like(through[:, :, :, :1]), through[:, :, :, :-1]], dim=3)
    colors = (in_front * alpha * grids[:, :3]).sum(3) + through[:, :, :, -1]  # (n, 3, X, Z)
    return _shown(colors)


def _shown(values: Tensor) -> Tensor:
    """(n, 3, A, B) with the first axis to the right, the second up, each value a square of pixels."""
    pictures = values.clamp(0, 1).transpose(2, 3).flip(2)  # (n, 3, B, A)
    factor = max(1, _LEAST_SIDE // max(pictures.shape[2:]))
    return functional.interpolate(pictures, scale_factor=factor, mode="nearest") if factor > 1 else pictures
