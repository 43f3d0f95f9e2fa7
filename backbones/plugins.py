"""What other installed packages add, by the entry points they declare. Imports nothing heavy, and no plug-in.

Backbones, objectives and evaluation protocols are all found with it, each in an entry-point group of its own; see
docs/plugins.md.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import EntryPoint, EntryPoints
from typing import Any

__all__ = ["by_name", "entry_points", "load_entry", "origin"]


@cache
def entry_points(group: str) -> EntryPoints:
    """Those of one group; the installed packages are looked through once per process."""
    return _all_entry_points().select(group=group)


@cache
def _all_entry_points() -> EntryPoints:
    return importlib.metadata.entry_points()  # type: ignore[return-value]  # the stubs of 3.11 still have 3.9's type


def by_name(
    entries: Iterable[EntryPoint], noun: str, taken: Mapping[str, str], error: type[Exception]
) -> dict[str, EntryPoint]:
    """Entry points by their names.

    Args:
        entries: all of one group.
        noun: what they are, for the message.
        taken: reserved name -> owner.
        error: what to raise.

    Raises:
        error: two packages claim one name, or one that is taken.
    """
    found: dict[str, EntryPoint] = {}
    for entry in entries:
        owner = origin(found[entry.name]) if entry.name in found else taken.get(entry.name)
        if owner is not None:
            raise error(
                f"{noun} {entry.name!r} of {origin(entry)} is already taken by {owner}; rename one, or uninstall one"
            )
        found[entry.name] = entry
    return found


def load_entry(entry: EntryPoint, noun: str, error: type[Exception]) -> Any:
    """What an entry point names; this imports the plug-in.

    Raises:
        error: it cannot be imported, or has no such attribute.
    """
    try:
        return entry.load()
    except (ImportError, AttributeError) as reason:
        raise error(f"{noun} {entry.name!r}: cannot import {origin(entry)}: {reason}") from reason


def origin(entry: EntryPoint) -> str:
    """Where an entry point leads and, where known, which installed package declares it."""
    return entry.value if entry.dist is None else f"{entry.value} (package {entry.dist.name})"
