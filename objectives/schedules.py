"""Numbers that change with the step, as pure functions of it: resuming needs no scheduler state.

Sources: linear warm-up, then half a cosine, per step: MAE (He et al. 2022, arXiv:2111.06377, appendix A.1); momentum
of a teacher by half a cosine: BYOL (arXiv:2006.07733). Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Schedule", "half_cosine"]


def half_cosine(start: float, end: float, share: float) -> float:
    """Half a cosine from `start` (share 0) to `end` (share 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * share))


@dataclass(frozen=True)
class Schedule:
    """From 0 to `start` in the first `warmup_steps`, then half a cosine to `end` at step `num_steps`.

    The last step of a run is number `num_steps - 1`, so that it does not quite reach `end`.

    Attributes:
        start: the value after the warm-up, and of step 0 when there is none.
        end: the value that a step `num_steps` would have; equal to `start` for a constant.
        num_steps: steps of the whole run.
        warmup_steps: steps of the warm-up; 0: none.
        warmup: its shape. "linear" has `start` in the step after it; "inclusive" is a line, too, and has `start` in its
            last step, as in DINO and DINOv2; "cosine" is half a cosine with `start` in its last step (DINOv3 at high
            resolution).
    """

    start: float
    end: float
    num_steps: int
    warmup_steps: int = 0
    warmup: str = "linear"

    @classmethod
    def constant(cls, value: float) -> Schedule:
        """The same value at all steps."""
        return cls(value, value, num_steps=1)

    def at(self, step: int) -> float:
        """The value of step `step`, counted from 0."""
        if step < self.warmup_steps:
            share = step / max(1, self.warmup_steps - (self.warmup != "linear"))
            return half_cosine(0.0, self.start, share) if self.warmup == "cosine" else self.start * share
        if self.start == self.end:
            return self.start
        return half_cosine(
            self.start, self.end, (step - self.warmup_steps) / max(1, self.num_steps - self.warmup_steps)
        )
