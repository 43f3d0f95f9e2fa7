"""`report.html`: one self-contained page about a run, from what it wrote to its directory and the results beside it.

It can be made at any time, also of a run that is still going on or has failed. Scores have the units of their metrics;
one that is missing is shown as missing. The random backbone (step 0) is in every chart and table.

Not here: comparing runs (`pretrain leaderboard`), the curves of a live run (MLflow).
"""

from __future__ import annotations

import base64
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from yaml import YAMLError

from data_pipelines.files import write_atomically
from evaluation.protocol import CI_SUFFIXES, FRACTION, Metric, floors, format_value
from pretrain.checkpoints.references import best_step
from pretrain.checkpoints.store import CheckpointError, published
from pretrain.comparisons import worth_of
from pretrain.config.stages import written_stages
from pretrain.config.values import first_line, parse_yaml
from pretrain.errors import RequestError, said_by_system
from pretrain.record.events import (
    Evaluated,
    EvaluationFailed,
    Event,
    Failed,
    Finished,
    Metrics,
    Resumed,
    Start,
    Stopped,
    Taught,
    Visualizations,
    Warned,
)
from pretrain.record.journal import read_events
from pretrain.record.pictures import CAPTION, ROWS, text_of
from pretrain.record.run_dir import RECIPE, RunDir
from pretrain.reporting.data_section import UNKNOWN, data_name, evaluated_on, seen_words, setting_of, sources

if TYPE_CHECKING:
    import jinja2

__all__ = ["TEMPLATES", "environment", "write_report"]

log = logging.getLogger(__name__)

TEMPLATES, TEMPLATE = Path(__file__).parent / "templates", "page.html"
MAX_IMAGES = 6
MAX_WARNINGS = 12
# Of each kind of picture of a checkpoint (`evaluation.pictures`), those of results without the name of the protocol in
# front: its title, and what is to be seen.
PICTURES = {
    "tokens": (
        "What patch features look like",
        "Rows, from above: test images; principal components of all patches as red, green and blue; how alike patches "
        "are to the one in the middle, marked in red, and to the one least like it, in each map from its lowest "
        "cosine (violet) to its highest (yellow), see the caption; where the class token looks, if there is one. "
        "Parts of objects are good, blotches are not.",
    ),
    "clouds": (
        "What the tokens of clouds look like",
        "Test clouds, two views of each. Rows, from above: the points, near ones brighter; principal components of all "
        "tokens as red, green and blue, on the points nearest to each token; how alike tokens are to the first one, "
        "which is marked in red, and to the one least like it, in each cloud from its lowest cosine (violet) to its "
        "highest (yellow), which the caption says. The same parts in the same colors are good.",
    ),
    "slices": (
        "What the tokens of volumes look like",
        "Test volumes, the middle slices across each axis. Rows, from above: the voxels; principal components of all "
        "tokens as red, green and blue; how alike tokens are to the one in the middle, which is marked in red, and to "
        "the one least like it, in each volume from its lowest cosine (violet) to its highest (yellow), which the "
        "caption says. Padding is black. The same tissue in the same color is good.",
    ),
    "confusion": (
        "What is taken for what",
        "Rows are the true classes, columns the predicted ones, in the order of the data. The darker, the larger is "
        "the share of the test samples of the row, which numbers give in percent; classes without samples are gray.",
    ),
    "neighbors": (
        "Nearest training images",
        "Left: test images. Right of each: the training images with the most similar features, the nearest first; "
        "those of the same class have a green frame, others a red one.",
    ),
    "maps": (
        "Where classes are seen",
        "Rows, from above: test images, truth, prediction, and errors in red. Where labels are ignored, truth has no "
        "color and errors are black.",
    ),
}


