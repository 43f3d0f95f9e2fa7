"""Point clouds cut into overlapping groups: farthest-point sampling, then the nearest points of each center.

What Point-MAE (Y. Pang et al., 2022, arXiv:2203.06604, section 3.1) takes from C. R. Qi et al. (PointNet++, 2017,
arXiv:1706.02413), in plain PyTorch on any device. Distances are sums of squared differences in float32 at least, never
the expansion |a|^2 + |b|^2 - 2ab, whose rounding exceeds the distances of near points. No gradient passes through the
choice of points. NOT here: what becomes of the groups.

Legend: B batch, N points, G groups (centers), S points of a group.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Groups", "farthest_points", "group", "nearest_points"]

# Points whose squared distance to the origin is at most this are never chosen but as the first one. So does the
# operator that Point-MAE samples with, for the sake of zero padding; ours reproduces its choices.
_ORIGIN = 1e-3
# Numbers of one block of distances: 64 MiB in float32, so that 128 clouds of 8192 points do not take 2 GiB.
_BLOCK = 2**24


class Groups(NamedTuple):
    """Overlapping parts of clouds."""

    centers: Tensor  # (B, G, 3)
    neighborhoods: Tensor  # (B, G, S, 3), relative to their centers


def group(xyz: Tensor, num_groups: int, group_size: int) -> Groups:
    """Cut clouds into groups: centers by `farthest_points`, and of each the nearest points, itself among them.

    Args:
        xyz: (B, N, 3).
        num_groups, group_size: G and S, at most N each.
    """
    with torch.autocast(xyz.device.type, enabled=False):
        xyz = xyz.to(torch.promote_types(xyz.dtype, torch.float32))
        centers = _taken(xyz, farthest_points(xyz, num_groups))  # (B, G, 3)
        neighbors = nearest_points(centers, xyz, group_size)  # (B, G, S)
        points = _taken(xyz, neighbors.flatten(1)).unflatten(1, neighbors.shape[1:])  # (B, G, S, 3)
        return Groups(centers, points - centers.unsqueeze(2))


@torch.no_grad()
def farthest_points(xyz: Tensor, num: int) -> Tensor:
    """Indices of points of which each is the farthest from all before it; the first is point 0.

    Points near the origin (squared distance at most 1e-3) are left out, unless all are. Of equally far points the one
    with the lowest index is taken.

    Args:
        xyz: (B, N, 3), float32 at least.
        num: at most N.

    Returns:
        (B, num) int64.
    """
    axes = [axis.contiguous() for axis in xyz.unbind(-1)]  # 3 x (B, N)
    is_near_origin = xyz.square().sum(-1) <= _ORIGIN
    distance = torch.where(is_near_origin, -1.0, torch.full_like(axes[0], 1e10))  # (B, N), to the nearest chosen point
    # Written in place: small tensors kept among large ones that come and go would fragment the heap by gigabytes.
    chosen = torch.zeros(len(xyz), num, dtype=torch.int64, device=xyz.device)
    away, difference = torch.empty_like(distance), torch.empty_like(distance)
    for index in range(1, num):
        last = chosen[:, index - 1 : index]
        away.zero_()
        for axis in axes:
            torch.sub(axis, axis.gather(1, last), out=difference)
            away += difference.square_()
        torch.minimum(distance, away, out=distance)  # left-out points stay at -1
        chosen[:, index] = distance.argmax(1)
    return chosen


@torch.no_grad()
def nearest_points(queries: Tensor, xyz: Tensor, num: int) -> Tensor:
    """Indices of the nearest points of each query, the nearest first, and of equally near ones the lowest index first.

    Args:
        queries: (B, G, 3).
        xyz: (B, N, 3) of the same type.
        num: at most N.

    Returns:
        (B, G, num) int64.
    """
    rows = max(1, _BLOCK // max(1, len(xyz) * xyz.shape[1]))
    return torch.cat([_nearest(part, xyz, num) for part in queries.split(rows, dim=1)], dim=1)


def _nearest(queries: Tensor, xyz: Tensor, num: int) -> Tensor:
    squared = _squared_distances(queries, xyz)  # (B, g, N)
    near, idx = squared.topk(num, largest=False, sorted=False)
    by_index = idx.argsort(-1)  # `topk` promises no order of equal distances: first by index, then stably by distance
    near, idx = near.gather(-1, by_index), idx.gather(-1, by_index)
    return idx.gather(-1, near.argsort(dim=-1, stable=True))


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, n, 3) and (B, m, 3) -> (B, n, m), an axis at a time: differences of all three would take thrice as much."""
    total = torch.zeros(a.shape[0], a.shape[1], b.shape[1], dtype=a.dtype, device=a.device)
    for axis in range(3):
        total += (a[..., axis, None] - b[:, None, :, axis]).square_()
    return total


def _taken(xyz: Tensor, idx: Tensor) -> Tensor:
    """(B, N, 3) at indices (B, K) -> (B, K, 3)."""
    return xyz.gather(1, idx.unsqueeze(-1).expand(-1, -1, 3))
