"""Numbers, inputs and weights of the golden cases of 3D objectives, rebuilt from their written recipe."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

__all__ = ["parameter", "uniform"]

_PRIME = 999983


def uniform(shape: tuple[int, ...], stream: int) -> Tensor:
    """Float64 numbers in [0, 1) by modular arithmetic on the index, row-major."""
    i = np.arange(math.prod(shape), dtype=np.int64)
    a = ((i + 1) % _PRIME) * ((i + 1 + stream) % _PRIME) % _PRIME
    v = (a * ((48271 + 2 * stream) % _PRIME) + 11 * stream + 7) % _PRIME
    return torch.from_numpy(v / _PRIME).reshape(shape)


def parameter(shape: tuple[int, ...], stream: int, kind: str) -> Tensor:
    """A weight: "w" a matrix, "n" the weight of a norm, "b" a bias, "t" a token or table."""
    centered = uniform(shape, stream) - 0.5
    if kind == "w":
        return centered * 3 / math.sqrt(math.prod(shape[1:]))
    return {"n": 1 + 0.2 * centered, "b": 0.2 * centered, "t": 0.4 * centered}[kind]