@dataclass(frozen=True)
class Score:
    """One metric of one checkpoint; `low` and `high` are NaN where no interval is known."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass
class Task:
    """A protocol on a data set: its headline metric by step, and the steps where it failed; None if it always did.

    `others` are its other metrics but bounds of intervals.
    """

    name: str
    metric: Metric | None = None
    scores: dict[int, Score] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    others: dict[Metric, dict[int, Score]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """`PROTOCOL/DATA METRIC`."""
        return f"{self.name} {self.metric.name if self.metric else ''}"

    @property
    def measured(self) -> list[Metric]:
        """The headline and the others."""
        return [*([self.metric] if self.metric else []), *self.others]

    @property
    def unit(self) -> str:
        return self.metric.unit if self.metric else ""


def write_report(run_dir: Path) -> Path:
    """Write the page into the run directory and return its path.

    Raises:
        RequestError: The directory is not a run.
    """
    run = RunDir(Path(run_dir))
    if not run.is_run:
        raise RequestError(f"{run.path}: not a run directory; expected runs/RUN_ID with {RECIPE} in it")
    page = environment().get_template(TEMPLATE).render(_contents(run))
    write_atomically(run.report, page.encode())
    return run.report


def environment() -> jinja2.Environment:
    """Where pages are made from templates: nothing that runs have written becomes markup."""
    import jinja2

    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    made.filters["score"] = format_value
    return made


def _contents(run: RunDir) -> dict[str, Any]:
    recipe_yaml, stages, damaged = _recipe(run)
    if damaged:
        log.warning("%s", damaged)
    recipe = stages[-1]
    events, evaluations = _events(run.journal), _events(run.evaluations)
    training = _by_step(events)
    tasks, start = _tasks(evaluations), _start(stages[0])
    return {
        "run_id": run.run_id,
        "description": recipe.get("description") or "",
        "recipe_yaml": recipe_yaml,
        "status": _status(events),
        "error": next((event.error for event in reversed(events) if isinstance(event, Failed)), "") or damaged,
        "facts": _facts(stages, events, evaluations, training),
        "tiles": _tiles(training, tasks, start),
        "diverged": next((s for s, v in training.items() if not math.isfinite(v.get("loss", 0.0))), None),
        "training_charts": _training_charts(training),
        "score_charts": _score_charts(tasks, start),
        "other_charts": _other_charts(tasks, start),
        "findings": [*_shortcomings(run, evaluations), *_findings(training, [*events, *evaluations])],
        "tasks": tasks,
        "rows": _rows(run, tasks, start),
        "details": _details(evaluations),
        "sources": sources(run, stages, events, training),
        "seen_words": seen_words(recipe, training),
        "evaluated_on": evaluated_on(evaluations),
        "visualizations": _visualizations(run, events),
        "pictures": _pictures(run, [*events, *evaluations]),
        "versions": _versions(run),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# Reading --------------------------------------------------------------------------------------------------------------


def _recipe(run: RunDir) -> tuple[str, list[dict[str, Any]], str]:
    """The recipe of a run, as it stands there and by stages, and what is wrong with it: the page does without it."""
    text = ""
    try:
        text = run.recipe.read_text(encoding="utf-8")
        stages = written_stages(parse_yaml(text))
    except (OSError, ValueError, YAMLError) as error:
        return text, [{}], f"{run.recipe} is damaged: {first_line(error)}"
    return text, stages, ""


def _events(path: Path) -> list[Event]:
    try:
        return read_events(path)[0]
    except OSError as error:
        log.warning("%s", said_by_system(error))
        return []


def _by_step(events: Iterable[Event]) -> dict[int, Mapping[str, float]]:
    """Step -> metrics in order of steps; of a step that was repeated after a restart, the last time counts."""
    return dict(sorted({event.step: event.values for event in events if isinstance(event, Metrics)}.items()))


def _tasks(evaluations: Iterable[Event]) -> list[Task]:
    tasks: dict[str, Task] = {}
    for event in evaluations:
        if not isinstance(event, Evaluated | EvaluationFailed) or (
            isinstance(event, EvaluationFailed) and event.left_out
        ):
            continue
        task = tasks.setdefault(event.task, Task(event.task))
        if isinstance(event, EvaluationFailed):
            task.errors[event.step] = event.error
        else:
            task.metric = task.metric or event.headline
            task.scores[event.step] = _score(event.metrics, task.metric.name)
            for metric in event.reported:
                if metric.name != task.metric.name and not metric.name.endswith(CI_SUFFIXES):
                    task.others.setdefault(metric, {})[event.step] = _score(event.metrics, metric.name)
            task.errors.pop(event.step, None)  # repaired later
    return list(tasks.values())


def _score(metrics: Mapping[str, float], metric: str) -> Score:
    low, high = (metrics.get(metric + suffix, math.nan) for suffix in CI_SUFFIXES)
    return Score(metrics.get(metric, math.nan), low, high)


def _status(events: Sequence[Event]) -> str:
    ends = [event for event in events if isinstance(event, Start | Resumed | Finished | Stopped | Failed)]
    return ends[-1].kind if ends and isinstance(ends[-1], Finished | Stopped | Failed) else "not finished"


def _versions(run: RunDir) -> dict[str, str]:
    """Library versions, as the newest checkpoint recorded them."""
    checkpoints = published(run.path)
    if not checkpoints:
        return {}
    try:
        return dict(checkpoints[-1].manifest()["versions"])
    except (CheckpointError, KeyError):  # a damaged checkpoint is refused by whoever uses it; the page does without
        return {}


def _visualizations(run: RunDir, events: Iterable[Event]) -> list[tuple[int, str, str]]:
    """(step, PNG data URI, names of rows) of the first, the last and some images between that the objective made."""
    paths = _files_of(run, events).get(("", ""), {})
    steps = list(paths)
    if len(steps) > MAX_IMAGES:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_IMAGES - 1))] for i in range(MAX_IMAGES)]
    return [(step, _png_uri(paths[step]), text_of(paths[step], ROWS)) for step in steps]


def _pictures(run: RunDir, events: Iterable[Event]) -> list[tuple[str, str, list[tuple[int, str, str]]]]:
    """(title, what is to be seen, [(step, PNG data URI, caption)]) of each kind and data set: first and newest."""
    found = []
    for (data, shows), paths in sorted(_files_of(run, events).items()):
        protocol, _, kind = shows.rpartition("_")
        if kind in PICTURES:
            title, words = PICTURES[kind]
            of = f"{data}, {protocol}" if protocol else data
            shown = [(step, paths[step]) for step in sorted({min(paths), max(paths)})]
            images = [(step, _png_uri(path), text_of(path, CAPTION)) for step, path in shown]
            found.append((f"{title}: {of}", words, images))
    return found


def _files_of(run: RunDir, events: Iterable[Event]) -> dict[tuple[str, str], dict[int, Path]]:
    """(data, kind) of pictures -> step -> file, in order of steps; of files that are not there nothing."""
    found: dict[tuple[str, str], dict[int, Path]] = {}
    for event in events:
        if isinstance(event, Visualizations):
            with suppress(ValueError):  # it names a file of another place
                if (path := run.inside(event.path)).is_file():
                    found.setdefault((event.data, event.shows), {})[event.step] = path
    return {about: dict(sorted(paths.items())) for about, paths in found.items()}


def _png_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


# Saying ---------------------------------------------------------------------------------------------------------------


def _facts(
    stages: Sequence[dict[str, Any]],
    events: Sequence[Event],
    evaluations: Sequence[Event],
    training: Mapping[int, Mapping[str, float]],
) -> list[tuple[str, str]]:
    """What the run is, for the head of the page; of several stages the last, and their names."""
    recipe = stages[-1]
    steps = [setting_of(stage, "train.steps") for stage in stages]
    total = sum(number for number in steps if isinstance(number, int))
    size, workers, zero_stage = (
        setting_of(recipe, f"train.{key}") for key in ("global_batch_size", "workers", "zero_stage")
    )
    facts = [
        ("objective", str(setting_of(recipe, "objective.name"))),
        ("backbone", str(setting_of(recipe, "backbone.name"))),
        ("data", data_name(recipe)),
        ("steps", f"{max(training, default=0)} of {total or UNKNOWN}"),
        ("batch", f"{size} samples, {workers} workers, ZeRO {zero_stage}"),
        ("precision", str(setting_of(recipe, "train.precision"))),
        ("seed", str(setting_of(recipe, "train.seed"))),
    ]
    if len(stages) > 1:
        names = [setting_of(stage, "stage") for stage in stages]
        facts.append(("stages", ", ".join(f"{name} ({n} steps)" for name, n in zip(names, steps, strict=True))))
    if events:
        began, ended = events[0].time, events[-1].time
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M", time.localtime(began))))
        facts.append(("wall time", _duration(ended - began)))
        late = evaluations[-1].time - ended if evaluations else 0.0
        if computed := sum(event.seconds for event in evaluations if isinstance(event, Evaluated) and not event.cached):
            has_ended = isinstance(events[-1], Finished | Stopped | Failed)
            after = f"; the last ended {_duration(late)} after training" if has_ended and late > 0 else ""
            facts.append(("evaluations", f"{_duration(computed)} in all{after}"))
    if resumed := sum(isinstance(event, Resumed) for event in events):
        facts.append(("resumed", f"{resumed} x"))
    taught = {event.stage: event.teacher for event in events if isinstance(event, Taught)}
    facts += [(f"teacher of {stage}" if stage else "teacher", teacher) for stage, teacher in taught.items()]
    return facts


def _shortcomings(run: RunDir, evaluations: Iterable[Event]) -> list[str]:
    """What speaks against the last checkpoint that has scores: the closing table of the run warns of the same."""
    scores = [event for event in evaluations if isinstance(event, Evaluated)]
    return [line for worth in worth_of(scores, run.path.parent).values() for line in worth.shortcomings]


def _findings(training: Mapping[int, Mapping[str, float]], events: Sequence[Event]) -> list[str]:
    """What a person should know: the newest warnings, of training and of evaluations, and what was left out."""
    warnings = sorted((event for event in events if isinstance(event, Warned)), key=lambda event: event.time)
    findings = [f"step {warning.step}: {warning.text}" for warning in warnings[-MAX_WARNINGS:]]
    dropped = max((values.get("corrupt_samples", 0.0) for values in training.values()), default=0.0)
    if dropped:
        findings.append(f"{dropped:.0f} samples could not be read and were left out")
    left_out = {event.task: event.error for event in events if isinstance(event, EvaluationFailed) and event.left_out}
    return findings + [f"{task} is left out of its suite: {reason}" for task, reason in left_out.items()]


def _tiles(
    training: Mapping[int, Mapping[str, float]], tasks: Sequence[Task], start: str
) -> list[tuple[str, str, str]]:
    """(label, number, remark) of what one wants to know first."""
    tiles = []
    losses = [values["loss"] for values in training.values() if "loss" in values]
    if losses:
        tiles.append(("loss", f"{losses[-1]:.4g}", f"from {losses[0]:.4g}"))
    for task in tasks:
        trained = {step: score for step, score in task.scores.items() if step > 0}
        if not trained:
            continue
        last, floor = trained[max(trained)].value, task.scores.get(0)
        change = last - floor.value if floor else math.nan
        remark = _change(change, task.unit, start) if math.isfinite(change) else f"step {max(trained)}"
        tiles.append((task.title, format_value(last, task.unit), remark))
    rates = [values["samples_per_s"] for values in training.values() if "samples_per_s" in values]
    if rates:
        tiles.append(("samples/s", f"{median(rates):.0f}", "median"))
    return tiles


def _training_charts(training: Mapping[int, Mapping[str, float]]) -> list[tuple[str, str]]:
    """(title, image) of the training metrics worth a look; the rest is in MLflow."""
    from pretrain.reporting.charts import Curve, line_chart

    titles = {
        "loss": "Loss",
        "lr": "Learning rate",
        "grad_norm": "Gradient norm",
        "samples_per_s": "Samples per second",
    }
    charts = []
    for name, title in titles.items():
        steps = [step for step, values in training.items() if name in values]
        if steps:
            charts.append((title, line_chart(title, Curve(steps, [training[step][name] for step in steps]))))
    return charts


def _score_charts(tasks: Iterable[Task], start: str) -> list[tuple[str, str]]:
    """(title, image) of the headline of each task."""
    return [
        (task.title, chart)
        for task in tasks
        if task.metric is not None and (chart := _score_chart(task, task.metric, task.scores, start))
    ]


def _other_charts(tasks: Iterable[Task], start: str) -> list[tuple[str, str]]:
    """(title, image) of every score that is no headline; what is the same for all backbones is a line of others."""
    charts = []
    for task in tasks:
        lines = {name for metric in task.measured for name in floors(metric, task.others)}
        for metric, scores in task.others.items():
            if metric.name not in lines and (chart := _score_chart(task, metric, scores, start)):
                charts.append((f"{task.name} {metric.name}", chart))
    return charts


def _score_chart(task: Task, metric: Metric, scores: Mapping[int, Score], start: str) -> str:
    """A score of all checkpoints, beside that of the first weights and, where they were recorded, other floors."""
    from pretrain.reporting.charts import Curve, score_chart

    steps = sorted(step for step in scores if step > 0)
    if not steps:
        return ""
    trained = [scores[step] for step in steps]
    has_interval = any(math.isfinite(score.low) for score in trained)
    curve = Curve(
        steps,
        [score.value for score in trained],
        [score.low for score in trained] if has_interval else (),
        [score.high for score in trained] if has_interval else (),
    )
    lines = {start: scores[0].value} if 0 in scores else {}
    of_others = {other.name: found[max(found)].value for other, found in task.others.items()}
    lines |= {called: of_others[name] for name, called in floors(metric, task.others).items()}
    return score_chart(f"{task.name} {metric.name}", curve, lines, metric.unit)


def _start(recipe: dict[str, Any]) -> str:
    """What the scores of step 0 are of."""
    return "initial backbone" if recipe.get("init_from") else "random backbone"


def _rows(run: RunDir, tasks: Sequence[Task], start: str) -> list[dict[str, Any]]:
    """One row per checkpoint that was published or evaluated: step, remarks, and a score, an error or None per task."""
    on_disk = {found.step for found in published(run.path)}
    evaluated = {step for task in tasks for step in (*task.scores, *task.errors)}
    try:
        best = best_step(run.path)
    except (RequestError, OSError):  # the recipe is damaged, which the page says
        best = None
    rows = []
    for step in sorted(on_disk | evaluated):
        remarks = [start] if step == 0 else []
        remarks += ["best"] if step == best else []
        remarks += ["deleted"] if step not in on_disk else []
        cells = [(task.scores.get(step), task.errors.get(step), task.unit) for task in tasks]
        rows.append({"step": step, "remarks": remarks, "cells": cells})
    return rows


def _details(evaluations: Iterable[Event]) -> list[tuple[int, str, str, str]]:
    """(step, task, metric, value) of everything that was measured, intervals aside."""
    evaluated = [event for event in evaluations if isinstance(event, Evaluated)]
    return [
        (event.step, event.task, metric.name, format_value(event.metrics[metric.name], metric.unit))
        for event in sorted(evaluated, key=lambda event: event.step)
        for metric in event.reported
        if not metric.name.endswith(CI_SUFFIXES)
    ]


def _change(difference: float, unit: str, start: str) -> str:
    """How far a score has moved: "3.2 points above the random backbone", "0.12 m below the initial backbone"."""
    size = f"{abs(difference) * 100:.1f} points" if unit == FRACTION else f"{abs(difference):.4g} {unit}".rstrip()
    return f"{size} {'below' if difference < 0 else 'above'} the {start}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
