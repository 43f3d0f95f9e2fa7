"""The queue of a sweep: an append-only file, from which the state of every point follows.

A point that began and whose end nobody wrote down, as the sweep was killed, is begun again; its run goes on from its
newest checkpoint. How often runs were begun again is counted on where a sweep was killed, and anew in one that is
started after it was over. Not here: who starts what, and when (`pretrain.sweeps.sweep`).
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
        restarts: How often it was begun again without progress, and what it had reached
            (`pretrain.record.restarts`); None where that is not counted.
    """

    point: Point
    state: State = "waiting"
    run_id: str | None = None
    restarts: tuple[int, str] | None = None


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
            if record["what"] == "over":
                for job in self.jobs:
                    job.restarts = None
                continue
            job = self.jobs[record["point"]]
            if record["what"] == "began":
                job.state, job.run_id = "running", record["run_id"]
            elif record["what"] == "ended":
                job.state = _state(record["code"])
                job.restarts = (record["restarts"], record["reached"]) if "restarts" in record else None
        for job in self.jobs:
            if job.state != "done":
                job.state = "waiting"

    def began(self, job: Job, run_id: str) -> None:
        """Write down, before it does, that a point begins as a run."""
        self._append("began", point=job.point.number, run_id=run_id)
        job.state, job.run_id = "running", run_id

    def ended(self, job: Job, code: int, restarts: tuple[int, str] | None = None) -> None:
        """Write down how it ended: the exit code, negative after a signal, and of a failure the restarts (`Job`)."""
        counted: dict[str, str | int] = {} if restarts is None else {"restarts": restarts[0], "reached": restarts[1]}
        self._append("ended", point=job.point.number, code=code, **counted)
        job.state, job.restarts = _state(code), restarts

    def over(self) -> None:
        """Write down that the sweep has come to an end: none of its runs is at work or to begin again."""
        self._append("over")

    def _append(self, what: str, **facts: str | int) -> None:
        when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        lines.append(self._path, {"time": when, "what": what, **facts})


def _state(code: int) -> State:
    return "done" if code == 0 else "stopped" if code == EXIT_STOPPED else "failed"
