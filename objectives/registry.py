"""Objectives by name: the built-in ones and those of other installed packages. Imports no torch until `load`."""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from objectives.configs import MAEConfig
from objectives.errors import ObjectiveError

if TYPE_CHECKING:
    from objectives.base import Objective

__all__ = ["ENTRY_POINT_GROUP", "OBJECTIVES", "config_class", "load", "names"]

ENTRY_POINT_GROUP = "pretrain.objectives"

# name -> where its class is. Settings of these are in objectives.configs, so that a recipe is checked without torch.
OBJECTIVES: dict[str, str] = {"mae": "objectives.mae:MAE"}
_CONFIGS: dict[str, type] = {"mae": MAEConfig}


@cache
def _all() -> dict[str, str]:
    """Built-in objectives and the entry points of other packages (`name = "package.module:Class"`)."""
    found = dict(OBJECTIVES)
    for entry in entry_points(group=ENTRY_POINT_GROUP):
        if entry.name in found:
            raise ObjectiveError(
                f"objective {entry.name!r} of {entry.value} is already taken by {found[entry.name]}; rename one"
            )
        found[entry.name] = entry.value
    return found


def names() -> tuple[str, ...]:
    """All known objectives, sorted."""
    return tuple(sorted(_all()))


def config_class(name: str) -> type:
    """The dataclass of an objective's settings; for a plug-in it is `Class.Config`, which imports the plug-in.

    Raises:
        ObjectiveError: unknown name.
    """
    return _CONFIGS[name] if name in _CONFIGS else load(name).Config


def load(name: str) -> type[Objective]:
    """The class of an objective; `load(name)(backbone, config)` builds it.

    Raises:
        ObjectiveError: unknown name, or a plug-in that cannot be imported.
    """
    if name not in _all():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ObjectiveError(f"objective {name!r} is not known; {hint}known: {', '.join(names())}")
    module, _, attribute = _all()[name].partition(":")
    try:
        return getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ObjectiveError(f"objective {name!r}: cannot import {_all()[name]}: {error}") from error
