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

    Attributes:
        number: Restarts since the last progress, with the one that is due.
    """

    def __init__(self, most: int, reached: Callable[[], str]) -> None:
        self._most, self._reached = most, reached
        self._last = reached()
        self.number = 0

    def pause(self) -> float | None:
        """It has ended before its time: seconds until it begins again; None: that was once too often."""
        if (now := self._reached()) != self._last:
            self.number, self._last = 0, now
        self.number += 1
        return None if self.number > self._most else min(FIRST_PAUSE_S * 2.0 ** (self.number - 1), LONGEST_PAUSE_S)

    def __str__(self) -> str:
        return f"restart {self.number} of {self._most} without a checkpoint"
