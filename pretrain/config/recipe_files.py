"""The recipes that come with the package, and recipes as files: names, paths, and what is written in them.

Not here: what a recipe becomes (`pretrain.config.load`).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from yaml import YAMLError

from data_pipelines.files import expanded
from pretrain.config.mistakes import shown
from pretrain.config.values import first_line, parse_yaml
from pretrain.errors import RequestError, nearest, nearest_file

__all__ = ["read_yaml", "recipe_content", "recipe_names", "recipe_path"]

_RECIPES = Path(__file__).parents[1] / "recipes"


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        RequestError: there is no such recipe or file.
    """
    text = str(name_or_path)
    if text in recipe_names():
        return _RECIPES / f"{text}.yaml"
    path = expanded(text)
    if os.path.isfile(path):  # unlike `Path.is_file`, also of names that no file can have
        return path.absolute()
    if re.fullmatch(r"[a-z_]+(\.\w+|\[\d+\])*=.*", text, re.DOTALL):
        raise RequestError(f"{shown(text)}: a setting, and a recipe comes first: pretrain run RECIPE {shown(text)}")
    if "/" in text or path.suffix in (".yaml", ".yml"):
        raise RequestError(f"recipe {text}: no such file{nearest_file(path)}")
    known = recipe_names()
    raise RequestError(f"recipe {text}: unknown; known are {', '.join(known)}, or a path{nearest(text, known)}")


def recipe_content(name_or_path: str | Path) -> dict[str, Any]:
    """What a recipe sets, as it is written.

    Raises:
        RequestError: there is no such recipe or file, or it is not readable.
    """
    return read_yaml(recipe_path(name_or_path))


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings in a file, as they are written.

    Raises:
        RequestError: it cannot be read, or is no mapping.
    """
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"recipe {path}{where}: not readable as YAML: {first_line(error)}") from None
    if content is None:
        content = {}
    if not isinstance(content, dict):
        found = "a list" if isinstance(content, list) else f"only {shown(content)}"
        raise RequestError(f"recipe {path}: expected settings (key: value), found {found}")
    return {str(key): value for key, value in content.items()}
