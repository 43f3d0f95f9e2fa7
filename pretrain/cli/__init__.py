"""The command line: `console` is the console script, `data` the commands below `pretrain data`.

Importing this package is cheap, so that Ctrl-C is answered from the first moment on.
"""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import NoReturn

from pretrain.errors import EXIT_INTERRUPTED

__all__ = ["console"]


def console() -> NoReturn:
    """The command `pretrain` of a shell."""
    # A handler, and no exception: what is being imported may swallow one, or print where it was.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as by `nohup`
        signal.signal(signal.SIGINT, _interrupted)
    from pretrain.cli.main import console

    if signal.getsignal(signal.SIGINT) is _interrupted:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    console()


def _interrupted(signum: int, frame: FrameType | None) -> NoReturn:
    """Nothing has begun, and nothing is to be closed."""
    os.write(2, b"error: interrupted\n")
    os._exit(EXIT_INTERRUPTED)
