"""Patches of which some numbers are padding: their mean and deviation, and the error over what is not.

Legend: B batch, M patches, L numbers per patch.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["center_and_spread", "mean_over_samples"]


def center_and_spread(patches: Tensor, is_scored: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each patch as MAE has them, unbiased and with eps inside the root, (B, M, 1) each.

    Args:
        patches: (B, M, L).
        is_scored: (B, M, L), 0 in padding, else 1.
    """
    count = is_scored.sum(-1, keepdim=True)  # (B, M, 1)
    center = (patches * is_scored).sum(-1, keepdim=True) / count.clamp_min(1)
    squares = ((patches - center).square() * is_scored).sum(-1, keepdim=True)
    return center, (squares / (count - 1).clamp_min(1) + 1e-6).sqrt()


def mean_over_samples(error: Tensor, is_scored: Tensor) -> Tensor:
    """Mean over samples of the mean over what is scored of each; a sample of which nothing is counts as 0.

    Args:
        error: (B, M, L), 0 where nothing is scored.
        is_scored: (B, M, L), 0 in padding, else 1.
    """
    return (error.sum((1, 2)) / is_scored.sum((1, 2)).clamp_min(1)).mean()
