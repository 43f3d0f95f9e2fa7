"""Metric formulas of the protocols: accuracies with intervals, and mIoU and Dice from counts.

Definitions follow `evaluation` protocol version 1: one integer confusion matrix over the whole test set at label
resolution, classes with an empty union skipped, ignored pixels removed from both sides. Depth, retrieval and detection
metrics are not here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from evaluation.comparison import Z_95

__all__ = [
    "Outcome",
    "confusion_matrix",
    "dice_per_class",
    "foreground_dice",
    "iou_per_class",
    "jackknife",
    "jackknife_interval",
    "mean_class_accuracy",
    "mean_iou",
    "miou_metrics",
    "pixel_accuracy",
    "tallies",
    "top1_metrics",
    "top_k_accuracy",
    "wilson_interval",
]


@dataclass(frozen=True)
class Outcome:
    """What a head reports: `metrics` are the protocol's named fractions, `details` anything JSON can hold.

    Where the headline is of fewer than all `num_test` test samples, `details["num_scored"]` says of how many.

    Attributes:
        per_sample: What the headline is made of, one row per test sample in their order, for comparisons of two
            backbones on the same samples: (n,) of which it is the mean, bool where each is right or wrong; or
            `tallies` (n, 3, C), see `evaluation.comparison`. None: the protocol does not say.
        groups: (n,) int64, which of them belong together; None: each is its own.
        shown: Small arrays that pictures for people are drawn of, see `evaluation.pictures.outcomes`. They are kept
            beside the result, so that a stored one is drawn without computing anything.
    """

    metrics: Mapping[str, float]
    details: Mapping[str, Any]
    per_sample: Tensor | None = field(default=None, compare=False)
    groups: Tensor | None = field(default=None, compare=False)
    shown: Mapping[str, Tensor] = field(default_factory=dict, compare=False)


def wilson_interval(correct: float, total: int) -> tuple[float, float]:
    """Returns the 95 % Wilson score interval of `correct` out of `total` > 0 as fractions; means of counts serve."""
    share, z2 = correct / total, Z_95**2
    centre = share + z2 / (2 * total)
    spread = Z_95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    scale = 1 + z2 / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def top_k_accuracy(scores: Tensor, labels: Tensor, k: int) -> float:
    """Share of rows of `scores` (n, C) whose label (n,) is among the k best; equal scores go to the lowest class id."""
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]  # (n, k)
    return float((ranked == labels[:, None]).any(dim=1).double().mean())


def top1_metrics(predicted: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """What every classification reports: accuracy with its 95 % interval, and the mean over classes.

    Args:
        predicted, labels: (n,) int64.
    """
    correct = int((predicted == labels).sum())
    low, high = wilson_interval(correct, len(labels))
    return {
        "top1": correct / len(labels),
        "top1_ci_low": low,
        "top1_ci_high": high,
        "mean_class_top1": mean_class_accuracy(predicted, labels, num_classes),
    }


def miou_metrics(counts: Tensor, groups: Tensor | None) -> dict[str, float]:
    """What every segmentation of images reports: mIoU with its 95 % interval, and the share of right pixels.

    Args:
        counts: (n, C, C) int64, the confusion matrix of each image.
        groups: (n,) as for `jackknife`.
    """
    confusion = counts.sum(dim=0)
    low, high = jackknife_interval(counts, lambda counted: iou_per_class(counted).nanmean(dim=-1), groups)
    return {
        "miou": mean_iou(confusion),
        "miou_ci_low": low,
        "miou_ci_high": high,
        "pixel_accuracy": pixel_accuracy(confusion),
    }


def mean_class_accuracy(predicted: Tensor, labels: Tensor, num_classes: int) -> float:
    """Mean over the classes that occur in `labels` of the accuracy within the class."""
    total = torch.bincount(labels, minlength=num_classes)
    correct = torch.bincount(labels[predicted == labels], minlength=num_classes)
    seen = total > 0
    return float((correct[seen].double() / total[seen]).mean())


def confusion_matrix(predicted: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts (C, C) int64, rows true and columns predicted; entries with a negative label count nowhere."""
    is_valid = labels >= 0
    cells = labels[is_valid] * num_classes + predicted[is_valid]
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def iou_per_class(confusion: Tensor) -> Tensor:
    """Intersection over union (..., C) float64 of confusion matrices (..., C, C); NaN where the union is empty."""
    hit = confusion.diagonal(dim1=-2, dim2=-1).double()
    return hit / (confusion.sum(-1) + confusion.sum(-2) - hit)


