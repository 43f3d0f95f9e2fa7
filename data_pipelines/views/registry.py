"""The kinds of views by name: those of the folder `kinds`, and what plug-ins register.

A plug-in registers a kind where it defines the class, in the module of the objective that asks for it.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from importlib import import_module
from typing import TypeVar

from data_pipelines.errors import DataError
from data_pipelines.views import kinds as folder
from data_pipelines.views.base import View

__all__ = ["kinds", "register"]

Kind = TypeVar("Kind", bound=type[View])

_registered: dict[str, type[View]] = {}


def kinds() -> dict[str, type[View]]:
    """All kinds of views by name."""
    return _own() | _registered


def register(kind: Kind) -> Kind:
    """Add a kind of view; a decorator of its class.

    Raises:
        DataError: the name belongs to another kind.
    """
    other = kinds().get(kind.kind)
    if other is not None and (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
        raise DataError(f"view kind {kind.kind!r} is taken by {other.__module__}.{other.__qualname__}; choose another")
    _registered[kind.kind] = kind
    return kind


@cache
def _own() -> dict[str, type[View]]:
    modules = [import_module(f"{folder.__name__}.{module.name}") for module in pkgutil.iter_modules(folder.__path__)]
    members = [member for module in modules for member in vars(module).values()]
    classes = [member for member in members if isinstance(member, type) and issubclass(member, View)]
    return {kind.kind: kind for kind in classes if "kind" in vars(kind)}
