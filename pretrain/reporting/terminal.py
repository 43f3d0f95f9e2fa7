"""What a person sees while a run is on: a live bar on a terminal, plain lines anywhere else.

Shows events and nothing else; whoever sees them (the driver, or rank 0 under torchrun) calls `show`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.table import Column
from rich.text import Text

from backbones.registry import IMAGE
from evaluation.protocol import format_value
from pretrain.checkpoints import store
from pretrain.config.stages import Plan
from pretrain.errors import listed, shortened
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Event,
    Initialized,
    Metrics,
    Preparing,
    Regrouping,
    Resumed,
    StageBegan,
    Start,
    Startup,
    Stopped,
    Taught,
    Warned,
)
from pretrain.screen import escaping_console, printable

__all__ = ["Terminal"]

_FIELDS = {  # what a person sees of a logged step, where it is known
    "loss": "loss {:.4f}",
    "lr": "lr {:.1e}",
    "samples_per_s": "{:.0f} samples/s",
    "data_wait_fraction": "waiting for data {:.0%}",
}
_FIRST = ("loss", "samples_per_s", "score", "lr", "data_wait_fraction")  # where there is not room for all
_LONG_WAIT = 0.05  # share of the time; in two reports one after the other it is worth a word
_LONGEST_LABEL = 20  # characters
_SMALLER = "; data.scaled_decoding=true decodes large photos in less time (a new run: it changes pixels)"
_BARS = (4, 24)  # the shortest and the longest


class Terminal:
    """Shows the events of one run.

    Args:
        plan: Its stages.
        console: Where to write; standard output by default.
        run_dir: Where it is; tells the place of checkpoints that are stored elsewhere.
    """

    def __init__(self, plan: Plan, console: Console | None = None, run_dir: Path | None = None) -> None:
        self.console = console or escaping_console(sys.stdout, soft_wrap=True)
        self._plan, self._run_dir = plan, run_dir
        self._total = plan.total_steps
        self._select = plan.recipe.evaluation.select
        narrow = Column(no_wrap=True)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False, table_column=narrow),
            BarColumn(bar_width=_bar_width(self.console)),
            _Left(table_column=Column(no_wrap=True)),
            _Fields(self.console, table_column=Column(no_wrap=True)),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._waits_for = ""
        self._step = 0
        self._newest_score = ""
        self._long_waits = 0  # reports in which training waited long for data, the last of them being the latest one

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def wait_for(self, what: str) -> None:
        """Say, once, what is under way while there are no steps."""
        if what == self._waits_for:
            return
        self._waits_for = what
        if self.console.is_terminal:
            self._restart_bar(what, total=None)
        else:
            self.say(what)

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(printable(text), markup=False)

    def show(self, event: Event) -> None:
        """Show one event; kinds that say nothing to a person are passed over."""
        match event:
            case Start():
                self._show_start(event)
            case Preparing():
                self.wait_for(event.what)
            case Startup():
                self.say(startup_line(event))
            case Resumed():
                self.say(resumed_line(event))
            case StageBegan():
                self.say(stage_line(event))
            case Taught():
                self.say(taught_line(event))
            case Initialized():
                self.say(initialized_line(event))
            case Metrics():
                self._show_metrics(event)
            case CheckpointPublished():
                self.say(f"checkpoint at step {event.step}: {self._place_of(event)}")
            case Stopped():
                self.say(f"stopped after step {event.step}")
            case Regrouping():
                self.say(f"the workers begin again after step {event.step}: {event.why}")
            case Warned():
                self.say(f"WARNING at step {event.step}: {event.text}")
            case Evaluated():
                self._show_scores(event)
            case EvaluationFailed():
                what = "is left out of its suite" if event.left_out else "failed"
                self.say(f"evaluation {event.task} of step {event.step} {what}: {event.error}")

    def _place_of(self, event: CheckpointPublished) -> str:
        if self._run_dir is None or self._plan.recipe.checkpoints.storage is None:
            return event.path
        return store.storage_of(self._run_dir).location(Path(event.path).name)

    def _show_start(self, event: Start) -> None:
        place = f"{event.world_size} x {event.device}"
        epochs = f", {event.epochs:.3g} epochs of the data" if event.epochs else ""
        if event.size:
            self.say(event.size)
        self.say(f"training on {place}, steps {event.step} to {event.total_steps}{epochs}")
        self._step = event.step
        self.wait_for("reading the first batch")

    def _show_metrics(self, event: Metrics) -> None:
        values = event.values
        self._advise_on_data(values.get("data_wait_fraction", 0.0))
        fields = {name: text.format(values[name]) for name, text in _FIELDS.items() if name in values}
        if self._newest_score:
            fields["score"] = self._newest_score
        left = f"ETA {duration((self._total - event.step) * values['step_s'])}" if "step_s" in values else ""
        stage = self._plan.stages[self._plan.index_at(event.step)].name
        if not self.console.is_terminal:
            at = f"step {event.step}/{self._total}{f' ({stage})' if stage else ''}"
            self.say("  ".join([at, *fields.values(), *([left] if left else [])]))
            return
        if self._waits_for or self._task is None:
            self._waits_for = ""
            self._restart_bar("", total=self._total)
        assert self._task is not None
        label = shortened(printable(stage or "training"), _LONGEST_LABEL)
        self._bar.update(self._task, description=label, completed=event.step, eta=left, fields=fields)

    def _advise_on_data(self, waited: float) -> None:
        """Say what to do, once, when training keeps waiting for data."""
        if self._long_waits >= 2:
            return
        self._long_waits = self._long_waits + 1 if waited > _LONG_WAIT else 0
        if self._long_waits == 2:
            data, of_photos = self._plan.recipe.data, self._plan.recipe.backbone.kind == IMAGE
            self.say(
                f"training waits for data {waited:.0%} of the time: with cores to spare, raise data.loader_workers "
                f"(now {data.loader_workers} per worker){'' if data.scaled_decoding or not of_photos else _SMALLER}"
            )

    def _restart_bar(self, label: str, total: int | None) -> None:
        """A new bar in the place of the one there is; without a total it counts the seconds."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(printable(label), total=total, eta="", fields={})

    def _show_scores(self, event: Evaluated) -> None:
        headline = event.headline
        score = format_value(event.metrics[headline.name], headline.unit)
        known = " (known)" if event.cached else ""
        self.say(f"evaluation of step {event.step}: {event.task}/{headline.name} {score}{known}")
        if self._select is None or self._select.rpartition("/")[0] == event.task:
            self._newest_score = f"{event.task} {score} (step {event.step})"


