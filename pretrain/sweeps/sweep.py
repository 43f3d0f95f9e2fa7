"""Runs the points of a sweep, at most so many at a time, each as an ordinary run.

What fails stops nothing else, and is begun again as often as it may. Where the runs are started is the launcher's
affair (`pretrain.sweeps.launcher`).
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pretrain.errors import EXIT_STOPPED
from pretrain.processes import Handle
from pretrain.record.lock import is_held
from pretrain.record.restarts import Restarts
from pretrain.record.run_dir import RunDir, new_run_id
from pretrain.record.standing import newest_checkpoint
from pretrain.sweeps.launcher import Launcher
from pretrain.sweeps.queue import Job, Queue

__all__ = ["Sweep"]

POLL_S = 1.0


@dataclass
class _AtWork(Generic[Handle]):
    """A run that has begun, and how often it was asked to end."""

    job: Job
    handle: Handle
    asked: int = 0


class Sweep(Generic[Handle]):
    """One sweep, from the points that wait to the end of the last one.

    Args:
        name: Of the recipe; begins the names of the runs.
        storage: Of the runs.
        queue: The points.
        launcher: Starts runs.
        parallel: How many there are at a time.
        say: Gets a line for people about each beginning and end.
        look: Called with the jobs at every look, to follow their runs.
        retries: Restarts of each run without a new checkpoint between them, when it was killed, crashed, failed, or
            stopped though nobody asked it to.
        clock: Seconds, for tests.
    """

    def __init__(
        self,
        name: str,
        storage: Path,
        queue: Queue,
        launcher: Launcher[Handle],
        parallel: int,
        say: Callable[[str], None],
        look: Callable[[Sequence[Job]], None],
        retries: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._storage, self._queue, self._launcher = name, storage, queue, launcher
        self._say, self._look = say, look
        self._waiting = [job for job in queue.jobs if job.state == "waiting"]
        self._places: list[_AtWork[Handle] | None] = [None] * parallel
        self._asked, self._at_once = 0, False
        self._retries, self._clock = retries, clock
        self._restarts: dict[int, Restarts] = {}  # by number of a point
        self._not_before: dict[int, float] = {}

    def run(self, wait: Callable[[float], Any]) -> None:
        """Until no point waits or runs; `stop` makes that soon."""
        while self.tick():
            wait(POLL_S)
        self._queue.over()
        self._look(self._queue.jobs)

    def stop(self) -> None:
        """Have all runs asked to end, and no other begun; once more, and they are asked again, which ends them at once.

        A handler of signals may call it at any moment: it is the next look that asks.
        """
        self._asked += 1

    def end_at_once(self) -> None:
        """As `stop`, but runs end without a checkpoint of their last steps."""
        self._asked, self._at_once = max(1, self._asked), True

    def tick(self) -> bool:
        """One look: take in what has ended, start what fits; returns whether there is more to wait for."""
        for place in range(len(self._places)):
            self._take_end(place)
            if self._places[place] is None and not self._asked:
                self._places[place] = self._next(place)
        for at_work in filter(None, self._places):
            self._ask(at_work)
        self._look(self._queue.jobs)
        return any(self._places) or (bool(self._waiting) and not self._asked)

    def _ask(self, at_work: _AtWork[Handle]) -> None:
        """Have a run end, if it is to and was not asked yet.

        A cluster that stops a job signals all of its processes: a run that has heard that is not told again, which
        would end it at once.
        """
        assert at_work.job.run_id is not None
        run = RunDir(self._storage / at_work.job.run_id)
        if self._at_once and run.path.is_dir():
            run.stop_now_request.touch()
        if at_work.asked < self._asked:
            has_heard = at_work.asked == 0 and run.is_stop_asked
            at_work.asked = self._asked
            if not has_heard:
                self._launcher.stop(at_work.handle)

    def _take_end(self, place: int) -> None:
        """Write down the end of the run at a place, if it has ended."""
        at_work = self._places[place]
        if at_work is None or (code := self._launcher.poll(at_work.handle)) is None:
            return
        if at_work.asked and code == -signal.SIGTERM:  # it was asked before it could hear
            code = EXIT_STOPPED
        self._places[place] = None
        said = self._end(at_work.job, code)
        what = at_work.job.state if code >= 0 else f"failed, ended by signal {-code}"
        what = what if code == 0 else f"{what}: {self._launcher.told(at_work.job)}"
        self._tell(at_work.job, f"{what}{said}")

    def _end(self, job: Job, code: int) -> str:
        """Write down the end of a run, and have it begin again if it ended before its time; what to say of that."""
        assert job.run_id is not None
        run = RunDir(self._storage / job.run_id)
        if code in (0, 2) or self._asked or (code == EXIT_STOPPED and run.is_stop_wanted):
            self._queue.ended(job, code)
            return ""
        restarts = self._restarts[job.point.number]
        pause = restarts.pause()
        self._queue.ended(job, code, (restarts.number, restarts.last))
        if pause is None:
            return ""
        self._not_before[job.point.number] = self._clock() + pause
        self._waiting.insert(0, job)
        return f"; it goes on in {pause:.0f} s ({restarts})"

    def _next(self, place: int) -> _AtWork[Handle] | None:
        """Start the first point that waits, but for those that pause, or that a killed sweep has left running."""
        now = self._clock()
        ready = (job for job in self._waiting if self._not_before.get(job.point.number, now) <= now)
        job = next((job for job in ready if not self._is_driven(job)), None)
        if job is None:
            return None
        self._waiting.remove(job)
        run_id = job.run_id or new_run_id(self._name)
        run = RunDir(self._storage / run_id)
        if job.point.number not in self._restarts:
            self._restarts[job.point.number] = Restarts(self._retries, lambda: newest_checkpoint(run), job.restarts)
        self._queue.began(job, run_id)
        self._tell(job, f"run {run_id}")
        return _AtWork(job, self._launcher.start(job, run_id, place))

    def _is_driven(self, job: Job) -> bool:
        return job.run_id is not None and is_held(RunDir(self._storage / job.run_id).driver_lock)

    def _tell(self, job: Job, what: str) -> None:
        self._say(f"{job.point.number + 1}/{len(self._queue.jobs)} {job.point}: {what}")
