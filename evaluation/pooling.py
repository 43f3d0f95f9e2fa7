"""One vector per sample for heads on pooled features: [CLS, mean of patches], standardised by the training samples.

Both tokens, because which of the two holds what an objective has learned differs from objective to objective, and
standardised, because a few features of large scale would decide otherwise. Of point clouds, which have no CLS token,
it is [maximum, mean] of the tokens, as is the custom since PointNet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled

__all__ = ["joined", "scaling", "standardised"]

STD_FLOOR = 1e-6  # below this a feature is constant and carries nothing


def joined(split: Pooled) -> Tensor:
    """[CLS, maximum, mean] of the tokens (n, 1 to 3 D): those of them that the kind of backbone has."""
    parts = [part for part in (split.cls, split.patch_max, split.patch_mean) if part is not None]
    return torch.cat(parts, dim=1) if len(parts) > 1 else split.patch_mean


def scaling(train: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation (D,) of each feature over `train` (n, D); 0 of constant ones."""
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    return mean, torch.where(std > STD_FLOOR, 1 / std.clamp(min=STD_FLOOR), 0)


def standardised(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both (n, D) with mean 0 and deviation 1 of each feature over `train`; constant features become 0."""
    mean, scale = scaling(train)
    return (train - mean) * scale, (test - mean) * scale
