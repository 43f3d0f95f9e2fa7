"""What a person sees while a run is on: a live bar on a terminal, plain lines anywhere else.

Shows journal records and nothing else; whoever reads the journal (the driver, or rank 0 under torchrun) calls `show`.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from pretrain.config.schema import Recipe

__all__ = ["Terminal"]


class Terminal:
    """Shows the records of one run.

    Args:
        recipe: Its resolved recipe.
        console: Where to write; standard output by default.
    """

    def __init__(self, recipe: Recipe, console: Console | None = None) -> None:
        self.console = console or Console(file=sys.stdout, highlight=False, soft_wrap=True)
        self._total = recipe.train.steps
        self._select = recipe.evaluation.select
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._task: TaskID | None = None
        self._probe = ""

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """One line above the bar."""
        self.console.print(text, markup=False)

    def show(self, record: dict[str, Any]) -> None:
        """Show one record; kinds that say nothing to a person are passed over."""
        handler: Callable[[dict[str, Any]], None] | None = getattr(self, f"_show_{record['kind']}", None)
        if handler is not None:
            handler(record)

    def _show_start(self, record: dict[str, Any]) -> None:
        place = f"{record['world_size']} x {record['device']}"
        self.say(f"training on {place}, steps {record['step']} to {record['total_steps']}")
        if self._task is None:
            self._task = self._bar.add_task("training", total=self._total, status="")
        self._bar.update(self._task, completed=record["step"])

    def _show_startup(self, record: dict[str, Any]) -> None:
        parts = ("placed", "imported", "joined", "built", "first_batch", "first_step")
        self.say(
            f"first step after {record['total_s']:.1f} s: " + ", ".join(f"{p} {record[p + '_s']:.1f}" for p in parts)
        )

    def _show_resumed(self, record: dict[str, Any]) -> None:
        self.say(resumed_line(record))

    def _show_metrics(self, record: dict[str, Any]) -> None:
        values = record["values"]
        left_s = (self._total - record["step"]) * values["step_s"]
        status = (
            f"loss {values['loss']:.4f}  lr {values['lr']:.1e}  {values['images_per_s']:.0f} images/s  "
            f"waiting for data {values['data_wait_fraction']:.0%}  {self._probe}ETA {duration(left_s)}"
        )
        if self.console.is_terminal and self._task is not None:
            self._bar.update(self._task, completed=record["step"], status=status)
        else:
            self.say(f"step {record['step']}/{self._total}  {status}")

    def _show_checkpoint(self, record: dict[str, Any]) -> None:
        self.say(f"checkpoint at step {record['step']}: {record['path']}")

    def _show_warning(self, record: dict[str, Any]) -> None:
        self.say(f"WARNING at step {record['step']}: {record['text']}")

    def _show_evaluation(self, record: dict[str, Any]) -> None:
        name = f"{record['protocol']}/{record['data']}"
        if "error" in record:
            self.say(f"evaluation {name} of step {record['step']} failed: {record['error']}")
            return
        headline, score = next(iter(record["metrics"].items()))
        known = " (known)" if record["cached"] else ""
        self.say(f"evaluation of step {record['step']}: {name}/{headline} {score:.1%}{known}")
        if self._select in (None, f"{name}/{headline}"):
            self._probe = f"{name} {score:.1%} (step {record['step']})  "


def resumed_line(record: dict[str, Any]) -> str:
    """What a resume restored, in one line."""
    saved, rngs = record["saved_world_size"], record["rng_states"]
    ranks = f"RNG of {rngs} ranks" if rngs else f"resharded from {saved} ranks, which begin new RNGs"
    return (
        f"resumed at step {record['step']}: backbone tensors {record['tensors']}/{record['tensors_total']} equal, "
        f"optimiser at step {record['optimizer_step']}, {ranks}, "
        f"stream at sample {record['samples_seen']} (epoch {record['epoch']}, position {record['position']})"
    )


def duration(seconds: float) -> str:
    """`75` -> `1:15`."""
    return (
        time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(max(0, seconds)))
        if seconds < 86400
        else (f"{seconds / 86400:.1f} days")
    )
