"""Do a backbone and the data go together? Told by the names of the first sample's fields, before anything starts.

A recipe of point clouds on photos, or the other way round, is the mistake of a moment. What an objective reads of data
of the right kind is found out later (`pretrain.training.preflight`). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbones.registry import IMAGE, config_class
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import INPUT_FIELDS
from data_pipelines.shards.source import expand_source
from data_pipelines.shards.tar_walk import first_fields
from data_pipelines.storage.locations import is_local
from pretrain.config.recipe_files import recipe_content, recipe_names

__all__ = ["fitting_recipes", "photos_problem", "source_problem"]

# Kind of backbone -> kind of view, and what messages call such data.
_VIEWS = {IMAGE: ("image", "images"), "points": ("points", "point clouds"), "voxels": ("volume", "volumes")}
# Fields that any kind may read, and that say nothing of what is in them.
_SAYS_NOTHING = ("npy", "npz")
_MOST_NAMES = 5


def source_problem(kind: str, source: str, *, allow_pipe: bool) -> str | None:
    """Why a backbone of this kind cannot read a source; None where it can, or where that is not known yet.

    Args:
        kind: of the backbone; of one that a plug-in adds nothing is known.
        source: shards, with absolute paths. Only those of this machine are looked at.
    """
    if kind not in _VIEWS or not is_local(source):
        return None
    try:
        fields = first_fields(Path(expand_source(source, allow_pipe=allow_pipe)[0]))
    except (DataError, OSError):  # whoever opens the shards says what is wrong with them
        return None
    read = INPUT_FIELDS[_VIEWS[kind][0]]
    if not fields or not fields.isdisjoint(read):
        return None
    found = {other: field for other in _VIEWS for field in _telling(other) if field in fields}
    if not found:
        return f"its samples have {', '.join(sorted(fields))}, and backbone.kind={kind} reads {' or '.join(read)}"
    other = next(iter(found))
    return f"its field {found[other]} holds {_VIEWS[other][1]}, and {_reads(kind)}; {fitting_recipes(other)}"


def photos_problem(kind: str) -> str | None:
    """Why a backbone of this kind cannot read a folder of photos; None where it can, or where that is not known."""
    if kind == IMAGE or kind not in _VIEWS:
        return None
    grids = "photos with known cameras become volumes by `pretrain data radiance`; " if kind == "voxels" else ""
    return f"it holds photos, and {_reads(kind)}; {grids}{fitting_recipes(IMAGE)}"


def _telling(kind: str) -> tuple[str, ...]:
    return tuple(field for field in INPUT_FIELDS[_VIEWS[kind][0]] if field not in _SAYS_NOTHING)


def _reads(kind: str) -> str:
    return f"backbone.kind={kind} reads {_VIEWS[kind][1]} ({', '.join(_telling(kind))})"


def fitting_recipes(kind: str, channels: int | None = None) -> str:
    """The recipes for data of this kind of backbone, of volumes those for so many channels; empty: there are none.

    Recipes of several kinds of data side by side are for none of them alone.
    """
    recipes = {name: recipe_content(name) for name in recipe_names()}
    alone = {name: recipe for name, recipe in recipes.items() if (recipe.get("data") or {}).get("mixture_by") != "join"}
    backbones = {name: recipe.get("backbone") or {} for name, recipe in alone.items()}
    names = [name for name, backbone in backbones.items() if backbone.get("kind", IMAGE) == kind]
    if kind == "voxels" and channels is not None:
        names = [name for name in names if _channels(backbones[name]) == channels]
    if not names:
        return ""
    more = f" and {len(names) - _MOST_NAMES} more (pretrain recipes)" if len(names) > _MOST_NAMES else ""
    return f"recipes of {_VIEWS[kind][1]}: {', '.join(names[:_MOST_NAMES])}{more}"


def _channels(backbone: Mapping[str, Any]) -> int:
    """Of the volumes that a recipe's backbone takes."""
    default = config_class("voxels", backbone.get("name"))().in_chans
    return int(backbone.get("in_chans", default))
