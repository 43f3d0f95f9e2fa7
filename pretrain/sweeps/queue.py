"""The queue of a sweep: an append-only file, from which the state of every point follows.

A point that began and whose end nobody wrote down, as the sweep was killed, is begun again; its run goes on from its
newest checkpoint. Not here: who starts what, and when (`pretrain.sweeps.sweep`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.errors import EXIT_STOPPED
from pretrain.record import lines
from pretrain.sweeps.grid import Point

__all__ = ["QUEUE", "Job", "Queue", "State"]

QUEUE = "queue.jsonl"  # in the folder of a sweep

State = Literal["waiting", "running", "done", "failed", "stopped"]


@dataclass
class Job:
    """A point and what has become of it.

    Attributes:
        point: Of the grid.
        state: "stopped" can go on, as "failed" perhaps can.
        run_id: Of its run, once it has begun.
    """

    point: Point
    state: State = "waiting"
    run_id: str | None = None


class Queue:
    """The points of one sweep in order.

    Args:
        path: The file; read here, and made with the first change.
        points: Of the grid.
    """

    def __init__(self, path: Path, points: Sequence[Point]) -> None:
        self._path = path
        self.jobs = [Job(point) for point in points]
        for record in lines.records(path)[0]:
            job = self.jobs[record["point"]]
            if record["what"] == "began":
                job.state, job.run_id = "running", record["run_id"]
            elif record["what"] == "ended":
                job.state = _state(record["code"])
        for job in self.jobs:
            if job.state != "done":
                job.state = "waiting"

    def began(self, job: Job, run_id: str) -> None:
        """Write down, before it does, that a point begins as a run."""
        self._append(job, "began", run_id=run_id)
        job.state, job.run_id = "running", run_id

    def ended(self, job: Job, code: int) -> None:
        """Write down how it ended: the exit code, negative after a signal."""
        self._append(job, "ended", code=code)
        job.state = _state(code)

    def _append(self, job: Job, what: str, **facts: str | int) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines.append(self._path, {"time": when, "what": what, "point": job.point.number, **facts})


def _state(code: int) -> State:
    return "done" if code == 0 else "stopped" if code == EXIT_STOPPED else "failed"
