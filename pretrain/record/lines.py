"""Append-only files of JSON lines that several processes write: the history of schedules, the queue of a sweep.

A record is on disk when `append` returns. A line that a kill or a full disk has torn stays alone: each record begins a
line of its own, and what is no JSON object is passed over by readers.

Not here: the event log of a run, which must never stop training (`pretrain.record.journal`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_pipelines.parsing import parse_json

__all__ = ["append", "records"]


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Write one record, by a single call of the system, so that those of other processes do not come into it.

    Raises:
        OSError: it is not on disk, or not all of it.
    """
    line = f"\n{json.dumps(record, allow_nan=False)}\n".encode()
    opened = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        written = os.write(opened, line)
        if written < len(line):
            raise OSError(f"{path}: only {written} of {len(line)} bytes of a record were written")
        os.fsync(opened)
    finally:
        os.close(opened)


def records(path: Path, offset: int = 0) -> tuple[list[dict[str, Any]], int]:
    """The whole records from `offset` bytes on, the oldest first, and the offset to continue from."""
    found: list[dict[str, Any]] = []
    if not path.is_file():
        return found, offset
    with path.open("rb") as file:
        file.seek(offset)
        for line in file:
            if not line.endswith(b"\n"):  # still being written
                break
            offset += len(line)
            try:
                record = parse_json(line)
            except ValueError:
                continue
            if isinstance(record, dict):
                found.append(record)
    return found, offset
