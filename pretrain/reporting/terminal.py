"""What a person sees while a run is on: a live bar on a terminal, plain lines anywhere else.

Shows events and nothing else; whoever sees them (the driver, or rank 0 under torchrun) calls `show`.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from evaluation.protocol import format_value
from pretrain.config.stages import Plan
from pretrain.errors import listed
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Event,
    Initialized,
    Metrics,
    Resumed,
    StageBegan,
    Start,
    Startup,
    Stopped,
    Warned,
)
from pretrain.screen import escaping_console, printable

__all__ = ["Terminal"]

_METRICS = {  # what a person sees of a logged step, where it is known
    "loss": "loss {:.4f}",
    "lr": "lr {:.1e}",
    "samples_per_s": "{:.0f} samples/s",
    "data_wait_fraction": "waiting for data {:.0%}",
}


class Terminal:
    """Shows the events of one run.

    Args:
        plan: Its stages.
        console: Where to write; standard output by default.
    """

    def __init__(self, plan: Plan, console: Console | None = None) -> None:
        self.console = console or escaping_console(sys.stdout, soft_wrap=True)
        self._total = plan.total_steps
        self._select = plan.recipe.evaluation.select
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._newest_score = ""

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(printable(text), markup=False)

    def show(self, event: Event) -> None:
        """Show one event; kinds that say nothing to a person are passed over."""
        match event:
            case Start():
                self._show_start(event)
            case Startup():
                self.say(startup_line(event))
            case Resumed():
                self.say(resumed_line(event))
            case StageBegan():
                self.say(stage_line(event))
            case Initialized():
                self.say(initialized_line(event))
            case Metrics():
                self._show_metrics(event)
            case CheckpointPublished():
                self.say(f"checkpoint at step {event.step}: {event.path}")
            case Stopped():
                self.say(f"stopped after step {event.step}")
            case Warned():
                self.say(f"WARNING at step {event.step}: {event.text}")
            case Evaluated():
                self._show_scores(event)
            case EvaluationFailed():
                self.say(f"evaluation {event.task} of step {event.step} failed: {event.error}")

    def _show_start(self, event: Start) -> None:
        place = f"{event.world_size} x {event.device}"
        epochs = f", {event.epochs:.3g} epochs of the data" if event.epochs else ""
        self.say(f"training on {place}, steps {event.step} to {event.total_steps}{epochs}")
        if self._task is None:
            self._task = self._bar.add_task("training", total=self._total, status="")
        self._bar.update(self._task, completed=event.step)

    def _show_metrics(self, event: Metrics) -> None:
        values = event.values
        said = [text.format(values[name]) for name, text in _METRICS.items() if name in values]
        left = f"ETA {duration((self._total - event.step) * values['step_s'])}" if "step_s" in values else ""
        status = f"{'  '.join(said)}  {self._newest_score}{left}"
        if self.console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=event.step, status=status)
        else:
            self.say(f"step {event.step}/{self._total}  {status}")

    def _show_scores(self, event: Evaluated) -> None:
        headline = event.headline
        score = format_value(event.metrics[headline.name], headline.unit)
        known = " (known)" if event.cached else ""
        self.say(f"evaluation of step {event.step}: {event.task}/{headline.name} {score}{known}")
        if self._select in (None, f"{event.task}/{headline.name}"):
            self._newest_score = f"{event.task} {score} (step {event.step})  "


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


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    return (
        time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(max(0, seconds)))
        if seconds < 86400
        else (f"{seconds / 86400:.1f} days")
    )
