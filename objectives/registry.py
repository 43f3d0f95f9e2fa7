"""Objectives by name: the folders of this package, and what other installed packages register.

An objective is a folder with two files, and that is all of its registration:

    config.py       one dataclass of settings, with `name: str = "..."` among them; imports no torch
    objective.py    one subclass of `objectives.base.Objective` whose `Config` is that dataclass

Folders of this package are found by looking. Other packages name theirs in the entry-point group `pretrain.objectives`
(`mine = "my_package.mine"`); an objective in one file is named as a class (`mine = "my_package.module:Class"`), and
then its settings cannot be had without importing it. Nothing here imports torch until `load`.
"""

from __future__ import annotations

import pkgutil
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import objectives
from backbones.errors import suggest
from backbones.plugins import by_name, entry_points, load_entry, origin
from objectives.errors import ObjectiveError

if TYPE_CHECKING:
    from objectives.base import Objective

__all__ = ["ENTRY_POINT_GROUP", "built_in_names", "config_class", "load", "names"]

ENTRY_POINT_GROUP = "pretrain.objectives"


@cache
def _built_in() -> dict[str, str]:
    """Names of the folders of this package -> their packages.

    Raises:
        ObjectiveError: two folders have the same name, or a `config.py` has no settings.
    """
    found: dict[str, str] = {}
    for place in objectives.__path__:
        for folder in sorted(entry.name for entry in pkgutil.iter_modules([place]) if entry.ispkg):
            if all((Path(place) / folder / file).is_file() for file in ("config.py", "objective.py")):
                package = f"{objectives.__name__}.{folder}"
                name = _settings(import_module(f"{package}.config"))().name
                if name in found:
                    raise ObjectiveError(f"objective {name!r} of {package} is already taken by {found[name]}")
                found[name] = package
    return found


@cache
def _all() -> dict[str, EntryPoint]:
    """Built-in objectives and those of other packages, all as entry points."""
    built_in = {name: EntryPoint(name, package, ENTRY_POINT_GROUP) for name, package in _built_in().items()}
    return built_in | by_name(entry_points(group=ENTRY_POINT_GROUP), "objective", _built_in(), ObjectiveError)


def built_in_names() -> tuple[str, ...]:
    """The objectives of this package, sorted."""
    return tuple(sorted(_built_in()))


def names() -> tuple[str, ...]:
    """All known objectives, sorted."""
    return tuple(sorted(_all()))


def config_class(name: str) -> type:
    """The dataclass of an objective's settings; imports no torch unless a plug-in is registered as a class.

    Raises:
        ObjectiveError: unknown name, or a plug-in that cannot be imported or is no objective.
    """
    entry = _entry(name)
    return _settings(_module(entry, "config")) if _is_folder(entry) else load(name).Config


def load(name: str) -> type[Objective]:
    """The class of an objective; `load(name)(backbone, config)` builds it.

    Raises:
        ObjectiveError: unknown name, or a plug-in that cannot be imported or is no objective.
    """
    entry = _entry(name)
    if not _is_folder(entry):
        return _checked(entry, load_entry(entry, "objective", ObjectiveError))
    config, module = config_class(name), _module(entry, "objective")
    found = [thing for thing in _own_classes(module) if getattr(thing, "Config", None) is config]
    if len(found) != 1:
        raise ObjectiveError(
            f"{module.__file__}: needs one class with Config = {config.__name__}, and has {len(found)} of them"
        )
    return _checked(entry, found[0])


def _entry(name: str) -> EntryPoint:
    if name not in _all():
        raise ObjectiveError(f"objective {name!r} is not known; known: {', '.join(names())}{suggest(name, names())}")
    return _all()[name]


def _is_folder(entry: EntryPoint) -> bool:
    """Whether it names a package with `config.py` and `objective.py`, not a class."""
    return ":" not in entry.value


def _module(entry: EntryPoint, file: str) -> ModuleType:
    """A file of an objective's folder; this imports it."""
    inside = EntryPoint(entry.name, f"{entry.value}.{file}", entry.group)
    module = load_entry(inside, "objective", ObjectiveError)
    assert isinstance(module, ModuleType)  # an entry point without an attribute
    return module


def _settings(module: ModuleType) -> type:
    """The dataclass of settings in a `config.py`.

    Raises:
        ObjectiveError: there is none, or more than one.
    """
    found = [thing for thing in _own_classes(module) if "name" in _field_names(thing)]
    if len(found) != 1:
        raise ObjectiveError(f"{module.__file__}: needs one dataclass with name: str, and has {len(found)} of them")
    return found[0]


def _own_classes(module: ModuleType) -> list[type]:
    """Classes that a module defines, not those that it imports."""
    return [thing for thing in vars(module).values() if isinstance(thing, type) and thing.__module__ == module.__name__]


def _field_names(thing: Any) -> list[str]:
    return [field.name for field in fields(thing)] if is_dataclass(thing) else []


def _checked(entry: EntryPoint, found: Any) -> type[Objective]:
    """Refuse what is no objective, before anything fails in a stranger way.

    Raises:
        ObjectiveError: it is not a subclass of `Objective`, or its `Config` is not a dataclass with a `name`.
    """
    from objectives.base import Objective  # with torch, which the objective has imported by now

    where = f"objective {entry.name!r}: {origin(entry)}"
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ObjectiveError(f"{where} is not a subclass of objectives.base.Objective")
    if "name" not in _field_names(getattr(found, "Config", None)):
        raise ObjectiveError(f"{where} needs a class attribute Config: a dataclass of its settings, with name: str")
    return found
