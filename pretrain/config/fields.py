"""What the schema says about each setting, by dotted key: type, bounds, and the words for error messages.

Keys of settings inside a list carry `[]` for the index, e.g. `evaluation.tasks[].protocol`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from pretrain.config.schema import Recipe

__all__ = ["Setting", "declared_settings", "template"]

_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_BOOLEANS = ("yes", "no", "on", "off")  # texts to `parse_yaml`, and clear where true or false is expected
_STAND_INS: dict[Any, Any] = {int: 1, float: 1.0, str: "", bool: False}


@dataclass(frozen=True)
class Setting:
    """One declared setting."""

    key: str
    kind: Any  # declared type without `| None`
    optional: bool
    metadata: Mapping[str, Any]

    @property
    def item_class(self) -> type | None:
        """The dataclass of the items when this is a list of settings."""
        item = get_args(self.kind)[0] if get_origin(self.kind) is list else None
        return item if is_dataclass(item) and isinstance(item, type) else None

    @property
    def is_mapping(self) -> bool:
        """True when any names may be set below this one."""
        return get_origin(self.kind) is dict

    @property
    def stand_in(self) -> Any:
        """A harmless value of the right type, put where a mistake was found so that the other checks can go on."""
        return {} if self.is_mapping else [] if get_origin(self.kind) is list else _STAND_INS.get(self.kind)

    @property
    def metavar(self) -> str:
        """What stands for the value in an example."""
        return self.metadata.get("metavar") or {int: "N", float: "X"}.get(self.kind, "VALUE")

    @property
    def expectation(self) -> str:
        """What is allowed, in words, e.g. `a whole number in [0, 3]`."""
        if choices := self.metadata.get("choices"):
            words = f"one of {', '.join(choices)}"
        elif self.item_class:
            words = "a list of mappings"
        elif get_origin(self.kind) is list:
            length = self.metadata.get("length")
            items = "texts" if get_args(self.kind) == (str,) else "numbers"
            words = f"a list of {length} {items}" if length else f"a list of {items}"
        elif self.is_mapping:
            words = "a mapping {name: value}"
        else:
            words = _WORDS.get(self.kind, str(self.kind))
        low, high = self.metadata.get("range") or (None, None)
        if low is not None and high is not None:
            words += f" in [{low:g}, {high:g}]" if max(abs(low), abs(high)) < 1e6 else f" in [{low}, {high}]"
        elif low is not None:
            words += f" >= {low:g}"
        elif high is not None:
            words += f" <= {high:g}"
        return words + (" or null" if self.optional else "")

    def has_right_type(self, value: Any) -> bool:
        """Refuse what OmegaConf would silently convert: numbers to booleans; booleans, lists and fractions to texts."""
        if value is None:
            return self.optional
        if self.kind is bool:
            return isinstance(value, bool) or (isinstance(value, str) and value.lower() in _BOOLEANS)
        if self.kind is str:
            return _is_text(value)
        if self.is_mapping and get_args(self.kind)[1] is str:
            return isinstance(value, Mapping) and all(map(_is_text, value.values()))
        return True

    def takes_text(self, declared: str) -> bool:
        """True when what `declared` names, this setting or an item in it, is a text."""
        if declared == self.key:
            return self.kind is str
        return not self.item_class and get_args(self.kind)[-1:] == (str,)

    def is_in_range(self, value: Any) -> bool:
        """True when a value of the right type keeps the bounds, choices and length."""
        if value is None:
            return True
        choices, length = self.metadata.get("choices"), self.metadata.get("length")
        if (choices and value not in choices) or (length and len(value) != length):
            return False
        low, high = self.metadata.get("range") or (None, None)
        numbers = value if isinstance(value, list) else [value]
        return all(
            _is_finite(number) and (low is None or number >= low) and (high is None or number <= high)
            for number in numbers
            if isinstance(number, int | float)
        )


def _is_text(value: Any) -> bool:
    """True of texts, and of the whole numbers that a file may have in their place; 1.10 would lose its zero."""
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_finite(number: float) -> bool:
    return math.isfinite(number) if isinstance(number, float) else abs(number) < 2**63


def template(key: str) -> str:
    """`evaluation.tasks[3].data` -> `evaluation.tasks[].data`."""
    return re.sub(r"\[\d+\]", "[]", key)


def declared_settings(chosen: Mapping[str, type | None]) -> tuple[dict[str, Setting], frozenset[str]]:
    """All settings of a recipe.

    Args:
        chosen: the settings class of each section that a name chooses, such as "objective"; None: unknown, and left
            out.

    Returns:
        the settings by key, and the keys of the sections that hold them (`""` is the whole recipe).
    """
    settings: dict[str, Setting] = {}
    sections = {""}

    def walk(owner: type, prefix: str) -> None:
        for entry, hint in _fields(owner):
            key = f"{prefix}.{entry.name}".removeprefix(".")
            kind = chosen[key] if key in chosen else _without_none(hint)
            if kind is None:
                continue
            if isinstance(kind, type) and is_dataclass(kind):
                sections.add(key)
                walk(kind, key)
                continue
            settings[key] = setting = Setting(key, kind, kind is not hint, entry.metadata)
            if setting.item_class:
                sections.add(f"{key}[]")
                walk(setting.item_class, f"{key}[]")

    walk(Recipe, "")
    return settings, frozenset(sections)


def _fields(owner: type) -> Iterator[tuple[Field[Any], Any]]:
    hints = get_type_hints(owner)
    for entry in fields(owner):
        yield entry, hints[entry.name]


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint
