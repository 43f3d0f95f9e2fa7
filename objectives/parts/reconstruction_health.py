"""Is there something in the features of an encoder that learns to reconstruct, and is the reconstruction any good?"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backbones.features import Features
from objectives.base import Progress
from objectives.health import effective_rank, patch_cosine
from objectives.parts.image_token import image_token

__all__ = ["feature_metrics", "reconstruction_finding"]


@torch.no_grad()
def feature_metrics(features: Features) -> dict[str, Tensor]:
    """Whether there is something in the features: "effective_rank" of images, "patch_cosine" within an image."""
    return {"effective_rank": effective_rank(image_token(features)), "patch_cosine": patch_cosine(features.patches)}


def reconstruction_finding(
    metrics: Mapping[str, float],
    progress: Progress,
    predicted: str = "masked pixels",
    trivial: str = "their mean colour",
) -> str | None:
    """The finding of `Objective.diagnose` about a reconstruction; None in a young run.

    Args:
        predicted: what is predicted, for the message.
        trivial: the prediction of which "explained" is 0.
    """
    if progress.is_young:
        return None
    if metrics["explained"] < 0.01:
        return (
            f"{predicted} are predicted no better than by {trivial} (explained {metrics['explained']:.3f}); "
            "raise or lower optimizer.lr, or train longer"
        )
    if metrics["effective_rank"] < 1.05 or metrics["patch_cosine"] > 0.9999:
        return (
            f"features have collapsed: effective rank {metrics['effective_rank']:.2f} of different images, mean cosine "
            f"{metrics['patch_cosine']:.4f} between patches of an image; lower optimizer.lr"
        )
    return None
