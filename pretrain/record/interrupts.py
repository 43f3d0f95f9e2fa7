"""SIGTERM and Ctrl-C: who hears them while a block runs, and work that may stop at any moment and go on later.

Not here: training, which stops between two steps (`pretrain.training.stopping`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pretrain.errors import RunStopped

__all__ = ["heard", "stopped_by_signals"]


@contextmanager
def heard(
    act: Callable[[], None], signums: Sequence[int] = (signal.SIGTERM, signal.SIGINT)
) -> Iterator[Callable[[], None]]:
    """Signals call `act` until the end of the block; what is yielded makes it so again, after another has taken them.

    Only a main thread can hear signals; in another one they do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return

    def listen() -> None:
        for signum in before:
            signal.signal(signum, lambda number, frame: act())

    before = {signum: signal.getsignal(signum) for signum in signums}
    listen()
    try:
        yield listen
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def stopped_by_signals(said: Callable[[], str]) -> Iterator[None]:
    """SIGTERM ends the work in the block as Ctrl-C does, and `said()` tells how to go on.

    Raises:
        RunStopped: one of them came.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        with heard(interrupt, (signal.SIGTERM,)):
            yield
    except KeyboardInterrupt:
        raise RunStopped(said()) from None
