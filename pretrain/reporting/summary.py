"""The closing table of a run on the terminal, with the lines to try next."""

from __future__ import annotations

import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from data_pipelines.storage.locations import redact
from evaluation.protocol import format_value
from pretrain.comparisons import format_difference, on_same_data, over, scores_of_teacher, worth_of
from pretrain.config.schema import EvaluationTask, Recipe
from pretrain.record.events import Evaluated, EvaluationFailed, Event, Metrics, Start
from pretrain.record.journal import read_events
from pretrain.record.run_dir import RunDir, shown_run
from pretrain.remote.places import shown_storage
from pretrain.reporting.terminal import duration

__all__ = ["TrainingSoFar", "print_summary"]


@dataclass
class TrainingSoFar:
    """What the closing table says of training. The events themselves would not fit: a long run logs a million times."""

    first: Metrics | None = None
    last: Metrics | None = None
    rates: array[float] = field(default_factory=lambda: array("d"))  # samples per second, of each logged step
    launched: float = 0.0  # Unix seconds; when the command began
    began: float | None = None  # when workers first began to train after that
    ended: float = 0.0  # when they last wrote something

    def add(self, event: Event) -> None:
        """Take in the next event of the run."""
        if isinstance(event, Metrics):
            self.first, self.last = self.first or event, event
            self.rates.append(event.values["samples_per_s"])
        if isinstance(event, Start) and self.began is None and event.time >= self.launched:
            self.began = event.time
        self.ended = event.time

    def times(self, now: float, *, with_evaluations: bool) -> str:
        """Where the time of this command went, for people; empty where it did not train."""
        if self.began is None:
            return ""
        parts = [f"start {duration(self.began - self.launched)}", f"training {duration(self.ended - self.began)}"]
        return ", ".join([*parts, f"evaluations after it {duration(now - self.ended)}"] if with_evaluations else parts)


def print_summary(
    console: Console,
    recipe: Recipe,
    run_dir: Path,
    training: TrainingSoFar,
    evaluations: Sequence[Evaluated],
    report: Path,
) -> None:
    """Print what a run achieved.

    Args:
        console: Where to.
        recipe: Its recipe.
        run_dir: Its directory.
        training: What its events said.
        evaluations: The scores of its checkpoints.
        report: The HTML page.
    """
    table = Table(title=run_dir.name, title_justify="left")
    start = "random" if recipe.init_from is None else "initial"
    for column in ("", start, "first", "last"):
        table.add_column(column, justify="left" if not column else "right")
    if training.first and training.last:
        first, last = training.first, training.last
        table.add_row(
            "loss",
            "",
            f"{first.values['loss']:.4f} (step {first.step})",
            f"{last.values['loss']:.4f} (step {last.step})",
        )
    of_last = worth_of(evaluations, Path(recipe.storage))
    tasks = recipe.evaluation.tasks if recipe.evaluation.enabled else ()
    worths = {name: of_last[name] for name in map(_name, tasks) if name in of_last}
    ended = [event for event in read_events(RunDir(run_dir).evaluations)[0] if isinstance(event, EvaluationFailed)]
    unscored = {event.task: "left out" if event.left_out else "failed" for event in ended}
    taught = [] if recipe.teacher_from is None else scores_of_teacher(recipe.teacher_from, Path(recipe.storage))
    for task in tasks:
        table.add_row(*_score_row(_name(task), evaluations, unscored))
        if (worth := worths.get(_name(task))) is not None:
            unit = worth.event.headline.unit
            if worth.gain is not None:
                table.add_row(f"  over {start}", "", "", format_difference(worth.gain, unit))
            for called, floor in worth.floors.items():
                table.add_row(f"  {called}", format_value(floor, unit), "", "")
            if (teacher := on_same_data(worth.event, taught)) is not None:
                score = format_value(teacher.metrics[teacher.headline.name], unit)
                table.add_row("  teacher", "", "", f"{score} (step {teacher.step})")
                if (difference := over(teacher, worth.event, Path(recipe.storage))) is not None:
                    table.add_row("  over teacher", "", "", format_difference(difference, unit))
    if training.rates:
        table.add_row("samples/s", "", "", f"{median(training.rates):.0f}")
    console.print(table, soft_wrap=False)
    if recipe.teacher_from is not None and not any(on_same_data(one.event, taught) for one in worths.values()):
        nothing = "no scores of the same data, by the run that it is of, to compare with"
        console.print(f"teacher     {recipe.teacher_from}: {nothing}", markup=False)
    for one in worths.values():
        for shortcoming in one.shortcomings:
            console.print(f"WARNING     {shortcoming}", markup=False)
    name = recipe.tracking.model_name or recipe.name
    storage = Path(recipe.storage)
    is_evaluated = bool(tasks)
    if times := training.times(time.time(), with_evaluations=is_evaluated):
        console.print(f"time        {times}", markup=False)
    console.print(f"run         {shown_run(RunDir(run_dir))}", markup=False)
    console.print(f"report      {report}", markup=False)
    console.print(f"MLflow      {_uri(storage)}", markup=False)
    place = "" if storage == Path("runs").absolute() else f" --storage {shown_storage(storage)}"
    console.print(f"try next    pretrain pull {name}@best ./{name}-backbone{place}", markup=False)
    console.print(f"            mlflow ui --backend-store-uri {_uri(storage)}", markup=False)


def _name(task: EvaluationTask) -> str:
    return f"{task.protocol}/{task.data}"


def _score_row(task: str, evaluations: Sequence[Evaluated], unscored: Mapping[str, str]) -> tuple[str, str, str, str]:
    """Headline metric of the random backbone, the first and the last evaluated checkpoint, with its intervals."""
    found = sorted((event for event in evaluations if event.task == task), key=lambda event: event.step)
    trained = [event for event in found if event.step > 0]
    if not found:
        return task, unscored.get(task, "not run"), "", ""
    headline = found[0].headline

    def cell(event: Evaluated, *, with_step: bool) -> str:
        score = format_value(event.metrics[headline.name], headline.unit)
        return "\n".join([f"{score} (step {event.step})" if with_step else score, *filter(None, [event.interval])])

    random = cell(found[0], with_step=False) if found[0].step == 0 else ""
    ends = (cell(trained[0], with_step=True), cell(trained[-1], with_step=True)) if trained else ("", "")
    counted = [f"n = {found[-1].num_test}"] if found[-1].num_test else []
    remarks = ["95 % CI"] * any(event.interval for event in found) + counted
    return "\n".join([f"{task} {headline.name}", *([", ".join(remarks)] if remarks else [])]), random, *ends


def _uri(storage: Path) -> str:
    from pretrain.tracking.client import default_uri

    return redact(default_uri(storage))
