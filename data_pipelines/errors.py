"""What can be wrong with data. Imports nothing, so that a wrong recipe is rejected at once."""

from __future__ import annotations

__all__ = ["CorruptSampleError", "DataError"]


class DataError(ValueError):
    """The data, or what was said about it, is wrong; the message is one line that names the file and the remedy."""


class CorruptSampleError(DataError):
    """One sample is damaged (its bytes changed, or do not decode) while the shard around it is readable."""
