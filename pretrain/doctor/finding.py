"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ANSWER_S", "LIMIT_S", "Finding", "Level", "size"]

Level = Literal["ok", "warn", "fail"]
LIMIT_S = 5.0  # of a check
ANSWER_S = 4.0  # of a server or process, so that what it says is heard before the limit


@dataclass(frozen=True)
class Finding:
    """What one check has found.

    Attributes:
        name: Of the check.
        level: `fail`: a run would fail or do something else than it seems to.
        text: One line, without credentials.
        remedy: What to do; empty where all is well.
    """

    name: str
    level: Level
    text: str
    remedy: str = ""


def size(number: int) -> str:
    """A number of bytes in words."""
    return f"{number / 2**30:.1f} GiB" if number >= 2**30 else f"{number / 2**20:.0f} MiB"
