"""What can be wrong with data, and how a message ends. Imports nothing heavy: a wrong recipe is rejected at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = [
    "CorruptSampleError",
    "DataError",
    "LoaderError",
    "MissingFieldError",
    "TooLargeError",
    "TooManyDamagedError",
    "nearest",
    "suggest",
]


class DataError(ValueError):
    """The data, or what was said about it, is wrong; the message is one line that names the file and the remedy."""


class LoaderError(RuntimeError):
    """A loader process died or hangs, or a batch was lost on its way from one; one line with a remedy."""


class CorruptSampleError(DataError):
    """One sample is damaged (its bytes changed, or do not decode) while the shard around it is readable."""


class MissingFieldError(DataError):
    """Not every sample has one of the fields `wanted`."""

    def __init__(self, message: str, wanted: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.wanted = tuple(wanted)


class TooLargeError(DataError):
    """A small file, such as an index, is larger than it can be; it was not read."""


class TooManyDamagedError(DataError):
    """More samples of what is to be packed are damaged than may be left out.

    Attributes:
        found: how many, and what is wrong with the first of them.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}; {remedy}")
        self.found = found


def suggest(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message: `; did you mean 'X'?` for the allowed name that looks like `name`, or nothing."""
    near = nearest(name, allowed, cutoff)
    return "" if near is None else f"; did you mean {near!r}?"


def nearest(name: str, allowed: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The allowed name that looks like `name`; None when none is alike by `cutoff`, a share in 0..1."""
    return next(iter(difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=cutoff)), None)
