"""Whole files on a local disk: written so that no reader ever sees half of one, and identified by their bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from uuid import uuid4

from data_pipelines.errors import DataError

__all__ = ["cache_root", "expanded", "flush_to_disk", "sha256", "write_atomically"]


def expanded(path: str | Path) -> Path:
    """`path` with a leading `~` or `~NAME` replaced by that home directory, where there is one; else as it is."""
    return Path(os.path.expanduser(path))


def cache_root() -> Path:
    """Where what can be fetched or made again is kept: $PRETRAIN_CACHE, by default `~/.cache/pretrain`.

    Raises:
        DataError: Neither is known: the user of this process has no home directory.
    """
    root = expanded(os.environ.get("PRETRAIN_CACHE") or "~/.cache/pretrain")
    if str(root).startswith("~"):
        raise DataError("this user has no home directory; set PRETRAIN_CACHE to a folder for what is fetched")
    return root


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut, also when several write it at once.

    A process that is killed meanwhile leaves a `<name>.<letters>.tmp` beside it.

    Raises:
        OSError: Of the system, with the path in it.
    """
    aside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if (
            isinstance(error, OSError) and error.errno is not None
        ):  # of a full disk the system names no file, and else the one beside
            error.filename, error.filename2 = str(path), None
        raise
    flush_to_disk(path.parent)  # the new name, after the bytes


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would survive a loss of power."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
