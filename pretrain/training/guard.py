"""The health check of a run while it trains: steps that had to be skipped, and features or losses that have collapsed.

Both go to the event log as warnings, from where they reach the terminal, the report and MLflow (as tags). All
ranks decide alike, since they see the same numbers. What counts as a collapse is the objective's business
(`Objective.diagnose`).
"""

from __future__ import annotations

from collections.abc import Callable

from pretrain.config.schema import TrainConfig
from pretrain.record.events import Event, Warned

__all__ = ["HealthCheck"]

PATIENCE = 3  # logged steps in a row with a symptom before it is called a collapse


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

    def skipped(self, step: int) -> None:
        """A step was not applied because a loss was not finite.

        Raises:
            FloatingPointError: that happened more often than `train.max_skipped_steps`.
        """
        self._num_skipped += 1
        allowed = self._train.max_skipped_steps
        text = f"the loss of step {step} is not finite; skipped ({self._num_skipped} of {allowed} allowed)"
        self._emit(Warned(step=step, about="non_finite_loss", text=text))
        if self._num_skipped > allowed:
            remedy = "lower optimizer.lr, set optimizer.clip_grad, or use train.precision=fp32"
            raise FloatingPointError(
                f"{self._num_skipped} steps had a loss that is not finite, the last one step {step}; {remedy}"
            )

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
