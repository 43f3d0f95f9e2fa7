"""Names of all models a recipe may ask for, without importing torch or timm.

Reading timm's installed sources as text gives the same list as `timm.list_models()` (a test compares the two) in some
60 ms, where importing timm takes seconds. NOT here: building a model (`backbones.registry`).
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from backbones.errors import BackboneError
from backbones.images.timm_internals import registered_names
from backbones.plugins import by_name, entry_points

__all__ = ["ENTRY_POINT_GROUP", "model_names", "plugins"]

ENTRY_POINT_GROUP = "pretrain.backbones"


@cache
def _timm_names() -> frozenset[str]:
    spec = find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        raise BackboneError("timm is not installed, so no backbone is available; install it with: pip install timm")
    return registered_names(Path(spec.submodule_search_locations[0]) / "models")


@cache
def plugins() -> dict[str, EntryPoint]:
    """Backbones that other installed packages add: entry-point name -> entry point, in the group `pretrain.backbones`.

    An entry point is a function that builds the network, as timm's model functions do; see `backbones.registry`.

    Raises:
        BackboneError: two packages claim one name, or a name that timm has.
    """
    taken = dict.fromkeys(_timm_names(), "timm")
    return by_name(entry_points(group=ENTRY_POINT_GROUP), "backbone", taken, BackboneError)


@cache
def model_names() -> tuple[str, ...]:
    """All names `create_backbone` looks up, sorted: timm's registered models and the plug-ins of installed packages."""
    return tuple(sorted(_timm_names() | plugins().keys()))
