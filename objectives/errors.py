"""The one exception this package raises for a wrong request. Imports nothing."""

from __future__ import annotations

__all__ = ["ObjectiveError"]


class ObjectiveError(ValueError):
    """An objective is unknown or cannot be built; the message is one line that says what, where and what to do."""
