"""How a run stands, by its files alone and quickly: an event log may have a million lines, and a list many runs.

Only the last event of each kind that matters is read, from the end of the file. Not here: jobs of a cluster
(`pretrain.jobs`), the report of a run (`pretrain.reporting`).
"""

from __future__ import annotations

import itertools
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from evaluation.protocol import format_value
from pretrain.record.events import (
    CheckpointPublished,
    DamagedEvent,
    Evaluated,
    Event,
    Failed,
    Finished,
    Metrics,
    Start,
    Stopped,
)
from pretrain.record.journal import Line
from pretrain.record.lock import is_held
from pretrain.record.remote_runs import drives_elsewhere
from pretrain.record.run_dir import RunDir

__all__ = ["Standing", "newest_checkpoint", "score_text", "standing_of"]

_STEPS = (Start, Metrics, CheckpointPublished, Stopped, Finished)


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Attributes:
        state: running, stopping, finished, stopped or failed.
        step: Optimizer steps that are known to be done.
        total_steps: Of the whole run; None before its workers have begun.
        score: The last one, for people; empty without any.
        changed: When its event log was last written, in Unix seconds.
        note: Why it failed, or which other machine drives it; else empty.
    """

    state: str
    step: int
    total_steps: int | None
    score: str
    changed: float
    note: str = ""


def standing_of(run_dir: RunDir) -> Standing:
    """How the run in a directory stands now."""
    last: list[tuple[int, Event]] = []
    with _bytes_of(run_dir.journal) as content:
        for kind in (*_STEPS, Failed):
            last += itertools.islice(_backwards(content, kind), 1)
    events = [event for _, event in sorted(last, key=lambda found: found[0])]
    start = next((event for event in events if isinstance(event, Start)), None)
    # Of the ends of earlier attempts, which are written before the last start, none counts.
    ends = [event for event in events if isinstance(event, Start | Finished | Stopped | Failed)]
    end = ends[-1] if ends else None
    step = max((event.step for event in events if isinstance(event, _STEPS)), default=0)
    state, note = _state(run_dir, end)
    return Standing(
        state=state,
        step=end.step if isinstance(end, Stopped | Finished) else step,
        total_steps=None if start is None else start.total_steps,
        score=_last_score(run_dir),
        changed=max((event.time for event in events), default=run_dir.recipe.stat().st_mtime),
        note=note,
    )


def newest_checkpoint(run_dir: RunDir) -> str:
    """The checkpoint that the event log told of last; empty before the first."""
    with _bytes_of(run_dir.journal) as content:
        found = next(_backwards(content, CheckpointPublished), None)
    return found[1].path if found is not None and isinstance(found[1], CheckpointPublished) else ""


def score_text(event: Evaluated) -> str:
    """The headline of an evaluation: `knn/photos/top1 34.0 % (step 200)`."""
    headline = event.headline
    score = format_value(event.metrics[headline.name], headline.unit)
    return f"{event.task}/{headline.name} {score} (step {event.step})"


def _state(run_dir: RunDir, end: Event | None) -> tuple[str, str]:
    if holder := drives_elsewhere(run_dir):
        return "running", f"driven by {holder}"
    if is_held(run_dir.driver_lock):
        return ("stopping" if run_dir.stop_request.exists() else "running"), ""
    match end:
        case Finished():
            return "finished", ""
        case Stopped():
            return "stopped", ""
        case Failed(error=error):
            return "failed", error
    if run_dir.stop_now_request.exists():
        return "stopped", "at once, without a checkpoint of its last steps"
    if not run_dir.journal.exists():
        return "stopped", "before it began"
    return "failed", "its processes ended without a word: killed, or the machine went down"


def _last_score(run_dir: RunDir) -> str:
    with _bytes_of(run_dir.evaluations) as content:
        scores = (event for _, event in _backwards(content, Evaluated) if isinstance(event, Evaluated))
        event = next(scores, None)
    return "" if event is None else score_text(event)


class _bytes_of:
    """The content of a file that may be large, or missing, without reading all of it."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> mmap.mmap | bytes:
        self._mapped: mmap.mmap | None = None
        try:
            with self._path.open("rb") as file:
                self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # none yet, or nothing in it
            return b""
        return self._mapped

    def __exit__(self, *error: object) -> None:
        if self._mapped is not None:
            self._mapped.close()


def _backwards(content: mmap.mmap | bytes, kind: type[Event]) -> Iterator[tuple[int, Event]]:
    """The whole events of a kind with their places in the file, the last one first; damaged ones are left out."""
    mark, end = f'"kind": "{kind.kind}"'.encode(), len(content)  # quotes inside a text are written with a backslash
    while (at := content.rfind(mark, 0, end)) >= 0:
        begin = content.rfind(b"\n", 0, at) + 1
        close = content.find(b"\n", at)
        end = begin
        if close < 0:
            continue  # still being written
        try:
            event = Line(content[begin:close], close + 1).event()
        except DamagedEvent:
            continue
        if event is not None:
            yield begin, event
