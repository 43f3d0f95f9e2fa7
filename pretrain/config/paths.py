"""Paths in settings, made absolute: those of the package, of the home directory, of the current folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from data_pipelines.files import expanded
from data_pipelines.storage.locations import scheme_of

__all__ = ["absolute", "absolute_reference"]

_PACKAGE = Path(__file__).parents[1]


def absolute(path: str | None) -> Any:
    """The absolute form of a path: `package:` is in the installed package, `~` at home, others in the current folder.

    URLs, commands and None come back as they are.
    """
    if path is None or "://" in path or scheme_of(path) == "pipe":
        return path
    if path.startswith("package:"):
        return str(_PACKAGE / path.removeprefix("package:"))
    return os.path.abspath(expanded(path))


def absolute_reference(reference: str | None) -> str | None:
    """A reference to a checkpoint with the path in it, if there is one, made absolute."""
    if not reference or reference.startswith(("runs:/", "models:/")):
        return reference
    if reference.startswith("timm:"):
        name, at, file = reference.partition("@")
        return f"{name}@{absolute(file)}" if at else reference
    is_path = "/" in reference or reference.endswith(".safetensors") or os.path.exists(expanded(reference))
    return str(absolute(reference)) if is_path else reference
