"""Where a run lives: its names, its directory, the store of its checkpoints, the cluster, and other trackers."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from data_pipelines.storage.locations import redact
from pretrain.config.mistakes import Mistakes
from pretrain.config.paths import absolute
from pretrain.config.schema import Recipe
from pretrain.errors import nearest
from pretrain.remote.places import is_uri, storage_problem, store_problem, working_copy

__all__ = [
    "check_address",
    "check_checkpoint_storage",
    "check_names",
    "check_references",
    "check_trackers",
    "checked_storage",
    "checkpoint_storage",
    "place_problem",
]

_TRACKERS = {"tensorboard": ("tensorboardX", "tensorboard"), "wandb": ("wandb",)}  # and what writes for them
_HOST = re.compile(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]")
_RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def check_names(draft: Recipe, mistakes: Mistakes) -> None:
    for key, name in (("name", draft.name), ("tracking.model_name", draft.tracking.model_name)):
        if mistakes.sound(key) and name is not None and not _RUN_NAME.fullmatch(name):
            mistakes.add(key, name, "expected letters, digits, '.', '_' and '-' only (it names directories)")


def check_references(draft: Recipe, mistakes: Mistakes) -> None:
    for key in ("init_from", "teacher_from", "resume_from"):
        reference = getattr(draft, key)
        if mistakes.sound(key) and reference and redact(reference) != reference:
            problem = "user, password and query belong in the environment of the store's library, not in a recipe"
            mistakes.add(key, redact(reference), problem)


def checked_storage(storage: str, mistakes: Mistakes, *, check_files: bool) -> str:
    """The directory of a storage; of a remote one that of its working copy."""
    if not mistakes.sound("storage"):
        return storage
    if is_uri(storage):
        if problem := storage_problem(storage):
            mistakes.add("storage", redact(storage), problem)
            return storage
        storage = str(working_copy(storage))
    if check_files and (problem := place_problem(Path(absolute(storage)))):
        mistakes.add("storage", storage, problem)
    return str(absolute(storage))


def checkpoint_storage(draft: Recipe) -> str | None:
    """Where checkpoints are stored: those of runs in a remote storage there, if nothing else is said."""
    if draft.checkpoints.storage is None and is_uri(draft.storage):
        return draft.storage.rstrip("/")
    return draft.checkpoints.storage


def place_problem(folder: Path) -> str | None:
    """Why no directory can be made or used there."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        return "is a file; expected a directory" if there == folder else f"{there} is no directory"
    return None if os.access(there, os.W_OK) else f"{there} is not writable; name another directory"


def check_checkpoint_storage(uri: str | None, mistakes: Mistakes) -> None:
    if uri is None or not mistakes.sound("checkpoints.storage"):
        return
    if problem := store_problem(uri):
        mistakes.add("checkpoints.storage", redact(uri), problem)


def check_trackers(names: Iterable[str], mistakes: Mistakes, *, check_files: bool) -> None:
    """Other trackers must be known and, where the run is to begin, installed."""
    for name in names if mistakes.sound("tracking.also") else ():
        packages = _TRACKERS.get(name)
        if packages is None:
            problem = f"{name}: unknown tracker; known are {', '.join(_TRACKERS)}{nearest(name, _TRACKERS)}"
            mistakes.add("tracking.also", list(names), problem)
        elif check_files and not any(map(find_spec, packages)):
            problem = f"{name} is not installed: pip install {packages[0]}, or leave it out"
            mistakes.add("tracking.also", list(names), problem)


def check_address(address: str | None, mistakes: Mistakes) -> None:
    if address is None or not mistakes.sound("cluster.address") or address == "auto":
        return
    _, _, place = address.rpartition("ray://")
    host, _, port = place.rpartition(":")
    if not (host and _HOST.fullmatch(host) and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        problem = "is no address of a Ray cluster; expected HOST:PORT, ray://HOST:PORT or auto"
        if address.startswith(("http://", "https://")):
            problem = "is the address of a job server, to which `pretrain submit` sends runs; " + problem
        mistakes.add("cluster.address", redact(address), problem)
