"""From settings with several values to the points of a grid: pure functions, nothing is read or written.

`optimizer.lr=1e-4,3e-4` has two values. A comma in brackets, braces or quotes belongs to a value: `[0.9,0.95]` is one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from pretrain.errors import RequestError

__all__ = ["MOST_POINTS", "Point", "grid", "sweep_id"]

MOST_POINTS = 1000
_ONE_PLACE = ("storage", "name")  # keys that belong to the sweep as a whole
_OPEN, _CLOSE, _QUOTES = "[{(", "]})", "\"'"
_BEFORE_A_TEXT = "[{(,:"


@dataclass(frozen=True)
class Point:
    """One combination.

    Attributes:
        number: From 0, in the order of the product; the last key changes fastest.
        chosen: What is particular about it, by key.
        settings: All `key=value` texts of its run.
    """

    number: int
    chosen: Mapping[str, str]
    settings: tuple[str, ...]

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in self.chosen.items())


def grid(settings: Sequence[str]) -> list[Point]:
    """All combinations of the values that settings have.

    Args:
        settings: `key=value` or `key=value,value,...`.

    Raises:
        RequestError: No setting has several values, a value is empty or named twice, or there are too many points.
    """
    mistakes: list[str] = []
    names = [text.partition("=")[0].strip() for text in settings]
    values = [_values(text.partition("=")[2]) for text in settings]
    swept = [idx for idx, found in enumerate(values) if len(found) > 1]
    if not swept:
        mistakes.append("--sweep: no setting has several values; give them with commas, as in train.seed=1,2")
    for idx in swept:
        key, found = names[idx], values[idx]
        if key in _ONE_PLACE:
            mistakes.append(f"{settings[idx]}: all runs of a sweep have the same {key}; give one")
        if names.count(key) > 1:
            mistakes.append(f"{settings[idx]}: {key} is given twice; give all its values in one place")
        if "" in found:
            mistakes.append(f"{settings[idx]}: nothing between two commas, or at an end; expected {key}=A,B")
        if repeated := sorted({value for value in found if found.count(value) > 1}):
            mistakes.append(f"{settings[idx]}: {repeated[0]!r} is named twice")
    number = 1
    for found in values:
        number *= len(found)
    if number > MOST_POINTS:
        mistakes.append(f"--sweep: {number} combinations; at most {MOST_POINTS} make a sweep")
    if mistakes:
        raise RequestError(*mistakes)
    return [
        Point(
            number,
            {names[idx]: chosen[idx] for idx in swept},
            tuple(text if idx not in swept else f"{names[idx]}={chosen[idx]}" for idx, text in enumerate(settings)),
        )
        for number, chosen in enumerate(product(*values))
    ]


def sweep_id(name: str, recipe: str, content: Mapping[str, object], settings: Sequence[str]) -> str:
    """The name of a sweep, the same for the same request.

    Args:
        name: Of the resolved recipes.
        recipe: As it is named in the request.
        content: What it says.
        settings: Of the request, in any order.
    """
    asked = json.dumps([recipe, content, sorted(settings)], sort_keys=True, default=str)
    return f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:10]}"


def _values(text: str) -> list[str]:
    """`text` at its commas, but for those inside brackets and quotes."""
    parts, depth, quote = [""], 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES and (not parts[-1].strip() or parts[-1].rstrip()[-1] in _BEFORE_A_TEXT):
            quote = letter  # anywhere else it is an apostrophe
        elif letter in _OPEN:
            depth += 1
        elif letter in _CLOSE:
            depth -= 1
        elif letter == "," and depth <= 0:
            parts.append("")
            continue
        parts[-1] += letter
    return [part.strip() for part in parts] if len(parts) > 1 else parts
