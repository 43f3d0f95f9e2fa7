"""The error of predicted pixels where an image was corrupted, and what it says.

S. Atito et al., 2022, arXiv:2205.14986. NOT here: which pixels are masked (`objectives.parts.block_corruption`).

Legend: n images, C channels, S side in pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.features import Features
from objectives.distributed import mean_over_ranks
from objectives.parts.block_corruption import Corruption
from objectives.parts.reconstruction_health import feature_metrics

__all__ = ["masked_l1", "reconstruction_metrics"]


def masked_l1(prediction: Tensor, target: Tensor, is_masked: Tensor) -> Tensor:
    """Mean absolute error over the masked numbers of all images.

    Images differ in how many they are, so the sum over a rank's masked numbers is divided by the mean count of the
    ranks: the mean of the ranks' losses then is that of one process. (The authors average ranks of unequal counts.)

    Args:
        prediction, target: (n, C, S, S).
        is_masked: (n, 1, S, S) bool.
    """
    with torch.autocast(target.device.type, enabled=False):
        error = (prediction.to(target.dtype) - target).abs() * is_masked
        return error.sum() / _mean_count(is_masked, target)


def _mean_count(is_masked: Tensor, target: Tensor) -> Tensor:
    """Masked numbers per rank; never 0."""
    return mean_over_ranks(is_masked.sum().to(target.dtype)).clamp_min(1) * target.shape[1]


@torch.no_grad()
def reconstruction_metrics(
    prediction: Tensor, target: Tensor, corruption: Corruption, features: Features
) -> dict[str, Tensor]:
    """Readings of a reconstruction and of the features that it is made from; none waits for the device.

    "masked_l1", and of it those images with a fill and those with another image's pixels ("masked_l1_fill",
    "masked_l1_alien"; all images where a micro-batch has none of the kind), "visible_l1", "masked_share" of the pixels.
    "explained": 1 - masked_l1 / that of predicting the mean colour; 0 = nothing learned.
    """
    is_masked = corruption.is_masked
    error = (prediction.to(target.dtype) - target).abs().mean(1, keepdim=True)  # (n, 1, S, S)
    masked = (error * is_masked).sum((1, 2, 3))  # (n,) sums
    counts = is_masked.sum((1, 2, 3))  # (n,)
    grey = (target.abs().mean(1, keepdim=True) * is_masked).sum()
    total, count = masked.sum(), counts.sum().clamp_min(1)

    def of_kind(is_kind: Tensor) -> Tensor:
        share = (masked * is_kind).sum() / (counts * is_kind).sum().clamp_min(1)
        return torch.where(is_kind.any(), share, total / count)

    return {
        "masked_l1": total / count,
        "masked_l1_fill": of_kind(~corruption.is_alien),
        "masked_l1_alien": of_kind(corruption.is_alien),
        "visible_l1": (error.sum() - total) / (~is_masked).sum().clamp_min(1),
        "masked_share": is_masked.to(target.dtype).mean(),
        "explained": 1 - total / grey.clamp_min(1e-12),
        **feature_metrics(features),
    }
