"""What is shown of work outside of training: a bar where samples are counted, a line where nothing is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pretrain.errors import RunFailed
from pretrain.screen import escaping_console, say

__all__ = ["progress_of", "shown_while"]

SAID_EVERY_S = 10.0  # where there is no terminal


@contextmanager
def progress_of(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on standard error, or now and then a line where that is no terminal; yields `update(done, total)`.

    Raises:
        RunFailed: a worker process died of the work inside.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from data_pipelines.worker_pool import WorkerDied

    screen = escaping_console(stderr=True)
    columns = TextColumn(what, markup=False), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        said = time.monotonic()

        def update(done: int, total: int) -> None:
            nonlocal said
            bar.update(task, completed=done, total=total)
            if bar.disable and time.monotonic() - said >= SAID_EVERY_S:
                said = time.monotonic()
                say(f"{what}: {done} of {total}", err=True)

        try:
            yield update
        except WorkerDied as error:
            raise RunFailed(str(error)) from error


@contextmanager
def shown_while(what: str) -> Iterator[None]:
    """Say what is under way, on a terminal and until it has ended."""
    screen = escaping_console(stderr=True)
    if screen.is_terminal:
        with screen.status(what):
            yield
    else:
        yield
