"""The one exception this package raises for a wrong request or a damaged file, and the hint it ends with."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["BackboneError", "suggest"]


class BackboneError(ValueError):
    """A backbone cannot be built, saved or loaded; the message is one line that says what, where and what to do."""


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'X'?` for the known name closest to `name`; empty when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
