"""How many processes train together, and sums over them; without a process group there is one.

Every rank has to call what sums, in the same order, with tensors of the same shape. The group is always that of all
ranks. NOT here: what only objectives need (`objectives.distributed`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["foreseen_ranks", "has_group", "num_ranks", "rank", "sum_over_ranks", "total_over_ranks"]

_foreseen = 1


@contextmanager
def foreseen_ranks(number: int) -> Iterator[None]:
    """Without a process group, and in this context, results have the shapes that `number` ranks would give them.

    For a step without numbers, on torch's meta device: copies stand for what the other ranks have.
    """
    global _foreseen
    before, _foreseen = _foreseen, number
    try:
        yield
    finally:
        _foreseen = before


def num_ranks() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if has_group() else _foreseen


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if has_group() else 0


@torch.no_grad()
def total_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the ranks' tensors, the same on all of them; without gradient, and a new tensor."""
    total = tensor.clone()
    if has_group():
        dist.all_reduce(total)
    return total


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Sum of the ranks' tensors, with gradient.

    What arrives at a rank's tensor is the sum of all ranks' gradients, so that the mean over ranks that an engine
    takes of parameter gradients is the gradient of the mean loss.
    """
    return _Sum.apply(tensor) if has_group() else tensor


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return total_over_ranks(tensor)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return total_over_ranks(gradient.contiguous())


def has_group() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()
