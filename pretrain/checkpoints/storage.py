"""Where the checkpoints of a run lie: a local directory, or any store that fsspec speaks to (s3://, gs://, memory://).

A storage holds directories of files. One is written piece by piece, by all ranks at once, and *published* by one of
them; readers see published directories only. Both storages keep the same promise in their own way:

    LocalStorage    files are collected in `.NAME.partial`, flushed to disk, and the directory is renamed at the end
    FsspecStorage   objects go to their final names, and `checkpoint.json` is written last: what has none is not listed.
                    That takes a store whose objects appear whole, as those of S3 and GCS do; through `file://` a power
                    cut may tear an object, so a directory on a disk is better given as a path

DeepSpeed writes local files only, so a rank stages what it writes on its own disk and hands it over (`write`). Ranks
that write beside training cannot meet in a collective: they leave each other small notes in the unpublished directory.
An *attempt* to write a directory has a name of its own, so that nobody mistakes for his what another process, which may
still be at work somewhere, has written or noted there.
Credentials come from where the libraries look for them (environment, configuration files), never from a recipe.

Not here: what a checkpoint consists of (`pretrain.checkpoints.store`).
"""

from __future__ import annotations

import glob
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipelines.files import flush_to_disk, write_atomically
from pretrain.record.run_dir import MANIFEST

__all__ = ["CheckpointError", "CheckpointStorage", "FsspecStorage", "LocalStorage", "open_storage"]

_NOTES = ".writers"  # in an unpublished directory
SMALL_FILE_BYTES = 64 << 20  # the most that `read` takes into memory: manifests and recipes have kilobytes


class CheckpointError(RuntimeError):
    """A checkpoint that is damaged, incomplete or does not fit."""


class CheckpointStorage(ABC):
    """Directories of files that appear complete or not at all. Names use `/` and are relative to the storage."""

    @abstractmethod
    def location(self, name: str = "") -> str:
        """Path or URI of a directory or file, for people and for `open_storage`."""

    @abstractmethod
    def directory(self, name: str) -> Path | None:
        """The directory `name` on this machine's disk; None when it has to be copied from somewhere."""

    @abstractmethod
    def published(self) -> list[str]:
        """Names of all published directories, sorted."""

    @abstractmethod
    def survey(self) -> dict[str, Sequence[str]]:
        """Names of all published directories, sorted -> those of the files in each, relative to it.

        A remote store is listed once, however many directories there are.
        """

    @abstractmethod
    def unpublished(self) -> dict[str, dict[str, int]]:
        """Names of directories that have files and are not published -> bytes of each file.

        Whoever writes one has left a note in it, so that two attempts never look alike. Empty where they have names of
        their own, as on a disk.
        """

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""

    @abstractmethod
    def list(self, directory: str) -> list[str]:
        """Names of all files below a directory, relative to it, sorted; empty when there is none."""

    @abstractmethod
    def read(self, name: str) -> bytes:
        """The contents of a small file.

        Raises:
            FileNotFoundError: There is none. So for `copy`.
            CheckpointError: It is not small.
        """

    @abstractmethod
    def copy(self, name: str, dest: Path) -> None:
        """Copy a file to a local path."""

    @abstractmethod
    def begin(self, directory: str, attempt: str = "") -> None:
        """Make room for a directory that is to be written; what an earlier attempt left goes. Call it on one rank."""

    @abstractmethod
    def write(self, directory: str, name: str, source: Path, attempt: str = "") -> None:
        """Take over the local file `source` as `name` of an unpublished directory; afterwards `source` may be gone.

        Durable when it returns. Any rank may write, each name once. A `LocalStorage` wants `source` on its own disk.
        """

    @abstractmethod
    def note(self, directory: str, attempt: str, name: str, content: bytes) -> None:
        """Leave a note for the others who write an unpublished directory; it appears whole."""

    @abstractmethod
    def notes(self, directory: str, attempt: str) -> dict[str, bytes]:
        """All notes of an attempt, by name."""

    @abstractmethod
    def sizes(self, directory: str, attempt: str = "") -> dict[str, int]:
        """Bytes of each file of an unpublished directory, as the storage has them now."""

    @abstractmethod
    def publish(self, directory: str, manifest: bytes, attempt: str = "") -> None:
        """Make an unpublished directory visible, with `manifest` as its `checkpoint.json`. Call it on one rank.

        Raises:
            CheckpointError: The storage has lost the manifest.
        """

    @abstractmethod
    def discard(self, directory: str, attempt: str) -> None:
        """Delete what an attempt has written so far; a published directory of that name stays. Call it on one rank."""

    @abstractmethod
    def mark(self, name: str, content: bytes) -> None:
        """Add a small file to a published directory; it appears whole."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete a directory, if it is there; a published one stops to be listed first."""


