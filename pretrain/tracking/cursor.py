"""The sync cursor of a run: where in MLflow the run goes and how much of it has arrived there.

It is written after every acknowledged batch. Losing it costs nothing but sending the run again.

Not here: sending (`pretrain.tracking.sync`), the name of the file (`pretrain.record.run_dir`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json

__all__ = ["BESIDE", "Cursor", "Status"]

log = logging.getLogger(__name__)

BESIDE = "sqlite:///../mlflow.db"  # seen from the directory of the run, so that it stays true when a storage is moved
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class Cursor:
    """What the file says.

    Attributes:
        uri: Tracking server, without password and query; `BESIDE` for the database of the run's own storage.
        created_ms: When the run was first tracked, Unix milliseconds.
        journal_offset, evaluations_offset: Bytes of the two files that have arrived.
        last_step: Highest step sent, per metric name.
        versions: Step -> (model id, version) of registered checkpoints.
        evaluated: `STEP PROTOCOL/DATA` of every evaluation sent.
        status: How the run ended, once it has.
    """

    uri: str
    experiment: str
    model_name: str
    select: str | None
    tags: dict[str, str]
    created_ms: int
    mlflow_run_id: str | None = None
    journal_offset: int = 0
    evaluations_offset: int = 0
    last_step: dict[str, int] = field(default_factory=dict)
    versions: dict[str, tuple[str, str]] = field(default_factory=dict)
    evaluated: list[str] = field(default_factory=list)
    status: Status | None = None

    def continuing(self, before: Cursor | None) -> Cursor:
        """These settings with the progress of `before`, if that went to the same place."""
        if before is None or (before.uri, before.experiment) != (self.uri, self.experiment):
            return self
        settings = {name: getattr(self, name) for name in ("model_name", "select", "tags")}
        return dataclasses.replace(before, **settings, status=None)

    def forget_progress(self) -> None:
        self.mlflow_run_id = None
        self.journal_offset = self.evaluations_offset = 0
        self.last_step, self.versions, self.evaluated = {}, {}, []

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Cursor | None:
        """The cursor at `path`; None if there is none or it is damaged (sending everything again is harmless)."""
        try:
            return cls(**parse_json(path.read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            log.warning("%s is damaged (%s); the run is sent to MLflow from its beginning", path, error)
            return None
