"""Requests to stop: a file in the run's directory, SIGTERM or Ctrl-C. They count at the next border of two steps.

What a scheduler or a container does before it kills (SIGTERM) reaches one process or all of them, at any moment. Here
it only sets a flag; `Engine.step` tells it to all ranks, and they publish a checkpoint together.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pretrain.record.interrupts import heard

__all__ = ["StopRequest", "watched"]

ECHO_S = 2.0  # a signal to a whole process group often reaches a process twice: directly and through its parent


class StopRequest:
    """Whether this process was asked to stop.

    Args:
        file: Exists while somebody asks; None: nobody asks this process by a file.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._signalled: float | None = None  # when, by the monotonic clock

    def __bool__(self) -> bool:
        return self._signalled is not None or (self._file is not None and self._file.exists())

    def on_signal(self) -> None:
        """The first signal asks; another one, more than a moment later, ends the process at once.

        Raises:
            KeyboardInterrupt: For the second.
        """
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        elif now - self._signalled > ECHO_S:
            raise KeyboardInterrupt


@contextmanager
def watched(file: Path | None) -> Iterator[StopRequest]:
    """A request of this process, which signals set until the end of the block; only a main thread can hear them."""
    request = StopRequest(file)
    with heard(request.on_signal):
        yield request
