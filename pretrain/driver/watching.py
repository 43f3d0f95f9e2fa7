"""What a driver does about workers that hang, about machines that are taken away and about room for more workers."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pretrain.record.heartbeat import Watchdog
from pretrain.record.run_dir import RunDir
from pretrain.training.stopping import ask_to_regroup

if TYPE_CHECKING:
    from cluster.workers import End, Members

__all__ = ["Watch"]

LOOK_S = 2.0  # between two questions to Ray
STEADY_S = 6.0  # for which there has to be room before the workers begin again for it
PATIENCE_S = 300.0  # until more workers are tried again after a try that brought none


class Watch:
    """Asked about once a second while workers train (`cluster.workers.run_workers`).

    Args:
        run: Whose workers.
        hang_after_s: As in `Watchdog`.
        clock: Seconds, for tests.
    """

    def __init__(self, run: RunDir, hang_after_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._watchdog = Watchdog(run, hang_after_s, clock=clock)
        self._looked = -LOOK_S
        self._leaving: frozenset[str] = frozenset()  # nodes whose end has been acted upon
        self._room_since: float | None = None
        self._tried: tuple[int, float] | None = None  # the size from which more were tried, and when

    def starting(self) -> None:
        """Before each start of the workers."""
        self._watchdog.forget()
        self._run.regroup_request.unlink(missing_ok=True)
        self._room_since = None

    def __call__(self, members: Members) -> End | None:
        """Whether the workers have to be killed, and why; asks them to begin again where others would do better."""
        if (silence := self._watchdog.look()) is not None:
            from cluster.workers import End

            return End("failed", silence.rank, silence.text)
        now = self._clock()
        if now - self._looked >= LOOK_S:
            self._looked = now
            if (leaving := members.leaving) - self._leaving:
                self._leaving |= leaving
                ask_to_regroup(self._run, "now", "a machine is taken away")
            else:
                self._look_for_room(members, now)
        return None

    def _look_for_room(self, members: Members, now: float) -> None:
        """Ask for more workers at the next checkpoint, so that no step is done twice for them."""
        larger = members.larger
        if larger is None or (self._tried and self._tried[0] == members.size and now - self._tried[1] < PATIENCE_S):
            self._room_since = None
        elif self._room_since is None:
            self._room_since = now
        elif now - self._room_since >= STEADY_S:
            self._tried = (members.size, now)
            ask_to_regroup(self._run, "checkpoint", f"there is room for {larger} workers instead of {members.size}")
