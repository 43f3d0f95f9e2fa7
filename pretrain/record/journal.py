"""The event log of a run: an append-only file of JSON lines, one event each.

It is the only thing that the training loop writes besides checkpoints.

Whoever wants to know how a run is doing (terminal, tracking server, report) tails this file, so nothing that reads
can slow down or stop what writes. One `os.write` per record: a killed process loses nothing that was written, a power
cut may.

Every line is strict JSON. Non-finite floats, which JSON cannot express and which are the first thing anyone looks for
in a diverged run, are written as `{"$float": "nan" | "inf" | "-inf"}` and restored by the readers.

Not here: the events (`pretrain.record.events`), what they mean to a tracking server (`pretrain.tracking.sync`) or to
the report (`pretrain.reporting.page`).
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from data_pipelines.parsing import parse_json
from data_pipelines.storage.locations import redacted
from pretrain.record.events import DamagedEvent, Event, from_json

__all__ = ["Journal", "Line", "read_events", "read_lines"]

log = logging.getLogger(__name__)


class Journal:
    """Appends events to a file; a full or failing disk costs events, never the training run.

    Args:
        path: The file; it and its directory are made if missing.

    Attributes:
        lost: Events that could not be written so far.

    Raises:
        OSError: The file cannot be opened (only here; `write` reports a failing disk once and goes on).
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.lost = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        # A line torn by a kill must not swallow the next record: close it off with a newline first.
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def write(self, event: Event) -> None:
        """Append one event.

        Credentials in its URLs are left out. Its values may be anything JSON knows, paths, and scalars with `.item()`
        (NumPy; torch: a device sync).
        """
        line = json.dumps(redacted(_plain(event.to_json())), allow_nan=False) + "\n"
        data = line.encode()
        if self._torn:
            data = b"\n" + data
        try:
            written = os.write(self._fd, data)
        except OSError as error:
            self._lose(error)
            return
        # Whatever part of `data` reached the disk ends without a newline unless all of it did.
        self._torn = written < len(data)
        if self._torn:
            self._lose(OSError(f"only {written} of {len(data)} bytes written"))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            if self.lost:
                log.warning("%s: %d events were lost in all", self.path, self.lost)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lose(self, error: OSError) -> None:
        if self.lost == 0:
            log.warning("%s: cannot write (%s); training goes on, events are lost meanwhile", self.path, error)
        self.lost += 1


@dataclass(frozen=True)
class Line:
    """One complete line.

    Attributes:
        raw: Its bytes without the newline.
        end: Offset of the byte after it, in bytes from the beginning of the file.
    """

    raw: bytes
    end: int

    def event(self) -> Event | None:
        """What it tells; None when that is of a kind that this version does not know.

        Raises:
            DamagedEvent: It is not a JSON object (a line torn by a kill or a full disk), or not a whole event.
        """
        try:
            record = parse_json(self.raw, object_hook=_restore)
        except (ValueError, TypeError):
            record = None
        if not isinstance(record, dict):
            raise DamagedEvent("not a JSON object")
        return from_json(record)


def read_lines(path: str | os.PathLike[str], offset: int = 0, limit: int | None = None) -> Iterator[Line]:
    """Yield the complete, non-blank lines that begin at or after `offset` bytes; at most `limit` of them.

    A last line without a newline is still being written and is left for the next call. A missing file has no lines.
    """
    if not os.path.exists(path):
        return
    with open(path, "rb") as file:
        file.seek(offset)
        end, count = offset, 0
        for raw in file:
            if not raw.endswith(b"\n") or (limit is not None and count >= limit):
                return
            end += len(raw)
            if raw.strip():
                count += 1
                yield Line(raw.rstrip(b"\n"), end)


def read_events(path: str | os.PathLike[str], offset: int = 0) -> tuple[list[Event], int]:
    """The events from `offset` on, and the offset to continue from.

    Events of kinds that this version does not know are passed over; damaged lines are skipped with a warning.
    """
    events: list[Event] = []
    for line in read_lines(path, offset):
        offset = line.end
        try:
            event = line.event()
        except DamagedEvent as error:
            log.warning("%s: skipped a damaged line that ends at byte %d (%s)", path, line.end, error)
            continue
        if event is not None:
            events.append(event)
    return events, offset


def _plain(value: Any) -> Any:
    """`value` in terms of what strict JSON can say."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(float(value))}
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, bytes):
        return [_plain(item) for item in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "item"):
        return _plain(value.item())
    raise TypeError(f"an event cannot hold a {type(value).__name__}: {value!r}")


def _restore(item: dict[str, Any]) -> Any:
    return float(item["$float"]) if item.keys() == {"$float"} else item
