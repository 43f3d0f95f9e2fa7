"""Errors that the command line turns into exit codes.

`RequestError` is the caller's mistake (exit code 2); `RunFailed` is work that was accepted and failed (exit code 1).
Errors of the other packages (`data_pipelines.shards.source.DataError`, `backbones` errors) stay with their packages.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["RequestError", "RunFailed"]


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
