"""Values as recipes and the command line write them.

YAML 1.1, which most libraries read, takes `010` for 8, `1:30` for 90, `no` for false and the rest of `pics #2` for a
comment. Here plain scalars are what YAML 1.2 makes of them, as far as that is the same number a person reads: `true`,
`null`, decimal numbers. Whatever else is a text, among it numbers with a leading zero, a colon or an underscore; a
setting that wants a number converts it as decimal or refuses it.

On the command line a setting of type text takes what was typed, character by character; only `null` and nothing at all
mean null. Settings of other types, sections and lists are YAML.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml

from data_pipelines.parsing import MAX_DEPTH

__all__ = ["Typed", "first_line", "parse_yaml", "texts_in", "typed"]

_MAX_VALUES = 100_000  # of a document; the longest recipe has a thousand


@dataclass(frozen=True)
class Typed:
    """A value of the command line.

    Attributes:
        text: As typed.
        value: What it means as YAML; None where it is none.
        problem: Why it is no YAML.
    """

    text: str
    value: Any = None
    problem: str | None = None

    @property
    def as_text(self) -> str | None:
        """What it means for a setting of type text."""
        return None if self.text in ("", "null") else self.text

    def __str__(self) -> str:
        return self.text


def typed(text: str) -> Typed:
    """The value that `text` is on the command line."""
    try:
        return Typed(text, parse_yaml(text))
    except yaml.YAMLError as error:
        return Typed(text, problem=f"not readable as a YAML value: {first_line(error)}")


def parse_yaml(text: str) -> Any:
    """The value of a YAML document: dicts, lists, texts, numbers, booleans, None.

    Raises:
        yaml.YAMLError: It is not YAML, names a key twice, asks for another type by a tag, or has more levels or values
            than any recipe.
    """
    return yaml.load(text, _Loader)


def texts_in(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """All texts in a value of a recipe, each with its key below `key`, such as `evaluation.tasks[0].protocol`."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, Mapping):
        for name, below in value.items():
            yield from texts_in(below, f"{key}.{name}" if key else f"{name}")
    elif isinstance(value, list):
        for index, below in enumerate(value):
            yield from texts_in(below, f"{key}[{index}]")


def first_line(error: Exception) -> str:
    """What a parser says is wrong, in one line."""
    said = getattr(error, "problem", None) or str(error) or type(error).__name__
    return str(said).splitlines()[0]


class _Loader(yaml.SafeLoader):
    """Knows the tags and plain scalars named at the top of this file, and no others.

    Depth and size are counted while the document is read, level by level, so that none can end the process. What an
    alias stands for counts each time: a few lines of aliases can stand for a document of any depth and size.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {
        tag: yaml.SafeLoader.yaml_constructors[tag]
        for tag in (*(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "float", "str")), None)
    }

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._measured: dict[yaml.Node, tuple[int, int]] = {}  # (levels, values) of a node with all below it

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()
        self._depth += 1
        _require_small(self._depth, 1, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if not isinstance(event, yaml.AliasEvent):
            below = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
            levels, values = zip((0, 0), *(self._measured[part] for part in parts), strict=True)
            self._measured[node] = 1 + max(levels), 1 + sum(values)
            _require_small(*self._measured[node], event.start_mark)
        elif node not in self._measured:
            raise yaml.composer.ComposerError(
                None, None, f"*{event.anchor} stands for a value that holds it", event.start_mark
            )
        return node

    def construct_unique(self, node: yaml.MappingNode) -> dict[Hashable, Any]:
        """A mapping that names no key twice; `<<` merges as in YAML 1.1."""
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    problem = f"key {key_node.value!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key_node.value)
        return self.construct_mapping(node, deep=True)

    def construct_list(self, node: yaml.SequenceNode) -> list[Any]:
        return list(self.construct_sequence(node, deep=True))  # at once, so that a list can not hold itself

    def construct_int(self, node: yaml.ScalarNode) -> int | str:
        text = str(self.construct_scalar(node))
        try:
            return int(text)
        except ValueError:  # more digits than Python converts: whoever wants a number refuses the text
            return text


def _require_small(levels: int, values: int, mark: yaml.Mark) -> None:
    """
    Raises:
        yaml.YAMLError: Part of a document has more levels or values.
    """
    if levels > MAX_DEPTH:
        raise yaml.composer.ComposerError(None, None, f"nested deeper than {MAX_DEPTH} levels", mark)
    if values > _MAX_VALUES:
        raise yaml.composer.ComposerError(None, None, f"stands for more than {_MAX_VALUES} values", mark)


_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.construct_unique)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.construct_list)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
for _tag, _pattern, _first in (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(0|[1-9][0-9]*)", list("-0123456789")),
    (
        "float",
        r"[-+]?[0-9]+(\.[0-9]*([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)|[-+]?\.[0-9]+([eE][-+][0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first)
