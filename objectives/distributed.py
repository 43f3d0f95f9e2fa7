"""The collectives of objectives; without a process group there is one rank, and all of them return what they are given.

Every rank has to call them, in the same order, with tensors of the same shape: the loader gives each rank equally many
samples. The group is always that of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from backbones.ranks import foreseen_ranks, has_group, num_ranks, rank, sum_over_ranks, total_over_ranks

__all__ = [
    "foreseen_ranks",
    "gather_parts",
    "gather_rows",
    "gather_rows_with_gradient",
    "max_over_ranks",
    "mean_over_ranks",
    "num_ranks",
    "rank",
    "sum_over_ranks",
    "total_over_ranks",
]


@torch.no_grad()
def mean_over_ranks(tensor: Tensor) -> Tensor:
    """Mean of the ranks' tensors, the same on all of them; without gradient, and a new tensor."""
    return total_over_ranks(tensor) / num_ranks()


@torch.no_grad()
def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum of the ranks' tensors, the same on all of them; without gradient, and a new tensor."""
    highest = tensor.clone()
    if has_group():
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest


@torch.no_grad()
def gather_rows(tensor: Tensor) -> Tensor:
    """Rows of all ranks, rank 0's first: (n, ...) -> (W * n, ...) for W ranks; without gradient."""
    if not has_group():
        return torch.cat([tensor] * num_ranks()) if num_ranks() > 1 else tensor
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


@torch.no_grad()
def gather_parts(tensor: Tensor) -> Tensor:
    """Vectors of all ranks as rows, rank 0's first: (n,) -> (W, n) for W ranks; without gradient."""
    if not has_group():
        return tensor[None]
    rows = tensor.new_empty(num_ranks() * len(tensor))
    dist.all_gather_into_tensor(rows, tensor.contiguous())
    return rows.view(num_ranks(), -1)


def gather_rows_with_gradient(tensor: Tensor) -> Tensor:
    """Rows of all ranks, rank 0's first: (n, ...) -> (W * n, ...) for W ranks.

    What arrives at a rank's rows is the sum of all ranks' gradients of them, see `sum_over_ranks`.
    """
    return tensor if num_ranks() == 1 else _Gather.apply(tensor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return gather_rows(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return total_over_ranks(gradient.contiguous()).chunk(num_ranks())[rank()]
