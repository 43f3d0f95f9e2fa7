"""How far long work is: a line every ten seconds, of work that takes longer, for who wants to know.

A head or an extraction says with `counted` what it goes through; `telling` gives the lines to a function.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

__all__ = ["EVERY_S", "counted", "telling"]

EVERY_S = 10.0

log = logging.getLogger(__name__)

Item = TypeVar("Item")


def counted(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items, one after the other; while that takes long, how many of `total` are done, and the time that is left.

    Args:
        items: Work is done between one and the next, or by taking it.
        total: How many there are, at least 1.
        what: Begins the line: "features of 500 samples".
    """
    began = told = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        now = time.monotonic()
        if now - told >= EVERY_S and done < total:
            told = now
            left = (now - began) / done * (total - done)
            log.info("%s: %.0f %% done, %.0f s left", what, 100 * done / total, left)


@contextmanager
def telling(say: Callable[[str], None]) -> Iterator[None]:
    """While it is open, `say` gets the lines."""
    handler = _Saying(say)
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


class _Saying(logging.Handler):
    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__()
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        self._say(record.getMessage())
