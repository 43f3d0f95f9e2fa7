"""What a job runs with: our six packages, the plug-ins that are installed here, and the recipe; never a secret.

A plug-in is any installed package with an entry point in a group of ours. Its modules go along with a note of these
entry points, so that the cluster finds it as it would an installed one. What it imports beyond that, and all that our
own packages need, is part of the cluster's environment.
"""

from __future__ import annotations

from importlib.metadata import Distribution, distributions
from importlib.util import find_spec
from pathlib import Path

from cluster.job_package import files_below
from cluster.secret_names import holds_issued_key
from data_pipelines.storage.locations import redact
from pretrain.config.recipe_files import recipe_names, recipe_path
from pretrain.errors import RequestError

__all__ = ["files_of_job", "files_of_package"]

OURS = ("backbones", "cluster", "data_pipelines", "evaluation", "objectives", "pretrain")
_GROUPS = "pretrain."  # begin the names of our entry-point groups


def files_of_job(recipe: str) -> tuple[str, dict[str, Path | bytes]]:
    """What the job calls its recipe, and all files by their places in the working directory of the job.

    Args:
        recipe: A name, or a YAML file.

    Raises:
        RequestError: The file holds credentials, or a plug-in cannot be found.
    """
    files = files_of_package()
    if recipe in recipe_names():
        return recipe, files
    path = recipe_path(recipe)
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if redact(line, marked=True) != line:
            problem = "a user, password or query in a URL would be readable by everybody who may list jobs"
            raise RequestError(f"recipe {path}, line {number}: {problem}; {URLS_REMEDY}")
        if holds_issued_key(line):
            raise RequestError(f"recipe {path}, line {number}: {ISSUED_KEY}")
    name = f"{path.stem}.yaml"
    return name, files | {name: text.encode()}


def files_of_package() -> dict[str, Path | bytes]:
    """Our packages and plug-ins, by their places in the working directory of the job.

    Raises:
        RequestError: A plug-in cannot be found.
    """
    files: dict[str, Path | bytes] = {}
    for name in OURS:
        files |= _module(name)
    for plugin in _plugins():
        files |= _files_of_plugin(plugin)
    return files


ISSUED_KEY = "looks like a secret, and everybody who may list jobs can read it; name a variable (--env) instead"
URLS_REMEDY = "leave them out, and have PRETRAIN_URLS or PRETRAIN_URLS_FILE in the environment of the nodes"


def _module(name: str) -> dict[str, Path]:
    """The files of an importable package or module."""
    spec = find_spec(name)
    if spec is not None and spec.submodule_search_locations:
        return files_below(Path(next(iter(spec.submodule_search_locations))), name)
    if spec is not None and spec.origin and Path(spec.origin).is_file():
        return {Path(spec.origin).name: Path(spec.origin)}
    raise RequestError(f"module {name}: not found, so it cannot be shipped; install its package anew")


def _plugins() -> list[Distribution]:
    """Installed packages with entry points of our groups; of several by one name the first counts, as for Python."""
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        found.setdefault(distribution.name, distribution)
    return [found[name] for name in sorted(found) if _entries(found[name])]


def _entries(distribution: Distribution) -> list[tuple[str, str, str]]:
    """Group, name and value of its entry points of ours."""
    entries = [(entry.group, entry.name, entry.value) for entry in distribution.entry_points]
    return sorted(entry for entry in entries if entry[0].startswith(_GROUPS))


def _files_of_plugin(plugin: Distribution) -> dict[str, Path | bytes]:
    files: dict[str, Path | bytes] = {}
    lines: list[str] = []
    for group, name, value in _entries(plugin):
        if f"[{group}]" not in lines:
            lines.append(f"[{group}]")
        lines.append(f"{name} = {value}")
        files |= _module(value.partition(":")[0].partition(".")[0])
    note = f"{plugin.name.replace('-', '_')}-{plugin.version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {plugin.name}\nVersion: {plugin.version}\n"
    files[f"{note}/METADATA"] = metadata.encode()
    files[f"{note}/entry_points.txt"] = ("\n".join(lines) + "\n").encode()
    return files
