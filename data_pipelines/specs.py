"""Plain data to frozen dataclasses, with one clear line for whatever is wrong in it.

Objectives state what they want as mappings of numbers and names. A dataclass says which keys there are; the checks
here are what its `__post_init__` needs. Not here: what the keys mean (`views`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn, TypeVar

from data_pipelines.errors import DataError, suggest

__all__ = [
    "RESERVED_NAMES",
    "is_number",
    "is_range",
    "read_spec",
    "refuse",
    "require_choice",
    "require_count",
    "require_integers",
    "require_name",
    "require_probabilities",
]

RESERVED_NAMES = ("sample_id", "seed")  # other entries of a batch

T = TypeVar("T")


def read_spec(cls: type[T], spec: Mapping[str, Any], label: str) -> T:
    """Build a dataclass from a mapping of its fields; lists become tuples, a key `kind` is passed over.

    Args:
        cls: the dataclass; it checks the values itself.
        spec: the mapping.
        label: what messages call it, such as `view 'global'`.

    Raises:
        DataError: a key is unknown or missing, or a value is refused.
    """
    known: dict[str, Field[Any]] = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    allowed = [*known, "kind"]
    for name in spec:
        if name not in allowed:
            hint = suggest(str(name), allowed)
            raise DataError(f"{label}: unknown key {name!r}; allowed: {', '.join(allowed)}{hint}")
    for name, field in known.items():
        if field.default is MISSING and name not in spec:
            raise DataError(f"{label}: {name!r} is missing")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in spec.items()}
    values.pop("kind", None)
    return cls(**values)


def refuse(where: str, key: str, value: object, rule: str) -> NoReturn:
    """Raise the one line about a value; `rule` completes "it is ..."."""
    raise DataError(f"{where}: {key}={value!r} is not allowed; it is {rule}")


def require_name(name: object) -> str:
    """A view's name can be the entry of a batch; returns what messages call the view."""
    if not isinstance(name, str) or not name or name in RESERVED_NAMES or "." in name:
        raise DataError(
            f"view name {name!r} is not allowed; give a name other than {', '.join(RESERVED_NAMES)}, without a dot"
        )
    return f"view {name!r}"


def require_count(where: str, count: object) -> None:
    """The count of a view is an integer from 1, or not given."""
    if count is not None:
        require_integers(where, 1, count=count)


def require_integers(where: str, least: int, **values: object) -> None:
    """Each value is an integer from `least`."""
    for key, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            refuse(where, key, value, f"an integer from {least}")


def require_probabilities(where: str, **values: object) -> None:
    """Each value is in [0, 1]."""
    for key, value in values.items():
        if not is_number(value) or not 0 <= value <= 1:  # type: ignore[operator]
            refuse(where, key, value, "a probability in 0..1")


def require_choice(where: str, key: str, value: object, choices: Iterable[str]) -> None:
    """The value is one of the names."""
    names = tuple(choices)
    if value not in names:
        refuse(where, key, value, f"one of {', '.join(names)}{suggest(str(value), names)}")


def is_number(value: object) -> bool:
    """True for finite and infinite numbers, not for booleans; NaN fails whatever range is asked of it afterwards."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_range(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """True for a pair of finite numbers `low <= first <= second <= high`."""
    if not isinstance(value, tuple) or len(value) != 2 or not all(map(is_number, value)):
        return False
    return low <= value[0] <= value[1] <= high and not any(map(math.isinf, value))
