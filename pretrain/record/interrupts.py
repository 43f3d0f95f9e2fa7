"""Work beside training that can be stopped at any moment and goes on when it is asked for again.

Not here: training, which stops between two steps (`pretrain.training.stopping`).
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pretrain.errors import RunStopped

__all__ = ["stopped_by_signals"]


@contextmanager
def stopped_by_signals(said: Callable[[], str]) -> Iterator[None]:
    """SIGTERM ends the work in the block as Ctrl-C does, and `said()` tells how to go on.

    Raises:
        RunStopped: one of them came.
    """

    def interrupt(signum: int, frame: object) -> None:
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, interrupt) if is_main else None
    try:
        yield
    except KeyboardInterrupt:
        raise RunStopped(said()) from None
    finally:
        if is_main:
            signal.signal(signal.SIGTERM, before)
