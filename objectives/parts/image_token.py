"""One vector for a whole image."""

from __future__ import annotations

from torch import Tensor

from backbones.features import Features

__all__ = ["image_token"]


def image_token(features: Features) -> Tensor:
    """What stands for each image, (n, D): the class token, or the mean of the patches of an encoder without one."""
    return features.patches.mean(1) if features.cls is None else features.cls
