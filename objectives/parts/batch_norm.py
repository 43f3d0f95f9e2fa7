"""Batch normalisation over the rows of all ranks.

S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167. With the moments of `backbones.rank_batch_norm`, every number of ranks
gets the result of one process with all rows. NOT here: running statistics; a projector is used in training only, and a
forward pass that changes buffers could not be repeated or thrown away.

Legend: n rows on a rank, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.precision import at_least_float32
from backbones.rank_batch_norm import moments_over_ranks

__all__ = ["BatchNorm"]

_EPS = 1e-5


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) per column, in float32 at least, then `weight` and `bias` if there are any."""

    def __init__(self, dim: int, affine: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim)) if affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if affine else None

    def forward(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D) in the type of `x`, or in float32 at least if it has no weights. Collective: n rows each."""
        with torch.autocast(x.device.type, enabled=False):
            _, centered, variance = moments_over_ranks(at_least_float32(x))
            normal = centered * (variance + _EPS).rsqrt()
            if self.weight is None or self.bias is None:
                return normal
            return (normal * self.weight + self.bias).to(x.dtype)
