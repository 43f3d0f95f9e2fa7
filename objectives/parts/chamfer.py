"""The Chamfer distance of two sets of points, with gradient for both.

H. Fan, H. Su, L. Guibas, 2017, arXiv:1612.00603, section 4.1; the reductions are those of Point-MAE's code
(arXiv:2203.06604). Nearest points are found without gradient and a block of distances at a time; the gradient then
runs through the pairs alone, so that sets of any size take little memory. Squared distances come from differences,
never from |a|^2 + |b|^2 - 2ab, whose rounding can exceed them.

Legend: B pairs of sets, n and m points.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from backbones.precision import at_least_float32

__all__ = ["Distances", "chamfer_distance", "nearest_distances"]

_BLOCK = 2**24  # numbers of one block of distances: 64 MiB in float32
_SQUARED_FLOOR = 1e-12  # a square root at 0 has no gradient


class Distances(NamedTuple):
    """Squared distances of points to the other set."""

    of_a: Tensor  # (B, n)
    of_b: Tensor  # (B, m)


def chamfer_distance(a: Tensor, b: Tensor, kind: str = "l2") -> Tensor:
    """Mean over all points of a set and all pairs of sets, in float32 at least; call it without autocast.

    Args:
        a: (B, n, 3).
        b: (B, m, 3).
        kind: "l2": mean squared distance of `a` to `b`, plus that of `b` to `a`; "l1": half the sum of the means of the
            distances themselves.

    Returns:
        Scalar.
    """
    of_a, of_b = nearest_distances(a, b)
    if kind == "l2":
        return of_a.mean() + of_b.mean()
    return (of_a.clamp_min(_SQUARED_FLOOR).sqrt().mean() + of_b.clamp_min(_SQUARED_FLOOR).sqrt().mean()) / 2


def nearest_distances(a: Tensor, b: Tensor) -> Distances:
    """Squared distance of each point to the nearest of the other set; of equally near ones the first counts.

    Args:
        a: (B, n, 3).
        b: (B, m, 3).
    """
    a, b = at_least_float32(a), at_least_float32(b)
    nearest_of_a, nearest_of_b = _nearest(a, b)
    return Distances(
        (a - _taken(b, nearest_of_a)).square().sum(-1),
        (b - _taken(a, nearest_of_b)).square().sum(-1),
    )


@torch.no_grad()
def _nearest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the nearest points: of each in `a` (B, n) into `b`, and of each in `b` (B, m) into `a`."""
    rows = max(1, _BLOCK // max(1, a.shape[1] * b.shape[1]))
    found = [_nearest_of_few(*part) for part in zip(a.split(rows), b.split(rows), strict=True)]
    of_a, of_b = zip(*found, strict=True)
    return torch.cat(of_a), torch.cat(of_b)


def _nearest_of_few(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same of so few sets that all of their distances fit, or of one pair of large ones, part by part."""
    rows = max(1, _BLOCK // max(1, len(a) * b.shape[1]))
    of_a, near_b, of_b = [], None, None
    for start in range(0, a.shape[1], rows):
        squared = _squared_distances(a[:, start : start + rows], b)  # (B, r, m)
        of_a.append(squared.argmin(2))
        near, idx = squared.min(1)  # (B, m)
        if near_b is None or of_b is None:
            near_b, of_b = near, idx
        else:
            of_b = torch.where(near < near_b, idx + start, of_b)
            near_b = torch.minimum(near, near_b)
    assert of_b is not None  # there are points
    return torch.cat(of_a, dim=1), of_b


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(B, n, 3) and (B, m, 3) -> (B, n, m), an axis at a time."""
    total = (a[:, :, None, 0] - b[:, None, :, 0]).square_()
    for axis in (1, 2):
        total += (a[:, :, None, axis] - b[:, None, :, axis]).square_()
    return total


def _taken(points: Tensor, idx: Tensor) -> Tensor:
    """(B, n, 3) at indices (B, k) -> (B, k, 3)."""
    return points.gather(1, idx.unsqueeze(-1).expand(-1, -1, 3))
