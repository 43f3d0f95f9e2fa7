"""How often a run that ended before its time is begun again, and after which pause.

Not here: which ends are worth a restart (`pretrain.jobs.supervisor`, `pretrain.sweeps.sweep`).
"""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["Restarts"]

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0


class Restarts:
    """Of one run, or of what goes on where its runs are.

    Args:
        most: Restarts without progress between them.
        reached: Gives a text that changes with progress, such as the newest checkpoint.
        before: What a process that counted before this one has left: `number` and `last`.

    Attributes:
        number: Restarts since the last progress, with the one that is due.
        last: What was reached when it ended last; at first, now.
    """

    def __init__(self, most: int, reached: Callable[[], str], before: tuple[int, str] | None = None) -> None:
        self._most, self._reached = most, reached
        self.number, self.last = before or (0, reached())

    def pause(self) -> float | None:
        """It has ended before its time: seconds until it begins again; None: that was once too often."""
        if (now := self._reached()) != self.last:
            self.number, self.last = 0, now
        self.number += 1
        return None if self.number > self._most else min(FIRST_PAUSE_S * 2.0 ** (self.number - 1), LONGEST_PAUSE_S)

    def __str__(self) -> str:
        return f"restart {self.number} of {self._most} without a checkpoint"
