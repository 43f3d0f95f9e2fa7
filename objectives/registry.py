"""Objectives by name: the built-in ones and those of other installed packages. Imports no torch until `load`."""

from __future__ import annotations

import difflib
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

from backbones.plugins import by_name, entry_points, load_entry, origin
from objectives.dino.config import DINOConfig
from objectives.errors import ObjectiveError
from objectives.gmml.config import GMMLConfig
from objectives.mae.config import MAEConfig
from objectives.selfpatch.config import SelfPatchConfig
from objectives.sit.config import SiTConfig

if TYPE_CHECKING:
    from objectives.base import Objective

__all__ = ["ENTRY_POINT_GROUP", "OBJECTIVES", "config_class", "load", "names"]

ENTRY_POINT_GROUP = "pretrain.objectives"

# name -> where its class is. Settings are in a `config.py` beside each, so that a recipe is checked without torch.
OBJECTIVES: dict[str, str] = {
    "dino": "objectives.dino.objective:DINO",
    "gmml": "objectives.gmml.objective:GMML",
    "mae": "objectives.mae.objective:MAE",
    "selfpatch": "objectives.selfpatch.objective:SelfPatch",
    "sit": "objectives.sit.objective:SiT",
}
_CONFIGS: dict[str, type] = {
    "dino": DINOConfig,
    "gmml": GMMLConfig,
    "mae": MAEConfig,
    "selfpatch": SelfPatchConfig,
    "sit": SiTConfig,
}


@cache
def _all() -> dict[str, EntryPoint]:
    """Built-in objectives and the entry points of other packages (`name = "package.module:Class"`)."""
    built_in = {name: EntryPoint(name, value, ENTRY_POINT_GROUP) for name, value in OBJECTIVES.items()}
    return built_in | by_name(entry_points(group=ENTRY_POINT_GROUP), "objective", OBJECTIVES, ObjectiveError)


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
        ObjectiveError: unknown name, or a plug-in that cannot be imported or is no objective.
    """
    if name not in _all():
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ObjectiveError(f"objective {name!r} is not known; {hint}known: {', '.join(names())}")
    entry = _all()[name]
    found = load_entry(entry, "objective", ObjectiveError)
    if name not in OBJECTIVES:
        _check_plugin(entry, found)
    return found


def _check_plugin(entry: EntryPoint, found: Any) -> None:
    """Refuse what is no objective, before anything fails in a stranger way.

    Raises:
        ObjectiveError: it is not a subclass of `Objective`, or its `Config` is not a dataclass with a `name`.
    """
    from objectives.base import Objective  # with torch, which a plug-in has imported by now

    where = f"objective {entry.name!r}: {origin(entry)}"
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ObjectiveError(f"{where} is not a subclass of objectives.base.Objective")
    config = getattr(found, "Config", None)
    settings = [field.name for field in fields(config)] if is_dataclass(config) else []
    if "name" not in settings:
        raise ObjectiveError(f"{where} needs a class attribute Config: a dataclass of its settings, with name: str")
