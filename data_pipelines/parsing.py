"""JSON that others wrote, read so that its depth cannot end the process.

Parsers call themselves for every level, so a megabyte of `[` ends in a RecursionError or, where somebody raised the
limit of recursion, in a crash. Depth is counted before anything is parsed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

__all__ = ["MAX_DEPTH", "parse_json"]

MAX_DEPTH = 64  # levels of lists and objects; what this product writes has fewer than ten
_TO_BRACKET = re.compile(r'(?:[^\[\]{}"]++|"(?:[^"\\]++|\\.)*+"?)*+([\[\]{}])', re.DOTALL)


def parse_json(content: bytes | str, *, object_hook: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """The value of a JSON document.

    Args:
        content: Of bytes, UTF-8, 16 or 32.
        object_hook: As for `json.loads`.

    Raises:
        ValueError: It is not JSON, is nested deeper than `MAX_DEPTH`, or has a number with too many digits.
    """
    text = content.decode(json.detect_encoding(content), "surrogatepass") if isinstance(content, bytes) else content
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _require_shallow(text)
    return json.loads(text, object_hook=object_hook)


def _require_shallow(text: str) -> None:
    depth, position = 0, 0
    while found := _TO_BRACKET.match(text, position):  # from there, never inside a text
        depth, position = depth + (1 if found[1] in "[{" else -1), found.end()
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
