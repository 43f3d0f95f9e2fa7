"""Frozen features by key, in `features/KEY/{NAME.npy, meta.json}` of a root: taken once, shared by all protocols.

An entry is written aside, its `meta.json` (what it was made from, and size, time of change and SHA-256 of each array)
last, and renamed into place, so a killed writer leaves nothing that looks complete. Every byte is hashed once, when it
is written. A use compares sizes and times of change, and hashes again only what differs: a copied entry is then good
and gets its new times written down, a damaged one is made again. Least recently used entries go first when the cache
exceeds its limit.

Not here: results (`evaluation.results`), who computes (`evaluation.lease`), what is taken (`evaluation.extraction`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines import files
from data_pipelines.parsing import parse_json
from evaluation.lease import compute_once
from evaluation.protocol import BrokenError

__all__ = ["ArrayWriter", "FeatureCache"]

FORMAT = 2
CACHE_LIMIT_BYTES = 16 * 2**30


@dataclass(frozen=True)
class _Stamp:
    """What a file was when it was hashed."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> _Stamp:
        """Hashes the file. Its time is read first, so that a change while it is hashed is seen at the next use."""
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what was written through a memory map as well
        status = path.stat()
        return cls(status.st_size, status.st_mtime_ns, files.sha256(path))

    def looks_like(self, path: Path) -> bool:
        """Whether size and time of change are still the same."""
        status = path.stat()
        return (status.st_size, status.st_mtime_ns) == (self.size, self.mtime_ns)


class ArrayWriter:
    """Arrays of one cache entry while it is being written."""

    def __init__(self, directory: Path):
        self._directory = directory
        self.names: list[str] = []

    def create(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Returns a writable array of that shape backed by the entry's file."""
        self.names.append(name)
        array: npt.NDArray[Any] = np.lib.format.open_memmap(
            self._directory / f"{name}.npy", mode="w+", dtype=np.dtype(dtype), shape=shape
        )
        return array


class FeatureCache:
    """Named arrays per key on disk, shared by all protocols that want the same features."""

    def __init__(self, root: Path, limit_bytes: int = CACHE_LIMIT_BYTES):
        self._root = root / "features"
        self._limit_bytes = limit_bytes

    def once(
        self, key: str, recipe: Mapping[str, Any], write: Callable[[ArrayWriter], None]
    ) -> tuple[dict[str, npt.NDArray[Any]], bool]:
        """Returns (arrays by name, memory-mapped read-only; whether `write` ran here)."""

        def make() -> dict[str, npt.NDArray[Any]]:
            self._write(key, recipe, write)
            arrays = self.find(key)
            if arrays is None:
                raise BrokenError(f"features {key} cannot be read back from {self._root}; is the disk full or failing?")
            self._evict(keep=key)
            return arrays

        return compute_once(self._root / f"{key}.lease", lambda: self.find(key), make)

    def find(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of a complete and undamaged entry, else None."""
        entry = self._root / key
        try:
            meta = parse_json((entry / "meta.json").read_text())
            if meta["format"] != FORMAT:
                return None
            stamps = {name: _Stamp(**stamp) for name, stamp in meta["arrays"].items()}
            if not self._verify(entry, meta, stamps):
                return None
            os.utime(entry / "meta.json")  # recency, for eviction
            return {name: np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in stamps}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _verify(self, entry: Path, meta: Mapping[str, Any], stamps: Mapping[str, _Stamp]) -> bool:
        """Whether all arrays are what was written; new times of changed but equal files are written down."""
        changed = [name for name, stamp in stamps.items() if not stamp.looks_like(entry / f"{name}.npy")]
        if not changed:
            return True
        now = {name: _Stamp.of(entry / f"{name}.npy") for name in changed}
        if any(now[name].sha256 != stamps[name].sha256 for name in changed):
            return False
        _write_meta(entry, meta["recipe"], {**stamps, **now})
        return True

    def _write(self, key: str, recipe: Mapping[str, Any], write: Callable[[ArrayWriter], None]) -> None:
        for left_over in self._root.glob(f"{key}.tmp-*"):  # of a killed owner: this process holds the lease now
            shutil.rmtree(left_over, ignore_errors=True)
        aside = self._root / f"{key}.tmp-{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        try:
            writer = ArrayWriter(aside)
            write(writer)
            _write_meta(aside, recipe, {name: _Stamp.of(aside / f"{name}.npy") for name in writer.names})
            shutil.rmtree(self._root / key, ignore_errors=True)  # a damaged predecessor
            aside.rename(self._root / key)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _evict(self, keep: str) -> None:
        """Removes least recently used entries until the cache fits its limit; open maps of them stay readable."""
        entries = []
        for mark in self._root.glob("*/meta.json"):
            with contextlib.suppress(OSError):
                size = sum(file.stat().st_size for file in mark.parent.iterdir())
                entries.append((mark.stat().st_mtime, size, mark.parent))
        total = sum(size for _, size, _ in entries)
        for _, size, entry in sorted(entries):
            if total <= self._limit_bytes:
                return
            if entry.name != keep and ".tmp-" not in entry.name:
                (entry / "meta.json").unlink(missing_ok=True)  # first, so that a half-removed entry is no entry
                shutil.rmtree(entry, ignore_errors=True)
                total -= size


def _write_meta(entry: Path, recipe: Mapping[str, Any], stamps: Mapping[str, _Stamp]) -> None:
    arrays = {name: asdict(stamp) for name, stamp in stamps.items()}
    meta = {"format": FORMAT, "recipe": dict(recipe), "arrays": arrays}
    files.write_atomically(entry / "meta.json", json.dumps(meta, indent=1, sort_keys=True).encode())
