"""Runs the points of a sweep, at most so many at a time, each as an ordinary run in a process of its own.

What fails stops nothing else. Where the runs are started is the launcher's affair (`pretrain.processes`): on this
machine, or as jobs.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

from pretrain.errors import EXIT_STOPPED
from pretrain.processes import Handle, Launcher
from pretrain.record.lock import hold
from pretrain.record.run_dir import RunDir, new_run_id
from pretrain.sweeps.queue import Job, Queue

__all__ = ["Request", "Sweep"]

POLL_S = 1.0


@dataclass(frozen=True)
class Request:
    """What all runs of a sweep share.

    Attributes:
        recipe: As named on the command line.
        name: Of the resolved recipes.
        storage: Of the runs.
        address: Of a Ray cluster; None: as `pretrain run` without it.
        environments: Of each place at a time, e.g. which GPUs its run may use; as many as run at a time.
    """

    recipe: str
    name: str
    storage: Path
    address: str | None
    environments: Sequence[Mapping[str, str]]


class Sweep(Generic[Handle]):
    """One sweep, from the points that wait to the end of the last one.

    Args:
        request: What the runs share.
        folder: Of the sweep.
        queue: Its points.
        launcher: Starts runs.
        say: Gets a line for people about each beginning and end.
        look: Called with the jobs at every look, to follow their runs.
    """

    def __init__(
        self,
        request: Request,
        folder: Path,
        queue: Queue,
        launcher: Launcher[Handle],
        say: Callable[[str], None],
        look: Callable[[Sequence[Job]], None],
    ) -> None:
        self._request, self._folder, self._queue, self._launcher = request, folder, queue, launcher
        self._say, self._look = say, look
        self._waiting = [job for job in queue.jobs if job.state == "waiting"]
        self._places: list[tuple[Job, Handle] | None] = [None] * len(request.environments)
        self._stopping = False

    def run(self, wait: Callable[[float], Any]) -> None:
        """Until no point waits or runs; `stop` makes that soon."""
        while self.tick():
            wait(POLL_S)
        self._look(self._queue.jobs)

    def tick(self) -> bool:
        """One look: take in what has ended, start what fits; returns whether there is more to wait for."""
        for place, at_work in enumerate(self._places):
            if at_work is not None and (code := self._launcher.poll(at_work[1])) is not None:
                if self._stopping and code == -signal.SIGTERM:  # it was asked before it could hear
                    code = EXIT_STOPPED
                self._queue.ended(at_work[0], code)
                self._places[place] = None
                self._tell(at_work[0], at_work[0].state if code >= 0 else f"failed, ended by signal {-code}")
            if self._places[place] is None and not self._stopping:
                self._places[place] = self._next(place)
        self._look(self._queue.jobs)
        return any(self._places) or (bool(self._waiting) and not self._stopping)

    def stop(self) -> None:
        """Ask all runs to end, and begin no other; once more, and they end at once, as runs do."""
        self._stopping = True
        for at_work in self._places:
            if at_work is not None:
                self._launcher.stop(at_work[1])

    def _next(self, place: int) -> tuple[Job, Handle] | None:
        """Start the first point that waits, but for those that a sweep which was killed has left running."""
        job = next((job for job in self._waiting if not self._is_driven(job)), None)
        if job is None:
            return None
        self._waiting.remove(job)
        request, run_id = self._request, job.run_id or new_run_id(self._request.name)
        where = () if request.address is None else ("--address", request.address)
        # The same command begins the run and goes on with it.
        arguments = ("-m", "pretrain", "run", request.recipe, *job.point.settings, *where, "--run-id", run_id)
        self._queue.began(job, run_id)
        log = self._log(job)
        log.parent.mkdir(exist_ok=True)
        handle = self._launcher.start(arguments, log, environment=request.environments[place])
        self._tell(job, f"run {run_id}, its output is in {log}")
        return job, handle

    def _is_driven(self, job: Job) -> bool:
        if job.run_id is None or not self._run(job.run_id).driver_lock.exists():
            return False
        if (lock := hold(self._run(job.run_id).driver_lock)) is None:
            return True
        lock.close()
        return False

    def _run(self, run_id: str) -> RunDir:
        return RunDir(self._request.storage / run_id)

    def _log(self, job: Job) -> Path:
        return self._folder / "logs" / f"point-{job.point.number:03d}.log"

    def _tell(self, job: Job, what: str) -> None:
        why = f": {_last_line(self._log(job))}" if job.state in ("failed", "stopped") else ""
        self._say(f"{job.point.number + 1}/{len(self._queue.jobs)} {job.point}: {what}{why}")


def _last_line(log: Path) -> str:
    """The end of what a run said."""
    if not log.is_file():
        return "it said nothing"
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4000))
        said = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    return said[-1].strip() if said else "it said nothing"
