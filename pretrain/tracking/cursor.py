"""The sync cursor of a run: where in MLflow the run goes and how much of it has arrived there.

It is written anew after every acknowledged batch, so its size does not depend on that of the run. What grows with the
run, the checkpoints and evaluations that have arrived, is in a second file, `Sent`, to which lines are appended. Losing
either costs nothing but sending the run again.

Not here: sending (`pretrain.tracking.sync`), the names of the files (`pretrain.record.run_dir`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json

__all__ = ["BESIDE", "Cursor", "Sent", "Status"]

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
        self.last_step = {}

    def save(self, path: Path) -> None:
        write_atomically(path, json.dumps(dataclasses.asdict(self), indent=1).encode())

    @classmethod
    def load(cls, path: Path) -> Cursor | None:
        """The cursor at `path`; None if there is none or it is damaged (sending everything again is harmless)."""
        try:
            record = parse_json(path.read_text())
            if "versions" in record:  # of an older version, which had no `Sent`: lines of both files are sent again
                record = {key: record[key] for key in record.keys() - {"versions", "evaluated"}}
                record["journal_offset"] = record["evaluations_offset"] = 0
            return cls(**record)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s); the run is sent to MLflow from its beginning", path, error)
            return None


class Sent:
    """Checkpoints and evaluations of a run that have arrived in MLflow.

    Args:
        path: The file; read here, and made with the first record.

    Attributes:
        versions: Step -> (model id, version) of registered checkpoints.
        evaluations: `STEP PROTOCOL/DATA` of every evaluation -> key of the result; None: not recorded.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.versions: dict[int, tuple[str, str]] = {}
        self.evaluations: dict[str, str | None] = {}
        for line in path.read_bytes().splitlines() if path.is_file() else ():
            try:
                record = parse_json(line)
                if "evaluation" in record:
                    self.evaluations[record["evaluation"]] = record.get("key")
                else:
                    self.versions[record["step"]] = (record["model_id"], record["version"])
            except (ValueError, TypeError, LookupError):
                continue  # torn by a kill or a power cut: that one is sent again

    def add_version(self, step: int, model_id: str, version: str) -> None:
        self._append({"step": step, "model_id": model_id, "version": version})
        self.versions[step] = (model_id, version)

    def add_evaluation(self, name: str, key: str) -> None:
        self._append({"evaluation": name, "key": key})
        self.evaluations[name] = key

    def forget(self) -> None:
        """The run goes to another place, or to one that has forgotten it."""
        self.versions, self.evaluations = {}, {}
        self._path.unlink(missing_ok=True)

    def _append(self, record: dict[str, Any]) -> None:
        """On disk when it returns: the cursor, which is saved next, must not know more than this file."""
        with open(self._path, "ab") as file:
            file.write(f"\n{json.dumps(record)}".encode())  # begins a line, so that a torn one before it stays alone
            file.flush()
            os.fsync(file.fileno())
