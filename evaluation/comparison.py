"""Is one backbone better than another, on the same test samples? Differences with an interval, paired by sample.

Two scores of the same samples differ by far less than their own intervals say, because the samples that are hard are so
for both. What each result keeps of every sample (`PerSample`) is compared row by row here.

Legend: n samples, C classes, G groups of samples that belong together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from evaluation.protocol import EvaluationError, Metric

__all__ = ["SUMMED", "Z_95", "Difference", "PerSample", "difference"]

Z_95 = 1.959963984540054  # two-sided 95 % quantile of the normal distribution
Rows = npt.NDArray[np.float64]


def _mean_iou(tallies: Rows) -> Rows:
    hit, predicted, true = np.moveaxis(tallies, -2, 0)
    return _mean_of_known(hit, predicted + true - hit)


def _foreground_dice(tallies: Rows) -> Rows:
    hit, predicted, true = np.moveaxis(tallies[..., 1:], -2, 0)
    return _mean_of_known(2 * hit, predicted + true)


def _mean_of_known(part: Rows, whole: Rows) -> Rows:
    """Mean (...) of part / whole (..., C) over the classes that there are."""
    known = whole > 0
    shares = np.divide(part, whole, out=np.zeros_like(part), where=known)
    return np.asarray(shares.sum(-1) / np.maximum(known.sum(-1), 1))


# Headlines that are functions of summed tallies (..., 3, C): intersection, predicted and true.
SUMMED: Mapping[str, Callable[[Rows], Rows]] = MappingProxyType({"miou": _mean_iou, "dice": _foreground_dice})


@dataclass(frozen=True)
class PerSample:
    """What a headline is made of.

    Attributes:
        values: (n,), of which it is the mean, such as whether each prediction is right; or tallies (n, 3, C) of counts,
            of which `SUMMED` says what it is.
        groups: (n,) which samples belong together, such as frames of one sequence, by number; None: each is its own.
    """

    values: npt.NDArray[np.generic]
    groups: npt.NDArray[np.int64] | None = None


class Difference(NamedTuple):
    """How much higher the second score is, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_beyond_noise(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low > 0 or self.high < 0

    def is_better(self, metric: Metric) -> bool:
        """Whether the second one is better, beyond noise."""
        return self.low > 0 if metric.better == "higher" else self.high < 0


def difference(metric: str, first: PerSample, second: PerSample) -> Difference:
    """How much higher `metric` is of `second`, on the same samples.

    Rights and wrongs: the interval of Agresti and Min (Statistics in Medicine 24, 2005, section 2), who add half a
    sample to each of the four cells, so that few samples that all agree do not pass for certainty. Other means, and
    sums over groups of samples: the jackknife with Student's t.

    Raises:
        EvaluationError: They are not of the same samples, or `metric` is no such score.
    """
    if first.values.shape != second.values.shape:
        raise EvaluationError(
            f"results of shapes {first.values.shape} and {second.values.shape} are not of the same samples and classes"
        )
    if first.values.ndim == 1 and first.values.dtype == bool and first.groups is None:
        return _of_proportions(first.values, second.values)
    if first.values.ndim == 1:
        score: Callable[[Rows], Rows] = lambda sums: sums[..., 0] / sums[..., 1]  # noqa: E731
        rows = [np.stack([one.values.astype(np.float64), np.ones(len(one.values))], axis=1) for one in (first, second)]
    elif metric in SUMMED:
        score = SUMMED[metric]
        rows = [one.values.astype(np.float64) for one in (first, second)]
    else:
        raise EvaluationError(f"nothing says how {metric!r} follows from counts; known are {', '.join(SUMMED)}")
    grouped = [_summed(one, first.groups) for one in rows]
    totals = [one.sum(axis=0) for one in grouped]
    value = float(score(totals[1]) - score(totals[0]))
    num_groups = len(grouped[0])
    if num_groups < 2:
        return Difference(value, -math.inf, math.inf)
    from scipy.special import stdtrit  # here, since differences of proportions need none

    without = score(totals[1] - grouped[1]) - score(totals[0] - grouped[0])  # (G,)
    margin = float(stdtrit(num_groups - 1, 0.975)) * math.sqrt(float(without.var()) * (num_groups - 1))
    return Difference(value, value - margin, value + margin)


def _of_proportions(first: npt.NDArray[np.generic], second: npt.NDArray[np.generic]) -> Difference:
    """Of whether each sample is right, bool (n,)."""
    was, now = first.astype(bool), second.astype(bool)
    won, lost, n = int((now & ~was).sum()), int((was & ~now).sum()), len(was)
    half_more = n + 2
    center, apart = (won - lost) / half_more, (won + lost + 1) / half_more
    margin = Z_95 * math.sqrt((apart - center**2) / half_more)
    return Difference((won - lost) / n, max(-1.0, center - margin), min(1.0, center + margin))


def _summed(rows: Rows, groups: npt.NDArray[np.int64] | None) -> Rows:
    """Sums (G, ...) over the rows of each group."""
    if groups is None:
        return rows
    _, number = np.unique(groups, return_inverse=True)
    sums = np.zeros((number.max() + 1, *rows.shape[1:]))
    np.add.at(sums, number, rows)
    return sums
