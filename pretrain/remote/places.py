"""Where the working copy of a remote storage is, and of which storage a directory is the working copy.

The one is read off the other, `s3://BUCKET/PREFIX` and `$PRETRAIN_CACHE/runs/s3/BUCKET/PREFIX`, so nothing has to be
looked up or kept.
"""

from __future__ import annotations

import os
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.files import cache_root
from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError, nearest

__all__ = ["is_uri", "shown_storage", "storage_problem", "store_problem", "uri_of", "working_copy"]

EXAMPLE = "expected a URI such as s3://BUCKET/PREFIX"


def is_uri(storage: str | os.PathLike[str]) -> bool:
    """Whether a storage of runs is a remote one."""
    return "://" in os.fspath(storage)


def store_problem(uri: str) -> str | None:
    """Why several processes cannot write to the store at a URI."""
    from fsspec.registry import known_implementations, registry

    scheme, separator, rest = uri.partition("://")
    if not separator or not rest:
        return EXAMPLE
    if scheme == "memory":
        return f"holds what one process writes, and no other sees it; {EXAMPLE}"
    if scheme not in registry and scheme not in known_implementations:
        return f"fsspec knows no {scheme}://{nearest(scheme, known_implementations)}; {EXAMPLE}"
    if redact(uri) != uri:
        return "user, password and query belong in the environment of the store's library, not in a recipe"
    return None


def storage_problem(uri: str) -> str | None:
    """Why runs cannot be kept at a URI."""
    if problem := store_problem(uri):
        return problem
    scheme, _, rest = uri.partition("://")
    if scheme in ("file", "local"):
        return f"is on a disk; give the directory itself: {rest}"
    if scheme in ("http", "https"):
        return f"cannot be written to; {EXAMPLE}"
    if any(part in ("", ".", "..") for part in rest.rstrip("/").split("/")):
        return f"has an empty part, '.' or '..' in its path; {EXAMPLE}"
    return None


def working_copy(uri: str) -> Path:
    """The directory on this machine for the runs at a URI; nothing is made.

    Raises:
        RequestError: No runs can be kept there, or this machine has no place for a copy.
    """
    if problem := storage_problem(uri):
        raise RequestError(f"storage={redact(uri)}: {problem}")
    try:
        root = _root()
    except DataError as error:
        raise RequestError(f"storage={uri}: {error}") from None
    scheme, _, rest = uri.partition("://")
    return root.joinpath(scheme, *rest.rstrip("/").split("/"))


def uri_of(storage: Path) -> str | None:
    """The remote storage whose working copy a directory is; None for any other directory."""
    try:
        root = _root()
    except DataError:  # without a place for copies nothing is one
        return None
    path = Path(os.path.abspath(storage))
    if not path.is_relative_to(root):
        return None
    scheme, *rest = path.relative_to(root).parts or ("",)
    return f"{scheme}://{'/'.join(rest)}" if rest else None


def shown_storage(storage: Path) -> str:
    """A storage as its user calls it: its URI, else its directory."""
    return uri_of(storage) or str(storage)


def _root() -> Path:
    return Path(os.path.abspath(cache_root())) / "runs"
