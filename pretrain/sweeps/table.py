"""What the runs of a sweep achieved, side by side: read from their events, for the terminal and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evaluation.protocol import CI_SUFFIXES, Metric, format_value
from pretrain.record.events import Evaluated, Metrics
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir
from pretrain.sweeps.queue import Job

__all__ = ["Row", "read_rows", "shown", "table_csv"]


@dataclass(frozen=True)
class Row:
    """One point.

    Attributes:
        job: The point, its state and run.
        step: Of the last metrics; None where there are none.
        loss: Of that step.
        scores: Headline of the newest trained checkpoint by `PROTOCOL/DATA METRIC`.
    """

    job: Job
    step: int | None
    loss: float | None
    scores: dict[str, Score]


@dataclass(frozen=True)
class Score:
    """A headline.

    Attributes:
        metric: What it means.
        interval: For people; empty where none was recorded.
        low, high: Bounds of the interval; None where none was recorded.
    """

    step: int
    value: float
    metric: Metric
    interval: str
    low: float | None
    high: float | None


def read_rows(jobs: Sequence[Job], storage: Path) -> list[Row]:
    """In the order of the grid."""
    return [_row(job, storage) for job in jobs]


def shown(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells for people. The runs' best score of each task has a star."""
    keys, tasks = _keys(rows), _tasks(rows)
    best = {task: _best(rows, task) for task in tasks}
    cells = [
        [
            *(row.job.point.chosen[key] for key in keys),
            row.job.state,
            "" if row.step is None else str(row.step),
            "" if row.loss is None else f"{row.loss:.4f}",
            *(_cell(row.scores.get(task), is_best=best[task] is row) for task in tasks),
            row.job.run_id or "",
        ]
        for row in rows
    ]
    return [*keys, "state", "step", "loss", *tasks, "run"], cells


def table_csv(rows: Sequence[Row]) -> str:
    """The same with plain numbers, the steps of the scores and the bounds of their intervals."""
    keys, tasks = _keys(rows), _tasks(rows)
    parts = ("", " step", " low", " high")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*keys, "state", "step", "loss", *(f"{task}{part}" for task in tasks for part in parts), "run"])
    for row in rows:
        found = [row.scores.get(task) for task in tasks]
        numbers = [(score.value, score.step, score.low, score.high) if score else (None,) * 4 for score in found]
        chosen = [row.job.point.chosen[key] for key in keys]
        facts = [row.job.state, row.step, row.loss, *(number for four in numbers for number in four), row.job.run_id]
        writer.writerow([*chosen, *("" if fact is None else fact for fact in facts)])
    return text.getvalue()


def _row(job: Job, storage: Path) -> Row:
    last: Metrics | None = None
    scores: dict[str, Score] = {}
    if job.run_id is not None:
        run = RunDir(storage / job.run_id)
        for event in read_events(run.journal)[0]:
            if isinstance(event, Metrics) and "loss" in event.values:
                last = event
        for event in read_events(run.evaluations)[0]:
            if isinstance(event, Evaluated) and event.step > 0:
                task = f"{event.task} {event.headline.name}"
                if task not in scores or event.step >= scores[task].step:
                    scores[task] = _score(event)
    return Row(job, last.step if last else None, float(last.values["loss"]) if last else None, scores)


def _score(event: Evaluated) -> Score:
    headline = event.headline
    low, high = (event.metrics.get(headline.name + suffix) for suffix in CI_SUFFIXES)
    return Score(event.step, event.metrics[headline.name], headline, event.interval, low, high)


def _best(rows: Sequence[Row], task: str) -> Row | None:
    """Whose score of a task is best; None where there is nothing to compare."""
    from evaluation.protocol import best

    scores = {row.job.point.number: row.scores[task].value for row in rows if task in row.scores}
    if len(scores) < 2:
        return None
    metric = next(row.scores[task].metric for row in rows if task in row.scores)
    number = best(scores, metric)
    return next((row for row in rows if row.job.point.number == number), None)


def _cell(score: Score | None, *, is_best: bool) -> str:
    if score is None:
        return ""
    value = format_value(score.value, score.metric.unit)
    return f"{value}{' *' * is_best}" + (f" ({score.interval})" if score.interval else "")


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(rows[0].job.point.chosen)


def _tasks(rows: Sequence[Row]) -> list[str]:
    return sorted({task for row in rows for task in row.scores})
