"""One vector per image for heads on pooled features: [CLS, mean of patches], standardised by the training images.

Both tokens, because which of the two holds what an objective has learned differs from objective to objective, and
standardised, because a few features of large scale would decide otherwise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled

__all__ = ["joined", "standardised"]

STD_FLOOR = 1e-6  # below this a feature is constant and carries nothing


def joined(split: Pooled) -> Tensor:
    """[CLS, mean of patches] (n, 2 D), or the mean alone for backbones without CLS."""
    return split.patch_mean if split.cls is None else torch.cat((split.cls, split.patch_mean), dim=1)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both (n, D) with mean 0 and deviation 1 of each feature over `train`; constant features become 0."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    scale = torch.where(std > STD_FLOOR, 1 / std.clamp(min=STD_FLOOR), 0)
    return (train - mean) * scale, (test - mean) * scale
