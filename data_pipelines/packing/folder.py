"""The destination of packing: one writer at a time, one request per folder, no leftovers.

    DEST/train-000000.tar, train-000000.tar.index, ..., dataset.json       what stays
    DEST/.packing/request.json, train-000000.tar.json, unpacked/, lock     while the work is under way

Not here: what is written (`pack`, `shard_writer`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from data_pipelines.claims import is_at
from data_pipelines.errors import DataError
from data_pipelines.files import write_atomically
from data_pipelines.hidden import is_hidden
from data_pipelines.parsing import parse_json
from data_pipelines.shards.index import load_index
from data_pipelines.shards.manifest import MANIFEST_NAME, UNFINISHED, Manifest, read_manifest
from data_pipelines.storage.stores import Store

__all__ = ["PackFolder"]


class PackFolder:
    """Holds the lock of a destination; on leaving it removes what is of no use to a later run.

    Raises:
        DataError: the destination is a URL or a file, lies inside the source, or is being packed into right now.
    """

    def __init__(self, dest: Path, source: Path) -> None:
        if "://" in str(dest) or ":/" in str(dest):  # Path folds the two slashes of a URL
            raise DataError(f"cannot pack into {dest}; give a local folder and copy it to its store afterwards")
        self._dest, self._work = dest.absolute(), dest.absolute() / ".packing"
        if self._dest.exists() and not self._dest.is_dir():
            raise DataError(f"cannot pack into {dest}: it is a file; give a folder")
        if source.is_dir() and self._dest.resolve().is_relative_to(source.resolve()):
            raise DataError(f"cannot pack into {dest}: it lies inside the source {source}; give another folder")

    def __enter__(self) -> Self:
        self._is_new = not self._dest.exists()
        while True:
            self._lock = self._open_lock()
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._lock)
                raise DataError(
                    f"another process is packing into {self._dest}; wait for it or choose another folder"
                ) from None
            if is_at(self._work / "lock", self._lock):
                return self
            os.close(self._lock)  # another writer ended, and took the file along, between opening and locking

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._work / "unpacked", ignore_errors=True)
        is_refused = kind is not None and issubclass(kind, DataError) and not self._has_begun
        if is_refused or not self._request.exists():  # nothing was begun, or all is done
            shutil.rmtree(self._work)
            with suppress(OSError):
                if self._is_new:
                    self._dest.rmdir()  # only when it is empty
        os.close(self._lock)

    def _open_lock(self) -> int:
        while True:
            try:
                self._work.mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # another writer ended in between
                    return os.open(self._work / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except OSError as error:
                raise DataError(f"cannot pack into {self._dest}: {error.strerror}; give a folder to write to") from None

    @property
    def _request(self) -> Path:
        return self._dest / UNFINISHED

    @property
    def _has_begun(self) -> bool:
        """Whether shards of a request lie here; one without any binds nobody, so that its mistake can be mended."""
        return self._request.exists() and any(self._dest.glob("*.tar"))

    def unpacked(self) -> Path:
        """An empty folder for temporary copies; gone when the work ends."""
        folder = self._work / "unpacked"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        return folder

    def path(self, shard: str) -> str:
        return str(self._dest / shard)

    def record(self, shard: str) -> str:
        """Where the record of a shard is kept while the work is under way."""
        return str(self._work / f"{shard}.json")

    def held(self, request: Mapping[str, Any], newest: tuple[int, str]) -> Manifest | None:
        """Compare a request with what the folder holds; the manifest if all of it is packed already.

        Args:
            request: everything that determines the bytes, as JSON.
            newest: when an input file was changed last (ns), and which.

        Raises:
            DataError: it holds something else, or input files changed since.
        """
        described = self._dest / MANIFEST_NAME
        if described.exists():
            manifest = read_manifest(described.read_bytes())
            if manifest is None:
                raise DataError(f"{self._dest} holds a {MANIFEST_NAME} of another origin; choose an empty folder")
            held = {"created_by": manifest.created_by, "name": manifest.name, **manifest.options}
            self._require_same(held, request, described, newest)
            self._require_shards(manifest)
            self._request.unlink(missing_ok=True)  # a kill just before the end leaves it
            return manifest
        if self._has_begun:
            self._require_same(parse_json(self._request.read_bytes()), request, self._request, newest)
        elif strange := next((path for path in self._dest.glob("*.tar*") if not is_hidden(path.name)), None):
            raise DataError(f"{self._dest} holds {strange.name}, which no packing left there; choose an empty folder")
        return None

    def begin(self, request: Mapping[str, Any]) -> None:
        """Note the request and remove what a killed run left unfinished."""
        if not self._has_begun:
            write_atomically(self._request, json.dumps(request).encode())
        for stale in (*self._dest.glob("*.tmp"), *self._work.glob("*.tmp")):
            stale.unlink()

    def finish(self, manifest: Manifest) -> None:
        """Write `dataset.json`, with which the data set is complete."""
        write_atomically(self._dest / MANIFEST_NAME, manifest.to_bytes())
        self._request.unlink()

    def _require_same(
        self, held: Mapping[str, Any], request: Mapping[str, Any], written: Path, newest: tuple[int, str]
    ) -> None:
        for option in dict.fromkeys((*held, *request)):
            if held.get(option) != request.get(option):
                what = (
                    "from other input files"
                    if option == "input"
                    else f"with {option}={held.get(option)!r}, this request has {request.get(option)!r}"
                )
                raise DataError(f"{self._dest} holds a data set packed {what}; choose another folder or remove it")
        if newest[0] > written.stat().st_mtime_ns:
            raise DataError(
                f"input file {newest[1]} was changed after packing into {self._dest} began; "
                "choose another folder or remove it"
            )

    def _require_shards(self, manifest: Manifest) -> None:
        for name, shard in manifest.shards.items():
            path = self._dest / name
            if not path.is_file() or path.stat().st_size != shard.bytes:
                raise DataError(f"{path} is missing or cut, though {MANIFEST_NAME} lists it; remove {self._dest}")
            if load_index(str(path), Store(), num_bytes=shard.bytes).digest != shard.index_digest:
                raise DataError(f"{path} is not what {MANIFEST_NAME} lists; it was changed since; remove {self._dest}")