@dataclass(frozen=True)
class LocalStorage(CheckpointStorage):
    """A directory on a disk, or on a file system that all ranks share."""

    root: Path

    def location(self, name: str = "") -> str:
        return str(self.root / name)

    def directory(self, name: str) -> Path | None:
        return self.root / name

    def published(self) -> list[str]:
        return sorted(
            path.name for path in self.root.glob("*") if not path.name.startswith(".") and (path / MANIFEST).is_file()
        )

    def survey(self) -> dict[str, Sequence[str]]:
        return {name: self.list(name) for name in self.published()}

    def unpublished(self) -> dict[str, dict[str, int]]:
        return {}

    def exists(self, name: str) -> bool:
        return (self.root / name).is_file()

    def list(self, directory: str) -> list[str]:
        top = self.root / directory
        return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if not path.is_dir())

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def copy(self, name: str, dest: Path) -> None:
        shutil.copyfile(self.root / name, dest)

    def begin(self, directory: str, attempt: str = "") -> None:
        shutil.rmtree(self._partial(directory, attempt), ignore_errors=True)
        self._partial(directory, attempt).mkdir(parents=True)

    def write(self, directory: str, name: str, source: Path, attempt: str = "") -> None:
        partial = self._partial(directory, attempt)
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        # safetensors writes files that only their owner can read; the umask, which made the directory, decides.
        source.chmod(partial.stat().st_mode & 0o666)
        flush_to_disk(source)
        source.replace(target)

    def note(self, directory: str, attempt: str, name: str, content: bytes) -> None:
        folder = self._partial(directory, attempt) / _NOTES
        folder.mkdir(exist_ok=True)
        write_atomically(folder / name, content)

    def notes(self, directory: str, attempt: str) -> dict[str, bytes]:
        folder = self._partial(directory, attempt) / _NOTES
        return {path.name: path.read_bytes() for path in folder.glob("*.json")}

    def sizes(self, directory: str, attempt: str = "") -> dict[str, int]:
        top = self._partial(directory, attempt)
        return {path.relative_to(top).as_posix(): path.stat().st_size for path in top.rglob("*") if path.is_file()}

    def publish(self, directory: str, manifest: bytes, attempt: str = "") -> None:
        partial, final = self._partial(directory, attempt), self.root / directory
        shutil.rmtree(partial / _NOTES, ignore_errors=True)
        (partial / MANIFEST).write_bytes(manifest)
        flush_to_disk(partial / MANIFEST)
        for folder in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
            flush_to_disk(folder)
        # The same step again after a restart from an earlier checkpoint: bit-equal weights, newer file times.
        if final.exists():
            self.remove(directory)
        partial.rename(final)
        flush_to_disk(self.root)

    def discard(self, directory: str, attempt: str) -> None:
        shutil.rmtree(self._partial(directory, attempt), ignore_errors=True)

    def mark(self, name: str, content: bytes) -> None:
        write_atomically(self.root / name, content)

    def remove(self, name: str) -> None:
        """Renamed away first, so that nobody ever sees half of it under its name."""
        doomed = (self.root / name).parent / f".{Path(name).name}.removed"
        shutil.rmtree(doomed, ignore_errors=True)  # of a removal that was interrupted
        if (self.root / name).is_dir():
            (self.root / name).rename(doomed)
            shutil.rmtree(doomed)

    def _partial(self, directory: str, attempt: str) -> Path:
        return self.root / f".{directory}{attempt and '.'}{attempt}.partial"


