"""Point clouds as pictures: from two sides, near points bright and in front of far ones.

Legend: n clouds, P points, S pixels per side.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["cloud_pictures"]

_SIZE = 96
_DOT = 1  # pixels around the one that a point falls on
_FAR = 0.35  # brightness of the farthest points; the nearest have 1
_MARGIN = 1.1  # the picture reaches a tenth beyond the farthest point
# Elevation and azimuth of the two sides, in degrees: a look from above to the right, and one from the left.
_SIDES = ((25.0, 35.0), (25.0, 125.0))


@torch.no_grad()
def cloud_pictures(points: Tensor, colors: Tensor, radius: Tensor) -> Tensor:
    """Pictures of clouds by parallel projection, both sides next to each other, on black.

    Args:
        points: (n, P, 3), z up; points that are not finite are left out.
        colors: (n, P, 3) in [0, 1].
        radius: (n,) of the sphere about the origin that is shown.

    Returns:
        (n, 3, S, 2 S) in [0, 1].
    """
    return torch.cat([_from_side(points, colors, radius, *side) for side in _SIDES], dim=3)


def _from_side(points: Tensor, colors: Tensor, radius: Tensor, elevation: float, azimuth: float) -> Tensor:
    turned = points.float() @ _camera(elevation, azimuth).to(points.device).T  # right, up, towards the eye
    shown = turned / (_MARGIN * radius.float().clamp_min(1e-6))[:, None, None]
    is_seen = shown.isfinite().all(-1) & (shown.abs().amax(-1) < 1)  # (n, P)
    shown = shown.where(is_seen[..., None], 0.0)
    column = ((shown[..., 0] + 1) / 2 * _SIZE).long().clamp(_DOT, _SIZE - 1 - _DOT)
    row = ((1 - shown[..., 1]) / 2 * _SIZE).long().clamp(_DOT, _SIZE - 1 - _DOT)
    depth = torch.where(is_seen, shown[..., 2], -2.0)  # left-out points lie behind everything
    offsets = torch.arange(-_DOT, _DOT + 1, device=points.device)
    pixel = ((row[..., None, None] + offsets[:, None]) * _SIZE + column[..., None, None] + offsets).flatten(1)
    of_dot = offsets.numel() ** 2
    nearest = depth.new_full((len(points), _SIZE**2), -2.0)
    nearest.scatter_reduce_(1, pixel, depth.repeat_interleave(of_dot, 1), "amax")  # (n, S * S)
    # Of the points in front of all others at a pixel, the greatest value of each color: the same whatever the order.
    is_front = depth.repeat_interleave(of_dot, 1) >= nearest.gather(1, pixel)
    bright = (_FAR + (1 - _FAR) * (depth + 1) / 2).clamp(0, 1)[..., None] * colors.float() * is_seen[..., None]
    picture = bright.new_zeros(len(points), _SIZE**2, 3)
    values = bright.repeat_interleave(of_dot, 1) * is_front[..., None]
    picture.scatter_reduce_(1, pixel[..., None].expand(-1, -1, 3), values, "amax")
    return picture.unflatten(1, (_SIZE, _SIZE)).permute(0, 3, 1, 2)


def _camera(elevation: float, azimuth: float) -> Tensor:
    """(3, 3): rows are what is right, up and towards the eye."""
    up, around = math.radians(elevation), math.radians(azimuth)
    eye = torch.tensor([math.cos(up) * math.cos(around), math.cos(up) * math.sin(around), math.sin(up)])
    right = torch.tensor([-math.sin(around), math.cos(around), 0.0])
    return torch.stack([right, torch.linalg.cross(eye, right), eye])
