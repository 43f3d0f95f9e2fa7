"""Whether a score is worse than the one before beyond noise.

The 95 % interval of a difference of two scores is taken from those of the scores (Newcombe 1998, "Interval estimation
for the difference between independent proportions", method 10, which fits unequal sides as Wilson's intervals have
them). Both scores are of the same test samples, which makes their true difference less noisy than that of independent
ones: the rule is slow to alarm, never quick.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

__all__ = ["Scored", "is_worse"]


@dataclass(frozen=True)
class Scored:
    """A headline with the bounds of its 95 % interval."""

    score: float
    low: float
    high: float


def is_worse(before: Scored, after: Scored, better: Literal["higher", "lower"]) -> bool:
    """Whether the interval of the difference lies on the worse side of zero.

    Args:
        before, after: Of the same task on the same data.
        better: Which scores are.
    """
    if better == "higher":
        drop, toward = before.score - after.score, math.hypot(before.score - before.low, after.high - after.score)
    else:
        drop, toward = after.score - before.score, math.hypot(before.high - before.score, after.score - after.low)
    return drop > toward
