"""The one exception this package raises for a wrong request or a damaged file. Imports nothing."""

from __future__ import annotations

__all__ = ["BackboneError"]


class BackboneError(ValueError):
    """A backbone cannot be built, saved or loaded; the message is one line that says what, where and what to do."""
