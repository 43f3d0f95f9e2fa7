"""The mistakes of one request, collected so that all of them are reported at once.

Each line reads `ORIGIN: KEY=VALUE: what is wrong; what is allowed`. Nothing here knows a particular setting.
"""

from __future__ import annotations

from typing import Any

from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError

__all__ = ["COMMAND_LINE", "Mistakes", "shown"]

COMMAND_LINE = "command line"


def shown(value: Any) -> str:
    """A value as a user would write it in YAML, shortened, without credentials in its URLs."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    text = redact(" ".join(text.split()), marked=True)
    return text if len(text) <= 80 else text[:77] + "..."


class Mistakes:
    """Collects mistakes and remembers which layer gave each setting its value."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._wrong: set[str] = set()
        self._given: dict[str, tuple[int, str, Any]] = {}  # key -> (when it was set, origin, value as written)
        self._parts: dict[str, tuple[Any, str]] = {}  # key -> (its value, how that was written with others)

    def note_origin(self, key: str, origin: str, value: Any) -> None:
        """Record that `origin` set `key`; the last one counts."""
        self._given[key] = (len(self._given) if origin != COMMAND_LINE else 1_000_000 + len(self._given), origin, value)

    def note_part(self, key: str, value: Any, written: str) -> None:
        """Record that `key` has a value by what was `written` of another setting; mistakes of that value quote it."""
        self._parts[key] = value, written

    def add(self, key: str, value: Any, problem: str, *, origin: str | None = None) -> None:
        """Add a mistake about `key`; its origin is the layer that set it last unless given."""
        if value is None and self.is_typed(key):
            value = self.written(key)  # `KEY=` means null as well, and is quoted as it was typed
        part_value, text = self._parts.get(key, (None, ""))
        if not text or part_value != value:
            text = f"{key}={shown(value)}"
        self.lines.append(f"{origin or self.origin(key)}: {text}: {problem}")
        self._wrong.add(key)

    def add_stray(self, text: str, problem: str, *, origin: str = COMMAND_LINE) -> None:
        """Add a mistake that leaves every setting as it was, e.g. text that is not key=value."""
        self.lines.append(f"{origin}: {text}: {problem}")

    def add_missing(self, key: str, origin: str, remedy: str) -> None:
        """Add a mandatory setting nobody gave."""
        self.lines.append(f"{origin}: {key} is required: {remedy}")
        self._wrong.add(key)

    def distrust(self, key: str) -> None:
        """Mark `key` as unusable without a line of its own (its cause is already reported)."""
        self._wrong.add(key)

    def is_wrong(self, key: str) -> bool:
        """True when a mistake concerns exactly `key`."""
        return key in self._wrong

    def sound(self, *keys: str) -> bool:
        """True when no mistake concerns any of `keys` or a part of them."""
        return not any(
            wrong == key or wrong.startswith((f"{key}.", f"{key}[")) or key.startswith((f"{wrong}.", f"{wrong}["))
            for key in keys
            for wrong in self._wrong
        )

    def origin(self, key: str) -> str:
        """Who set `key`, or the closest part of the recipe around it."""
        while key:
            if key in self._given:
                return self._given[key][1]
            key = key.rpartition("[" if key.endswith("]") else ".")[0]
        return "default"

    def written(self, key: str) -> Any:
        """What the layer that set exactly `key` last has written, references and all; None when no layer did."""
        return self._given[key][2] if key in self._given else None

    def refers_to(self, key: str) -> bool:
        """True when a layer has written `${key}` anywhere."""
        return any(f"${{{key}}}" in str(written) for _, _, written in self._given.values())

    def is_typed(self, key: str) -> bool:
        """True when the command line set exactly `key`."""
        return key in self._given and self._given[key][1] == COMMAND_LINE

    def is_given(self, key: str) -> bool:
        """True when a layer set exactly `key`."""
        return key in self._given

    def forget(self, key: str) -> None:
        """What layers said of `key` does not count any more."""
        self._given.pop(key, None)

    def latest(self, *keys: str) -> str:
        """The key among `keys` that was set last: the one to blame when they contradict each other."""
        return max(keys, key=lambda key: self._given[key][0] if key in self._given else -1)

    def raise_if_any(self) -> None:
        """Raise one `RequestError` with all lines."""
        if self.lines:
            raise RequestError(*self.lines)
