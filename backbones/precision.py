"""The precision of losses and statistics: at least float32, whatever the network computes in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["at_least_float32"]


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor itself in float32 or float64, else a float32 copy of it."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
