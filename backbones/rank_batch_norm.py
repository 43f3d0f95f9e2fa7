"""Batch normalization over the rows of all ranks: the moments, and the layer with running statistics.

S. Ioffe, C. Szegedy, 2015, arXiv:1502.03167. torch's SyncBatchNorm does the same on CUDA alone; this one gives every
number of ranks the result of one process with all rows, on any device. NOT here: the layer without running statistics
(`objectives.parts.batch_norm`).

Legend: n rows on a rank, W ranks, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.ranks import num_ranks, sum_over_ranks

__all__ = ["RankBatchNorm", "moments_over_ranks"]


def moments_over_ranks(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(n, D) -> mean of each column over the rows of all ranks (D,), `x` without it (n, D), and the variance (D,).

    A collective: every rank has equally many rows. The variance is that of the rows, not of a population behind them.
    """
    num_rows = len(x) * num_ranks()
    mean = sum_over_ranks(x.sum(0)) / num_rows  # (D,)
    centered = x - mean
    return mean, centered, sum_over_ranks(centered.square().sum(0)) / num_rows


class RankBatchNorm(nn.BatchNorm1d):
    """Normalizes the last dimension, in float32 at least; in evaluation mode by the running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D) in the type of `x`. In training a collective: every rank has equally many rows."""
        with torch.autocast(x.device.type, enabled=False):
            wide = x.flatten(0, -2).to(torch.promote_types(x.dtype, torch.float32))  # (n, D)
            is_alone = not self.training or num_ranks() == 1
            normal = super().forward(wide) if is_alone else self._over_ranks(wide)
            return normal.view(x.shape).to(x.dtype)

    def _over_ranks(self, x: Tensor) -> Tensor:
        """(n, D) -> (n, D)."""
        mean, centered, variance = moments_over_ranks(x)
        self._note(mean.detach(), variance.detach(), len(x) * num_ranks())
        scale = (variance + self.eps).rsqrt() * self.weight  # (D,); so, only `centered` is kept for the gradient
        return centered * scale + self.bias

    @torch.no_grad()
    def _note(self, mean: Tensor, variance: Tensor, num_rows: int) -> None:
        """Moves the running statistics, whose variance is that of a population, as torch's norms do."""
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        unbiased = variance * (num_rows / max(1, num_rows - 1))
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), self.momentum)