class _Left(ProgressColumn):
    """Steps done of all and the time left; while there is nothing to count, the time that has gone by."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        return Text(duration(task.elapsed or 0.0) if task.total is None else _counted(task))


class _Fields(ProgressColumn):
    """As many of the other fields as there is room for behind the first columns, the most important ones."""

    def __init__(self, console: Console, *, table_column: Column) -> None:
        super().__init__(table_column)
        self._console = console

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text("")
        fields: dict[str, str] = task.fields["fields"]
        room = self._console.width - len(f"{task.description}  {_counted(task)} ") - _bar_width(self._console)
        chosen: set[str] = set()
        for name in _FIRST:
            wanted = [text for other, text in fields.items() if other in chosen | {name}]
            if name in fields and len("  ".join(wanted)) <= room:
                chosen.add(name)
        return Text("  ".join(text for name, text in fields.items() if name in chosen))


def _counted(task: Task) -> str:
    return f"{task.completed:.0f}/{task.total:.0f} {task.fields['eta']}".rstrip()


def _bar_width(console: Console) -> int:
    shortest, longest = _BARS
    return max(shortest, min(longest, console.width // 7))


def startup_line(event: Startup) -> str:
    """How long the first step was in coming, and why."""
    return (
        f"first step after {event.total_s:.1f} s: placed {event.placed_s:.1f}, imported {event.imported_s:.1f}, "
        f"joined {event.joined_s:.1f}, built {event.built_s:.1f}, first_batch {event.first_batch_s:.1f}, "
        f"first_step {event.first_step_s:.1f}"
    )


def stage_line(event: StageBegan) -> str:
    """What a stage took over, in one line."""
    parts = [f"{event.loaded}/{event.total} tensors of the stage before"]
    for names, verb in ((event.resampled, "fitted"), (event.fresh, "new")):
        if names:
            parts.append(f"{len(names)} {verb} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})")
    moments = "optimizer goes on" if event.moments else "optimizer reset"
    return f"stage {event.stage} begins at step {event.step}: {', '.join(parts)}, {moments}"


def taught_line(event: Taught) -> str:
    """Which frozen teacher a stage has, in one line."""
    return f"frozen teacher{f' of stage {event.stage}' if event.stage else ''}: {event.teacher}"


def resumed_line(event: Resumed) -> str:
    """What a resume restored, in one line."""
    saved, rngs = event.saved_world_size, event.rng_states
    ranks = f"RNG of {rngs} ranks" if rngs else f"resharded from {saved} ranks, which begin new RNGs"
    of = f" of {event.reference}" if event.reference else ""
    return (
        f"resumed at step {event.step}{of}: backbone tensors {event.tensors}/{event.tensors_total} equal, "
        f"optimizer at step {event.optimizer_step}, {ranks}, "
        f"stream at sample {event.samples_seen} (epoch {event.epoch}, position {event.position})"
    )


def initialized_line(event: Initialized) -> str:
    """Which weights a run begins with, in one line."""
    parts = [f"initialized from {event.reference}: {event.loaded}/{event.total} backbone tensors"]
    for names, what in (
        (event.resampled, "resampled"),
        (event.missing, "not in the file, so random"),
        (event.unexpected, "not of this backbone, so not used"),
    ):
        if names:
            parts.append(f"{what}: {listed(names, 5)}")
    return f"{'; '.join(parts)}; step 0 is evaluated with these weights"


def finished_line(plan: Plan, resume: str) -> str:
    """That a run has nothing left to do, and what trains on; `resume` is the command that goes on with it."""
    done = f"all {plan.total_steps} steps are trained, and no evaluation is missing"
    if plan.stages[0].name:
        return f"{done}; the steps of its stages are fixed, a new run can begin with its weights (init_from)"
    return f"{done}; to train on: {resume} train.steps=MORE"


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    return (
        time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(max(0, seconds)))
        if seconds < 86400
        else (f"{seconds / 86400:.1f} days")
    )
