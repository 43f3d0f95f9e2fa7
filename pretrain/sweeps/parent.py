"""The MLflow run of a sweep, above those of its runs: they carry its id as the tag `mlflow.parentRunId`.

Runs are told of it from outside, once MLflow knows them (their `mlflow.json` says when), so that a run of a sweep is
like any other. While MLflow is away nothing waits for it; what is left is done at the end, or by the next sweep of the
same command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pretrain.errors import last_line
from pretrain.record.run_dir import RunDir
from pretrain.sweeps.queue import Job
from pretrain.tracking.client import MlflowRun, connect, default_uri
from pretrain.tracking.cursor import Cursor

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Parent"]

PARENT_TAG = "mlflow.parentRunId"  # by which the pages of MLflow nest runs
PAUSE_S = 30.0  # after MLflow was away


class Parent:
    """Of one sweep; MLflow is asked when there is a run to tell it of.

    Args:
        sweep_id: Its name in MLflow.
        storage: Of the runs.
        experiment: Of MLflow.
        grid: The swept settings, for people.

    Attributes:
        problem: Why runs are not told of it at the moment; None when all is well.
    """

    def __init__(self, sweep_id: str, storage: Path, experiment: str, grid: str) -> None:
        self._sweep_id, self._storage, self._experiment, self._grid = sweep_id, storage, experiment, grid
        self._uri = default_uri(storage)
        self._client: MlflowClient | None = None
        self._run: MlflowRun | None = None
        self._told: set[str] = set()
        self._not_before = 0.0
        self.problem: str | None = None

    def adopt(self, jobs: Sequence[Job]) -> None:
        """Tell the runs that MLflow knows, and has not been told."""
        if time.monotonic() < self._not_before:
            return
        new = {child for job in jobs if (child := self._mlflow_run_of(job)) is not None} - self._told
        if not new:
            return
        try:
            run = self._bound()
            for child in sorted(new):
                run.client.set_tag(child, PARENT_TAG, run.mlflow_run_id)
                self._told.add(child)
            self.problem = None
        except Exception as error:  # whatever a server or a database does: the runs go on
            self._away(error)

    def close(self, jobs: Sequence[Job]) -> None:
        """Say how the sweep ended: FINISHED when all is done, KILLED when it can go on, else FAILED."""
        self._not_before = 0.0
        self.adopt(jobs)
        states = {job.state for job in jobs}
        status = "FINISHED" if states == {"done"} else "FAILED" if "failed" in states else "KILLED"
        if self._run is not None:
            try:
                self._run.end(status)
            except Exception as error:
                self._away(error)

    def _bound(self) -> MlflowRun:
        """The run in MLflow, which an earlier sweep of the same command may have made."""
        if self._run is None:
            self._client = self._client or connect(self._uri)
            now = int(time.time() * 1000)
            run = MlflowRun.bind(self._client, self._uri, self._experiment, self._sweep_id, now, None)
            run.tag("pretrain.sweep", self._grid)
            self._run = run
        return self._run

    def _mlflow_run_of(self, job: Job) -> str | None:
        path = RunDir(self._storage / job.run_id).cursor if job.run_id else None
        cursor = Cursor.load(path) if path is not None and path.is_file() else None
        return cursor.mlflow_run_id if cursor else None

    def _away(self, error: Exception) -> None:
        self.problem = f"MLflow does not take the sweep: {last_line(error)}"
        self._not_before = time.monotonic() + PAUSE_S
