"""The health check of a run while it trains: steps that had to be skipped, and features or losses that have collapsed.

Both go to the event log as warnings, from where they reach the terminal, the report and MLflow (as tags). All
ranks decide alike, since they see the same numbers. What counts as a collapse is the objective's business
(`Objective.diagnose`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pretrain.config.schema import TrainConfig
from pretrain.record.events import Event, Warned

__all__ = ["HealthCheck"]

PATIENCE = 3  # logged steps in a row with a symptom before it is called a collapse
MAX_LISTED = 8  # ranks that a message names


class HealthCheck:
    """Counts what goes wrong in one process' part of a run.

    Args:
        train: Says when to stop.
        emit: Writes an event (rank 0) or nothing (other ranks).
    """

    def __init__(self, train: TrainConfig, emit: Callable[[Event], None]) -> None:
        self._train, self._emit = train, emit
        self._num_skipped = 0
        self._symptoms: list[str] = []  # of the last logged steps, without a gap
        self._is_told = False

    def skipped(self, step: int, bad_ranks: Sequence[int]) -> None:
        """A step was not applied.

        Args:
            step: Its number, from 1.
            bad_ranks: Ranks with a loss that is not finite; none when only the gradient is not.

        Raises:
            FloatingPointError: that happened more often than `train.max_skipped_steps`.
        """
        self._num_skipped += 1
        allowed = self._train.max_skipped_steps
        what = _not_finite(step, bad_ranks)
        text = f"{what}; skipped ({self._num_skipped} of {allowed} allowed)"
        about = "non_finite_loss" if bad_ranks else "non_finite_gradient"
        self._emit(Warned(step=step, about=about, text=text, ranks=tuple(bad_ranks)))
        if self._num_skipped > allowed:
            remedy = "lower optimizer.lr, set optimizer.clip_grad, or use train.precision=fp32"
            raise FloatingPointError(f"{self._num_skipped} steps were skipped, at last: {what}; {remedy}")

    def observe(self, symptom: str | None, step: int) -> None:
        """What the objective says about the metrics of a logged step.

        Raises:
            FloatingPointError: it is a collapse and `train.stop_on_collapse` is set.
        """
        self._symptoms = [*self._symptoms, symptom] if symptom else []
        if len(self._symptoms) < PATIENCE or self._is_told:
            return
        self._is_told = True
        self._emit(Warned(step=step, about="collapse", text=f"collapsed: {self._symptoms[-1]}"))
        if self._train.stop_on_collapse:
            raise FloatingPointError(f"stopped at step {step}, train.stop_on_collapse is set: {self._symptoms[-1]}")


def _not_finite(step: int, bad_ranks: Sequence[int]) -> str:
    """What of a step is not finite, and where."""
    if not bad_ranks:
        return f"the gradient of step {step} is not finite, though the loss is"
    listed = ", ".join(map(str, bad_ranks[:MAX_LISTED]))
    more = f" and {len(bad_ranks) - MAX_LISTED} more" if len(bad_ranks) > MAX_LISTED else ""
    return f"the loss of step {step} is not finite on rank{'s' if len(bad_ranks) > 1 else ''} {listed}{more}"
