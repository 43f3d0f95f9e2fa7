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
    """From 0 to `start` in the first `warmup_steps`, then half a cosine to `end`.

    The last step of a run is number `num_steps - 1`. Unless `decay_steps` or `stretch` is given, the cosine would be at
    `end` one step later, and does not quite reach it.

    Attributes:
        start: the value after the warm-up, and of step 0 when there is none.
        end: the value at the end of the cosine, and from then on; equal to `start` for a constant.
        num_steps: steps of the whole run.
        warmup_steps: steps of the warm-up; 0: none.
        warmup: its shape. "linear" has `start` in the step after it; "inclusive" is a line, too, and has `start` in its
            last step, as in DINO and DINOv2; "cosine" is half a cosine with `start` in its last step (DINOv3 at high
            resolution).
        decay_steps: steps of the cosine, at least 2, of which the first has `start` and the last `end` (DINOv3's
            three-part schedules); None: all that are left after the warm-up.
        stretch: by which share half a cosine is longer than these steps; it is cut off at the last of them, and scaled
            so that this one has `end`. It falls later and is steep where it ends (`trunc_extra` in DINOv2's code).
    """

    start: float
    end: float
    num_steps: int
    warmup_steps: int = 0
    warmup: str = "linear"
    decay_steps: int | None = None
    stretch: float = 0.0

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
        done, left = step - self.warmup_steps, self.num_steps - self.warmup_steps
        if self.decay_steps is None and not self.stretch:
            return half_cosine(self.start, self.end, done / max(1, left))
        steps = left if self.decay_steps is None else self.decay_steps
        if done >= steps - 1:
            return self.end
        whole = steps * (1.0 + self.stretch) - 1
        fallen, at_last = (half_cosine(0.0, 1.0, number / whole) for number in (done, steps - 1))
        return self.start + (self.end - self.start) * fallen / at_last
