"""What a part is, what it is asked of, and how its numbers are judged."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Check", "Part", "Row", "difference", "verdict"]

Row = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """How the parts are asked.

    Attributes:
        device: `cuda` or `cpu`.
        quick: Small models and few steps.
        out: Directory of the answers.
        data: Shards of photos.
    """

    device: str
    quick: bool
    out: Path
    data: str

    def rows(self, part: str) -> dict[str, Row]:
        """What an earlier part found, by case; nothing where it has not run."""
        path = self.out / f"{part}.json"
        return {row["case"]: row for row in json.loads(path.read_text())["cases"]} if path.exists() else {}


@dataclass(frozen=True)
class Part:
    """A question.

    Attributes:
        measure: Answers it for one case; an "error" in the answer, or an exception, says that this one failed.
        cases: Each is asked for itself.
        limit_s: For all of them.
        needs_cuda: It means nothing without.
        on_cpu: It computes on the CPU, whatever the device of the check.
    """

    measure: Callable[[Check, str], Row]
    cases: Sequence[str]
    limit_s: float
    needs_cuda: bool = False
    on_cpu: bool = False


def difference(found: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference; NaN if there is one, infinite between lists of other lengths."""
    if len(found) != len(expected) or not found:
        return math.inf
    each = [abs(a - b) / max(abs(b), 1e-12) if math.isfinite(a - b) else math.nan for a, b in zip(found, expected)]  # noqa: B905
    return math.nan if any(map(math.isnan, each)) else max(each)


def verdict(row: Row, name: str, tolerance: float) -> Row:
    """The row, with its tolerance, and an error where the difference of that name is above it, or none."""
    row = row | {"tolerance": tolerance}
    return row if row[name] <= tolerance else row | {"error": f"{name} {row[name]:.2e} is above {tolerance:.0e}"}
