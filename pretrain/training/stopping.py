"""Requests to end: to stop, or to begin again with other workers. They count at the next border of two steps.

A run is asked to stop by a file in its directory, by SIGTERM or by Ctrl-C. What a scheduler or a container does before
it kills (SIGTERM) reaches one process or all of them, at any moment. Here it only sets a flag; `Engine.step` tells it
to all ranks, and they publish a checkpoint together.

Whoever sees that the workers should be other ones (a machine is taken away, or has come) writes
`RunDir.regroup_request`, in the same way and with the same end, but that the run goes on.

Not here: who starts the workers again (`pretrain.driver`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from data_pipelines.files import write_atomically
from pretrain.record.interrupts import heard
from pretrain.record.run_dir import RunDir

__all__ = ["StopRequest", "ask_to_regroup", "watched"]

ECHO_S = 2.0  # a signal to a whole process group often reaches a process twice: directly and through its parent

When = Literal["now", "checkpoint"]


def ask_to_regroup(run: RunDir, when: When, why: str) -> bool:
    """Ask the workers of a run to end and begin again.

    Args:
        run: Which one.
        when: `now`: after the step at work; `checkpoint`: when the next checkpoint is due.
        why: One line for people.

    Returns:
        Whether it was asked now: a request that stands is not taken back, but may become more urgent.
    """
    standing = _read(run.regroup_request)
    if standing is not None and (standing[0] == "now" or standing[0] == when):
        return False
    write_atomically(run.regroup_request, f"{when} {why}\n".encode())
    return True


def _read(file: Path | None) -> tuple[str, str] | None:
    """When and why, if anybody asks; something else in the file counts as `now`."""
    if file is None or not file.exists():
        return None
    try:
        when, _, why = file.read_text(errors="replace").strip().partition(" ")
    except FileNotFoundError:  # taken back in this moment
        return None
    return ("checkpoint" if when == "checkpoint" else "now"), why


class StopRequest:
    """Whether this process was asked to end, and how.

    Args:
        run: Files in its directory ask; None: nobody asks this process by files.
    """

    def __init__(self, run: RunDir | None) -> None:
        self._stop = run.stop_request if run else None
        self._regroup = run.regroup_request if run else None
        self._signalled: float | None = None  # when, by the monotonic clock

    def counts(self, *, checkpoint_is_due: bool) -> bool:
        """Whether the step that begins is the last one.

        Args:
            checkpoint_is_due: After that step, with or without a request.
        """
        if self._is_to_stop:
            return True
        asked = _read(self._regroup)
        return asked is not None and (asked[0] == "now" or checkpoint_is_due)

    def regroups(self) -> str | None:
        """Of a run that has ended on request: why it begins again; None: it was asked to stop."""
        asked = None if self._is_to_stop else _read(self._regroup)
        return asked[1] if asked else None

    @property
    def _is_to_stop(self) -> bool:
        return self._signalled is not None or (self._stop is not None and self._stop.exists())

    def on_signal(self) -> None:
        """The first signal asks to stop; another one, more than a moment later, ends the process at once.

        Raises:
            KeyboardInterrupt: For the second.
        """
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        elif now - self._signalled > ECHO_S:
            raise KeyboardInterrupt


@contextmanager
def watched(run: RunDir | None) -> Iterator[StopRequest]:
    """A request of this process, which signals set until the end of the block; only a main thread can hear them."""
    request = StopRequest(run)
    with heard(request.on_signal):
        yield request
