"""Evaluation protocols by name, readable without torch.

A built-in protocol is a folder of `evaluation.protocols` with `spec.py` (its `SPEC`, a `Protocol`) and `score.py`;
there is no list of them. Other packages add protocols through the entry-point group `pretrain.evaluations`, whose
entries load to `Protocol` objects.

Not here: what a protocol is (`evaluation.protocol`), what heads compute (`score.py` of each).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

from backbones.errors import suggest
from backbones.plugins import by_name, entry_points, load_entry, origin
from evaluation import protocols
from evaluation.extraction.recipe import EXTRACTIONS, fits
from evaluation.protocol import EvaluationError, Metric, Protocol, described

__all__ = [
    "PROTOCOLS",
    "EvaluationError",
    "Metric",
    "Protocol",
    "describe",
    "fitting",
    "load_head",
    "names",
    "protocol",
]

ENTRY_POINT_GROUP = "pretrain.evaluations"
_FACTS = tuple(field.name for field in fields(Metric))


def _built_in() -> dict[str, Protocol]:
    """The protocols of this package by name: every folder with both files."""
    specs = sorted(spec for place in protocols.__path__ for spec in Path(place).glob("*/spec.py"))
    folders = [spec.parent.name for spec in specs if spec.with_name("score.py").is_file()]
    return {folder: import_module(f"{protocols.__name__}.{folder}.spec").SPEC for folder in folders}


PROTOCOLS: dict[str, Protocol] = _built_in()


def _plugins() -> dict[str, EntryPoint]:
    built_in = {name: entry.target for name, entry in PROTOCOLS.items()}
    return by_name(entry_points(group=ENTRY_POINT_GROUP), "protocol", built_in, EvaluationError)


def names() -> tuple[str, ...]:
    """Sorted names of all known protocols, plug-ins included (these are not imported)."""
    return tuple(sorted({*PROTOCOLS, *_plugins()}))


def protocol(name: str) -> Protocol:
    """Returns the protocol called `name`.

    Raises:
        EvaluationError: unknown name (the nearest known ones are named), or a plug-in that cannot be imported or is no
            `Protocol` of that name.
    """
    if name in PROTOCOLS:
        return PROTOCOLS[name]
    plugins = _plugins()
    if name not in plugins:
        known = f"known: {', '.join(names())}{suggest(name, names())}"
        raise EvaluationError(f"unknown evaluation protocol {name!r}; {known}")
    found = load_entry(plugins[name], "protocol", EvaluationError)
    if not isinstance(found, Protocol) or found.name != name:
        raise EvaluationError(f"entry point {origin(plugins[name])} must be a Protocol named {name!r}, got {found!r}")
    return found


def fitting(kind: str, among: Iterable[str] = PROTOCOLS) -> tuple[str, ...]:
    """Names of those protocols that backbones of a kind can be evaluated by; all, of a kind that a plug-in adds.

    What such a kind gives is known when its `Extraction` has been imported, which may take torch.

    Raises:
        EvaluationError: as `protocol`, for names in `among`.
    """
    known = EXTRACTIONS.get(kind)
    return tuple(name for name in among if known is None or fits(protocol(name), kind, known.tokens, known.axes))


def describe(name: str, reported: Iterable[str], facts: Iterable[Mapping[str, Any]] = ()) -> tuple[Metric, ...]:
    """What the numbers of a record mean.

    Args:
        name: of the protocol, which need not be installed any more.
        reported: names of the numbers.
        facts: what the record says of them, the fields of a `Metric` each. A record of an older version says nothing:
            then they mean what the protocol says now, and without the protocol fractions, the headline first.
    """
    if told := tuple(tuple(fact.items()) for fact in facts):
        return _as_told(tuple(reported), told)
    known = {metric.name: metric for metric in protocol(name).metrics} if name in names() else {}
    return described(known.get(metric, metric) for metric in reported)


@lru_cache(maxsize=256)  # the records of a protocol all say the same, and a leaderboard reads thousands
def _as_told(reported: tuple[str, ...], told: tuple[tuple[tuple[str, Any], ...], ...]) -> tuple[Metric, ...]:
    facts = map(dict, told)
    known = {str(fact["name"]): Metric(**{key: fact[key] for key in _FACTS if key in fact}) for fact in facts}
    return described(known.get(metric, metric) for metric in reported)


def load_head(spec: Protocol) -> Any:
    """Imports and returns the function behind `spec.target`.

    Raises:
        EvaluationError: it cannot be imported.
    """
    return load_entry(EntryPoint(spec.name, spec.target, ENTRY_POINT_GROUP), "protocol", EvaluationError)
