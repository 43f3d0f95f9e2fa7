"""Errors that the command line turns into exit codes.

`RequestError` is the caller's mistake (exit code 2), `RunFailed` is work that was accepted and failed (exit code 1),
`RunStopped` is work that has ended before its time and can go on (exit code 75), as requested as a rule.
Errors of the other packages (`data_pipelines.errors.DataError`, `backbones` errors) stay with their packages.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = [
    "EXIT_INTERRUPTED",
    "EXIT_STOPPED",
    "RequestError",
    "RunFailed",
    "RunStopped",
    "last_line",
    "last_words",
    "listed",
    "nearest",
    "nearest_file",
    "said_by_system",
    "shortened",
]

EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run me again
EXIT_INTERRUPTED = 130  # what shells say of a command that Ctrl-C has ended


class RequestError(Exception):
    """A request that can not be carried out as written.

    Attributes:
        mistakes: one line per mistake; each names the key or file, the value, what is allowed and the remedy.
    """

    def __init__(self, *mistakes: str) -> None:
        if not mistakes:
            raise TypeError("RequestError needs at least one mistake")
        super().__init__("\n".join(mistakes))
        self.mistakes = mistakes

    def __reduce__(self) -> tuple[type[RequestError], tuple[str, ...]]:
        return type(self), self.mistakes


class RunFailed(Exception):
    """Work that was accepted and failed.

    Attributes:
        log: the file to read for the whole story, when there is one.
    """

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.log = log

    def __reduce__(self) -> tuple[type[RunFailed], tuple[str, Path | None]]:
        return type(self), (self.message, self.log)


class RunStopped(Exception):
    """Work that has ended before its time and can go on (exit code 75); the message says where it stands and how."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known name closest to `name`, or an empty text when none is close."""
    candidates = list(known)
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.6)
    if not close:
        last = name.rsplit(".", 1)[-1]
        close = [key for key in candidates if key.rsplit(".", 1)[-1] == last][:1]
    return f"; did you mean '{close[0]}'?" if close else ""


def shortened(text: str, longest: int) -> str:
    """`text`, or the beginning and the end of one with more than `longest` characters."""
    if len(text) <= longest:
        return text
    end = longest // 3
    return f"{text[: longest - end - 5]} ... {text[-end:]}"


def said_by_system(error: OSError) -> str:
    """What the operating system says, with the file it is about first."""
    file = f"{error.filename}: " if error.filename is not None else ""
    return f"{file}{error.strerror or error}"


def last_line(error: BaseException) -> str:
    """The end of what an error says, which of an error out of another process is the error itself."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def last_words(said: str) -> str:
    """Of what a command of ours has printed, how it ended: the first of its last errors, else the last line, if any.

    The first of several is what went wrong; those that follow say where to read on.
    """
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [idx for idx, line in enumerate(lines) if line.startswith("error: ")]
    if not errors:
        return lines[-1] if lines else ""
    first = errors[-1]
    while first - 1 in errors:
        first -= 1
    return lines[first]


def listed(items: Iterable[Any], limit: int = 20) -> str:
    """What there is, as one phrase: `a, b, c`, at most `limit` of them; `none` when there is nothing."""
    texts = [str(item) for item in items]
    return (", ".join(texts[:limit]) + (", ..." if len(texts) > limit else "")) or "none"


def nearest_file(path: Path) -> str:
    """The hint for a path that does not exist: the closest name that does, or the first folder that is missing."""
    folder = path.absolute().parent
    if not folder.is_dir():
        return f"; there is no directory {folder}"
    close = difflib.get_close_matches(path.name, sorted(os.listdir(folder)), n=1)
    return f"; did you mean '{folder / close[0]}'?" if close else ""
