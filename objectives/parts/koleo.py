"""KoLeo: features of a batch spread out, because each is pushed away from its nearest neighbor.

A. Sablayrolles et al., "Spreading vectors for similarity search", ICLR 2019, arXiv:1806.03198, after the entropy
estimator of Kozachenko and Leonenko; used by DINOv2 (arXiv:2304.07193, section 4) and DINOv3 (arXiv:2508.10104).

Legend: B rows of this rank, n rows among which neighbors are looked for, D width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from backbones.precision import at_least_float32
from objectives.distributed import gather_rows_with_gradient, num_ranks, rank
from objectives.errors import ObjectiveError

__all__ = ["KoLeo", "koleo"]

_EPS = 1e-8
# Rows this near are the same picture twice. Three of them would have a gradient of a million.
_SAME = 1e-12


class KoLeo(NamedTuple):
    """The loss, a scalar, and the share of (row, neighbor) pairs that are duplicates and do not count in it."""

    loss: Tensor
    duplicates: Tensor


def koleo(features: Tensor, *, num_neighbors: int = 1, group_size: int | None = None) -> KoLeo:
    """Mean of -ln(distance to the nearest neighbor) of rows of unit length; gradient flows to both.

    In float32 whatever the features are: a crowded batch loses half of its gradient in bfloat16.

    Args:
        features: (B, D) with B > 1, one row per image.
        num_neighbors: how many nearest ones are averaged, at most n - 1.
        group_size: neighbors are looked for among so many rows of adjacent ranks: a multiple of B that divides the rows
            of all ranks. None: among this rank's own.

    Raises:
        ObjectiveError: there is one row, too few neighbors, or no such groups.
    """
    own = functional.normalize(at_least_float32(features), dim=-1, eps=_EPS)
    rows, first = (own, 0) if group_size is None else _group(own, group_size)
    if len(rows) <= num_neighbors:
        raise ObjectiveError(
            f"objective.koleo_weight: {len(rows)} images have no {num_neighbors} others to be spread from; use a "
            "larger train.micro_batch_size, or koleo_weight=0"
        )
    with torch.no_grad():
        similarity = own @ rows.T  # (B, n)
        similarity.diagonal(first).fill_(-1.0)  # nobody is their own neighbor
        nearest = similarity.topk(num_neighbors, dim=1).indices  # (B, neighbors)
    difference = own[:, None] - rows[nearest]  # (B, neighbors, D)
    with torch.no_grad():
        is_same = difference.square().sum(-1) < _SAME  # (B, neighbors)
    # What is left out is moved away first, for its distance has no finite gradient.
    distance = (torch.where(is_same[..., None], 1.0, difference) + _EPS).norm(dim=-1)
    return KoLeo(
        loss=torch.where(is_same, 0.0, -(distance + _EPS).log()).mean(), duplicates=is_same.to(own.dtype).mean()
    )


def _group(own: Tensor, group_size: int) -> tuple[Tensor, int]:
    """Rows of the group that this rank is in, (n, D), and where its own begin among them."""
    count, total = len(own), len(own) * num_ranks()
    if group_size % count or total % group_size:
        raise ObjectiveError(
            f"objective.koleo_group={group_size}: it has to be a multiple of the {count} images of a micro-batch "
            f"that divides the {total} of all ranks"
        )
    rows = gather_rows_with_gradient(own)
    start = rank() * count // group_size * group_size
    return rows[start : start + group_size], rank() * count - start