@dataclass(frozen=True)
class FsspecStorage(CheckpointStorage):
    """A prefix in a remote store."""

    uri: str

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, without any cache of listings (other processes write, too), and the prefix in it."""
        import fsspec

        options = {"auto_mkdir": True} if self.uri.partition("://")[0] in ("file", "local") else {}
        filesystem, root = fsspec.core.url_to_fs(
            self.uri, skip_instance_cache=True, use_listings_cache=False, **options
        )
        return filesystem, root.rstrip("/")

    def location(self, name: str = "") -> str:
        return f"{self.uri.rstrip('/')}/{name}".rstrip("/")

    def directory(self, name: str) -> Path | None:
        return None

    def published(self) -> list[str]:
        return list(self.survey())

    def survey(self) -> dict[str, Sequence[str]]:
        return {name: list(files) for name, files in self._directories().items() if MANIFEST in files}

    def unpublished(self) -> dict[str, dict[str, int]]:
        return {name: files for name, files in self._directories().items() if MANIFEST not in files}

    def _directories(self) -> dict[str, dict[str, int]]:
        """All that have files, by name, with the bytes of each; those that begin with `.` are left out."""
        filesystem, root = self._opened
        if not filesystem.exists(root):
            return {}
        found: dict[str, dict[str, int]] = {}
        # Not by a glob, in which a `[` of the prefix would be a pattern.
        for path, facts in sorted(filesystem.find(root, detail=True).items()):
            directory, _, file = path[len(root) :].lstrip("/").partition("/")
            if not directory.startswith("."):
                found.setdefault(directory, {})[file] = facts["size"]
        return found

    def exists(self, name: str) -> bool:
        filesystem, root = self._opened
        return bool(filesystem.isfile(f"{root}/{name}"))

    def list(self, directory: str) -> list[str]:
        filesystem, root = self._opened
        return sorted(path[len(f"{root}/{directory}/") :] for path in filesystem.find(f"{root}/{directory}"))

    def read(self, name: str) -> bytes:
        filesystem, root = self._opened
        size = filesystem.info(f"{root}/{name}")["size"] or 0
        if size > SMALL_FILE_BYTES:
            raise CheckpointError(f"{self.location(name)}: has {size} bytes, expected at most {SMALL_FILE_BYTES}")
        content: bytes = filesystem.cat_file(f"{root}/{name}")
        return content

    def copy(self, name: str, dest: Path) -> None:
        filesystem, root = self._opened
        filesystem.get_file(f"{root}/{name}", str(dest))

    def begin(self, directory: str, attempt: str = "") -> None:
        self.remove(directory)

    def write(self, directory: str, name: str, source: Path, attempt: str = "") -> None:
        filesystem, root = self._opened
        filesystem.put_file(str(source), f"{root}/{directory}/{name}")

    def note(self, directory: str, attempt: str, name: str, content: bytes) -> None:
        self.mark(f"{directory}/{_NOTES}/{attempt}.{name}", content)

    def notes(self, directory: str, attempt: str) -> dict[str, bytes]:
        filesystem, root = self._opened
        names = self.list(f"{directory}/{_NOTES}")
        mine = {name.removeprefix(f"{attempt}."): name for name in names if name.startswith(f"{attempt}.")}
        return {short: filesystem.cat_file(f"{root}/{directory}/{_NOTES}/{name}") for short, name in mine.items()}

    def sizes(self, directory: str, attempt: str = "") -> dict[str, int]:
        filesystem, root = self._opened
        found = filesystem.find(f"{root}/{directory}", detail=True)
        return {path[len(f"{root}/{directory}/") :]: facts["size"] for path, facts in found.items()}

    def publish(self, directory: str, manifest: bytes, attempt: str = "") -> None:
        self.mark(f"{directory}/{MANIFEST}", manifest)
        if self.sizes(directory).get(MANIFEST) != len(manifest):
            raise CheckpointError(f"{self.location(directory)}/{MANIFEST}: was written, and the store does not have it")
        self._delete(f"{directory}/{_NOTES}")

    def discard(self, directory: str, attempt: str) -> None:
        if not self.exists(f"{directory}/{MANIFEST}"):
            self._delete(directory)

    def mark(self, name: str, content: bytes) -> None:
        filesystem, root = self._opened
        filesystem.pipe_file(f"{root}/{name}", content)

    def remove(self, name: str) -> None:
        filesystem, root = self._opened
        if filesystem.isfile(f"{root}/{name}/{MANIFEST}"):
            filesystem.rm_file(f"{root}/{name}/{MANIFEST}")
        self._delete(name)

    def _delete(self, name: str) -> None:
        filesystem, root = self._opened
        if filesystem.exists(f"{root}/{name}"):
            if glob.has_magic(root):  # which `rm` would take for a pattern
                for path in filesystem.find(f"{root}/{name}"):
                    filesystem.rm_file(path)
            else:
                filesystem.rm(f"{root}/{name}", recursive=True)


def open_storage(location: str | Path) -> CheckpointStorage:
    """The storage at a directory or URI; nothing is opened or made yet."""
    text = os.fspath(location)
    return FsspecStorage(text) if "://" in text else LocalStorage(Path(text))