def mean_iou(confusion: Tensor) -> float:
    """Mean over classes that were present or predicted; NaN when no pixel was counted."""
    return float(iou_per_class(confusion).nanmean())


def tallies(confusion: Tensor) -> Tensor:
    """Intersection, predicted and true (..., 3, C) int64 of confusion matrices (..., C, C): what IoU and Dice need."""
    return torch.stack((confusion.diagonal(dim1=-2, dim2=-1), confusion.sum(-2), confusion.sum(-1)), dim=-2)


def dice_per_class(confusion: Tensor) -> Tensor:
    """Dice, the F1 score, 2 I / (P + G) (..., C) float64 of confusion matrices (..., C, C); NaN where both are 0."""
    hit = confusion.diagonal(dim1=-2, dim2=-1).double()
    return 2 * hit / (confusion.sum(-1) + confusion.sum(-2))


def foreground_dice(confusion: Tensor) -> Tensor:
    """Mean Dice (...) of the classes but 0, the ground, that were present or predicted; NaN where none was."""
    return dice_per_class(confusion)[..., 1:].nanmean(dim=-1)


def jackknife(
    per_sample: Tensor, score: Callable[[Tensor], Tensor], groups: Tensor | None = None
) -> tuple[float, float] | None:
    """A score of summed counts, and half the width of its 95 % interval over samples, by Student's t.

    Args:
        per_sample: counts (n, ...).
        score: of counts (..., as of a sample) the scores (...); scores that are not finite are left out.
        groups: (n,) which samples belong together, and are left out together; None: each is its own.

    Returns:
        None of one sample, or group, of which nothing is known.
    """
    from scipy.special import stdtrit  # here, since cached scores need none

    if groups is not None:
        number = groups.unique(return_inverse=True)[1]
        sums = per_sample.new_zeros(int(number.max()) + 1, *per_sample.shape[1:])
        per_sample = sums.index_add_(0, number, per_sample)
    total, num_samples = per_sample.sum(dim=0), len(per_sample)
    without = score(total - per_sample)  # (n,)
    without = without[without.isfinite()]
    if num_samples < 2 or len(without) < 2:
        return None
    spread = float(without.var(correction=0)) * (num_samples - 1)  # squared standard error
    return float(score(total)), float(stdtrit(num_samples - 1, 0.975)) * math.sqrt(spread)


def jackknife_interval(
    per_sample: Tensor, score: Callable[[Tensor], Tensor], groups: Tensor | None = None
) -> tuple[float, float]:
    """95 % interval over samples of a score in [0, 1] of summed counts: jackknife, Student's t, on the logit scale.

    Of few samples it is wider than percentiles of a bootstrap, which resamples no more than the few are, and covers
    better: see tests/evaluation/test_metrics.py.

    Args:
        per_sample: counts (n, ...), such as confusion matrices. Of one sample nothing is known: (0, 1).
        score: of counts (..., as of a sample) the scores (...).
        groups: as for `jackknife`.
    """
    found = jackknife(per_sample, score, groups)
    if found is None:
        return 0.0, 1.0
    value, margin = found
    if not 0 < value < 1:
        return max(0.0, value - margin), min(1.0, value + margin)
    center, margin = math.log(value / (1 - value)), margin / (value * (1 - value))
    low, high = (0.5 + 0.5 * math.tanh(bound / 2) for bound in (center - margin, center + margin))  # the logistic
    return low, high


def pixel_accuracy(confusion: Tensor) -> float:
    return float(confusion.diagonal().sum() / confusion.sum())
