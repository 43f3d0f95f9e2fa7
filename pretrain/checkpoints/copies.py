"""Verified copies of checkpoints on this machine's disk: directories that appear complete or not at all.

    $PRETRAIN_CACHE/checkpoints/DIGEST         (default ~/.cache/pretrain) what it takes to use a backbone
    $PRETRAIN_CACHE/checkpoints/DIGEST-full    with the training state

DIGEST is that of `checkpoint.json`, which holds the digests of all other files. A copy that was damaged since is
fetched again.

Not here: what a checkpoint is and how it is verified (`pretrain.checkpoints.store`), which one is wanted
(`pretrain.checkpoints.references`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from data_pipelines.files import cache_root
from pretrain.checkpoints.storage import CheckpointStorage
from pretrain.checkpoints.store import (
    TRAINING_STATE,
    CheckpointError,
    Published,
    find_published,
    has_training_state,
    parse_manifest,
    verify,
)
from pretrain.record.run_dir import EXPORTED_FILES, MANIFEST

__all__ = ["assemble", "cached", "download", "exported", "local"]

log = logging.getLogger(__name__)

REFUSED = "refused"


def local(found: Published, *, training_state: bool = False) -> Path:
    """The directory of a published checkpoint on this machine: where it was published, or a copy in the cache.

    Args:
        found: Which.
        training_state: It is to be resumed from; otherwise a copy holds what it takes to use the backbone.

    Raises:
        CheckpointError: It is not there any more, or damaged.
    """
    directory = found.storage.directory(found.name)
    return directory or download(found.storage, found.name, training_state=training_state)


def exported(run_dir: Path, step: int) -> tuple[Path, str] | None:
    """What it takes to use the checkpoint of a run's step: its directory on this machine, and where it is published.

    None, with a warning, when there is no such checkpoint any more or it is damaged.
    """
    found = find_published(run_dir, step)
    try:
        directory = local(found) if found is not None else None
    except CheckpointError as error:
        log.warning("%s", error)
        return None
    if found is None or directory is None or not all((directory / name).is_file() for name in EXPORTED_FILES):
        log.warning("%s: the checkpoint of step %d is gone", run_dir, step)
        return None
    return directory, found.location


def download(storage: CheckpointStorage, directory: str, *, training_state: bool = False) -> Path:
    """A copy in the cache of a directory of a storage.

    Raises:
        CheckpointError: As `local`.
    """
    where = storage.location(directory)
    try:
        manifest = storage.read(f"{directory}/{MANIFEST}".lstrip("/"))
    except FileNotFoundError:
        raise CheckpointError(f"{where}: no {MANIFEST} in it; not a published checkpoint") from None

    def fill(into: Path) -> None:
        copy_listed(storage, directory, into, training_state=training_state)

    return cached(hashlib.sha256(manifest).hexdigest(), fill, training_state=training_state)


def copy_listed(storage: CheckpointStorage, directory: str, into: Path, *, training_state: bool) -> None:
    """Copy the manifest and the files that it lists into an existing directory, unverified.

    Raises:
        CheckpointError: One of them is missing.
    """
    prefix = f"{directory}/" if directory else ""
    manifest = storage.read(f"{prefix}{MANIFEST}")
    (into / MANIFEST).write_bytes(manifest)
    for name in parse_manifest(manifest, storage.location(f"{prefix}{MANIFEST}"))["files"]:
        if training_state or not name.startswith(f"{TRAINING_STATE}/"):
            (into / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                storage.copy(f"{prefix}{name}", into / name)
            except FileNotFoundError:
                raise CheckpointError(f"{storage.location(prefix + name)}: missing; {MANIFEST} lists it") from None


def cached(digest: str, fill: Callable[[Path], None], *, training_state: bool = False) -> Path:
    """The copy in the cache of the checkpoint whose manifest has this digest; `fill(directory)` fetches it if needed.

    Raises:
        CheckpointError: What was fetched is not that checkpoint.
    """
    root = cache_root() / "checkpoints"
    copy = root / (f"{digest[:32]}-full" if training_state else digest[:32])
    try:
        verify(copy, digest=digest)
        if has_training_state(copy) or not training_state:
            return copy
    except (FileNotFoundError, CheckpointError):  # never fetched, or damaged since
        shutil.rmtree(copy, ignore_errors=True)
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{root}: {error.strerror}; set PRETRAIN_CACHE to a folder with room") from None
    fresh = assemble(root / f"{copy.name}.{os.getpid()}", fill, digest)
    try:
        fresh.rename(copy)
    except OSError:  # another process was quicker
        shutil.rmtree(fresh)
    return copy


def assemble(dest: Path, fill: Callable[[Path], None], digest: str) -> Path:
    """Make `dest` from what `fill(directory)` fetches; it appears complete and verified, or not at all.

    Args:
        dest: Directory to make, or an empty one.
        fill: Puts the files into the directory that it is given.
        digest: SHA-256 of the manifest.

    Raises:
        CheckpointError: What was fetched is not what the manifest lists, or the manifest is another one.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", dir=dest.parent))
    aside.chmod(0o755)  # mkdtemp makes it private, dest is an ordinary directory
    try:
        fill(aside)
        verify(aside, digest=digest, remedy=REFUSED)
        if dest.is_dir():
            dest.rmdir()
        aside.rename(dest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return dest
