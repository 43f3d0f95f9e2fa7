"""`report.html`: one self-contained page about a run, from nothing but what the run wrote to its directory.

It can be made at any time, also of a run that is still going on or has failed. Scores are fractions shown as percent; a
score that is missing is shown as missing. The random backbone (step 0) is the floor in every chart and table.

Not here: comparing runs (`pretrain leaderboard`), the curves of a live run (MLflow).
"""

from __future__ import annotations

import base64
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pretrain.checkpoints.references import best_step
from pretrain.checkpoints.store import published
from pretrain.errors import RequestError
from pretrain.record.journal import read_journal

__all__ = ["write_report"]

TEMPLATES = Path(__file__).parent / "templates"
MAX_PICTURES = 6
CI_SUFFIXES = ("_ci_low", "_ci_high")


@dataclass(frozen=True)
class Score:
    """One metric of one checkpoint; `low` and `high` are NaN where no interval is known."""

    value: float
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Task:
    """A protocol on a data set: its headline metric (the first it reports) by step, and the steps where it failed."""

    name: str
    metric: str
    scores: Mapping[int, Score]
    errors: Mapping[int, str]


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.html` and return its path.

    Raises:
        RequestError: The directory is not a run.
    """
    import jinja2

    run_dir = Path(run_dir)
    if not (run_dir / "recipe.yaml").is_file():
        raise RequestError(f"{run_dir}: not a run directory; expected runs/RUN_ID with recipe.yaml in it")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = _percent
    page = environment.get_template("report.html").render(_contents(run_dir))
    aside = run_dir / ".report.html.tmp"
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, run_dir / "report.html")
    return run_dir / "report.html"


def _contents(run_dir: Path) -> dict[str, Any]:
    recipe_yaml = (run_dir / "recipe.yaml").read_text(encoding="utf-8")
    recipe = yaml.safe_load(recipe_yaml)
    journal, _ = read_journal(run_dir / "journal.jsonl")
    evaluations, _ = read_journal(run_dir / "evaluations.jsonl")
    training = _by_step(journal)
    tasks = _tasks(evaluations)
    return {
        "run_id": run_dir.name,
        "recipe": recipe,
        "recipe_yaml": recipe_yaml,
        "status": _status(journal),
        "error": next((str(r["error"]) for r in reversed(journal) if r["kind"] == "failed"), ""),
        "facts": _facts(recipe, journal, training),
        "tiles": _tiles(training, tasks),
        "diverged": next((s for s, v in training.items() if not math.isfinite(v.get("loss", 0.0))), None),
        "training_charts": _training_charts(training),
        "score_charts": _score_charts(tasks),
        "tasks": tasks,
        "rows": _rows(run_dir, tasks),
        "details": _details(evaluations),
        "pictures": _pictures(run_dir, journal),
        "versions": _versions(run_dir),
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


# Reading --------------------------------------------------------------------------------------------------------------


def _by_step(journal: Iterable[dict[str, Any]]) -> dict[int, dict[str, float]]:
    """Step -> metrics in order of steps; of a step that was repeated after a restart, the last time counts."""
    found: dict[int, dict[str, float]] = {}
    for record in journal:
        if record["kind"] == "metrics":
            found[record["step"]] = record["values"]
    return dict(sorted(found.items()))


def _tasks(evaluations: Iterable[dict[str, Any]]) -> list[Task]:
    tasks: dict[str, Task] = {}
    for record in evaluations:
        name, step = f"{record['protocol']}/{record['data']}", record["step"]
        if "metrics" not in record:
            known = tasks.get(name, Task(name, "", {}, {}))
            tasks[name] = Task(name, known.metric, known.scores, {**known.errors, step: str(record.get("error"))})
            continue
        known = tasks.get(name, Task(name, "", {}, {}))
        metric = known.metric or next(iter(record["metrics"]))
        errors = {failed: text for failed, text in known.errors.items() if failed != step}  # it worked in the end
        tasks[name] = Task(name, metric, {**known.scores, step: _score(record["metrics"], metric)}, errors)
    return list(tasks.values())


def _score(metrics: Mapping[str, float], metric: str) -> Score:
    low, high = (metrics.get(metric + suffix, math.nan) for suffix in CI_SUFFIXES)
    return Score(metrics.get(metric, math.nan), low, high)


def _status(journal: Sequence[dict[str, Any]]) -> str:
    ends = [r["kind"] for r in journal if r["kind"] in ("start", "resumed", "finished", "failed")]
    return ends[-1] if ends and ends[-1] in ("finished", "failed") else "not finished"


def _versions(run_dir: Path) -> dict[str, str]:
    """Library versions, as the newest checkpoint recorded them."""
    checkpoints = published(run_dir)
    if not checkpoints:
        return {}
    versions: dict[str, str] = json.loads((checkpoints[-1].path / "checkpoint.json").read_text())["versions"]
    return versions


def _pictures(run_dir: Path, journal: Iterable[dict[str, Any]]) -> list[tuple[int, str]]:
    """(step, PNG data URI) of the first, the last and some pictures between."""
    paths = {r["step"]: run_dir / r["path"] for r in journal if r["kind"] == "pictures"}
    steps = [step for step in sorted(paths) if paths[step].is_file()]
    if len(steps) > MAX_PICTURES:
        steps = [steps[round(i * (len(steps) - 1) / (MAX_PICTURES - 1))] for i in range(MAX_PICTURES)]
    return [(s, f"data:image/png;base64,{base64.b64encode(paths[s].read_bytes()).decode()}") for s in steps]


# Saying ---------------------------------------------------------------------------------------------------------------


def _facts(
    recipe: dict[str, Any], journal: Sequence[dict[str, Any]], training: Mapping[int, Mapping[str, float]]
) -> list[tuple[str, str]]:
    """What the run is, for the head of the page."""
    train = recipe["train"]
    facts = [
        ("objective", str(recipe["objective"]["name"])),
        ("backbone", str(recipe["backbone"]["name"])),
        ("data", recipe["data"]["train"] or ", ".join(part["name"] for part in recipe["data"]["mixture"])),
        ("steps", f"{max(training, default=0)} of {train['steps']}"),
        ("batch", f"{train['global_batch_size']} images, {train['workers']} workers, ZeRO {train['zero_stage']}"),
        ("precision", str(train["precision"])),
        ("seed", str(train["seed"])),
    ]
    if journal:
        began, ended = journal[0]["time"], journal[-1]["time"]
        facts.append(("started", time.strftime("%Y-%m-%d %H:%M", time.localtime(began))))
        facts.append(("wall time", _duration(ended - began)))
    if resumed := sum(record["kind"] == "resumed" for record in journal):
        facts.append(("resumed", f"{resumed} x"))
    facts += [("warning", f"step {r['step']}: {r['text']}") for r in journal if r["kind"] == "warning"][-8:]
    return facts


def _tiles(training: Mapping[int, Mapping[str, float]], tasks: Sequence[Task]) -> list[tuple[str, str, str]]:
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
        remark = f"{(last - floor.value) * 100:+.1f} points over random" if floor else f"step {max(trained)}"
        tiles.append((f"{task.name} {task.metric}", _percent(last), remark))
    rates = [values["images_per_s"] for values in training.values() if "images_per_s" in values]
    if rates:
        tiles.append(("images/s", f"{median(rates):.0f}", "median"))
    return tiles


def _training_charts(training: Mapping[int, Mapping[str, float]]) -> list[tuple[str, str]]:
    """(title, image) of the training metrics worth a look; the rest is in MLflow."""
    from pretrain.reporting.charts import Curve, line_chart

    titles = {"loss": "Loss", "lr": "Learning rate", "grad_norm": "Gradient norm", "images_per_s": "Images per second"}
    charts = []
    for name, title in titles.items():
        steps = [step for step, values in training.items() if name in values]
        if steps:
            charts.append((title, line_chart(title, Curve(steps, [training[step][name] for step in steps]))))
    return charts


def _score_charts(tasks: Iterable[Task]) -> list[tuple[str, str]]:
    from pretrain.reporting.charts import Curve, score_chart

    charts = []
    for task in tasks:
        steps = sorted(step for step in task.scores if step > 0)
        if not steps:
            continue
        scores = [task.scores[step] for step in steps]
        has_interval = any(math.isfinite(score.low) for score in scores)
        curve = Curve(
            steps,
            [score.value for score in scores],
            [score.low for score in scores] if has_interval else (),
            [score.high for score in scores] if has_interval else (),
        )
        title = f"{task.name} {task.metric}"
        charts.append((title, score_chart(title, curve, task.scores[0].value if 0 in task.scores else None)))
    return charts


def _rows(run_dir: Path, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """One row per checkpoint that was published or graded: step, remarks, and a score, an error or None per task."""
    on_disk = {found.step for found in published(run_dir)}
    graded = {step for task in tasks for step in (*task.scores, *task.errors)}
    best = best_step(run_dir)
    rows = []
    for step in sorted(on_disk | graded):
        remarks = ["random backbone"] if step == 0 else []
        remarks += ["best"] if step == best else []
        remarks += ["deleted"] if step not in on_disk else []
        cells = [(task.scores.get(step), task.errors.get(step)) for task in tasks]
        rows.append({"step": step, "remarks": remarks, "cells": cells})
    return rows


def _details(evaluations: Iterable[dict[str, Any]]) -> list[tuple[int, str, str, str]]:
    """(step, task, metric, value) of everything that was measured, intervals aside."""
    return [
        (record["step"], f"{record['protocol']}/{record['data']}", name, _percent(value))
        for record in sorted(evaluations, key=lambda record: record["step"])
        for name, value in record.get("metrics", {}).items()
        if not name.endswith(CI_SUFFIXES)
    ]


def _percent(fraction: float) -> str:
    return f"{fraction:.1%}" if math.isfinite(fraction) else str(fraction)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
