"""Results by evaluation key and frozen features by feature key, each computed once and published whole.

Layout under one root: `evaluations/KEY.json` and `features/KEY/{NAME.npy, meta.json}`. A feature entry is written
aside, its `meta.json` (recipe and a SHA-256 per array) last, and renamed into place, so a killed writer leaves nothing
that looks complete; an entry that does not match its checksums is removed and made again. Least recently used entries
go first when the cache exceeds its size limit. Who computes is decided in `lease`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from evaluation.lease import compute_once
from evaluation.registry import EvaluationError

__all__ = ["ArrayWriter", "EvaluationResult", "FeatureCache", "ResultStore", "digest_of"]

FORMAT = 1
CACHE_LIMIT_BYTES = 16 * 2**30


def digest_of(facts: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `facts`; what keys are made of."""
    return hashlib.sha256(
        json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    ).hexdigest()


@dataclass(frozen=True)
class EvaluationResult:
    """One score card: (weights, protocol, data) -> metrics.

    Attributes:
        key: SHA-256 of weights digest, feature recipe, data digest and protocol; see `protocol`.
        data: the name the data was given by the caller, not part of the key.
        metrics: the protocol's fractions in [0, 1].
        seconds: wall time of the computation; a cached result keeps that of the original.
        cached: True when this call computed nothing.
    """

    key: str
    protocol: str
    version: int
    data: str
    data_digest: str
    weights_digest: str
    metrics: dict[str, float]
    details: dict[str, Any]
    seconds: float
    cached: bool = False

    def __post_init__(self) -> None:
        bad = {name: value for name, value in self.metrics.items() if not math.isfinite(value)}
        if bad:
            raise EvaluationError(f"protocol {self.protocol!r} on {self.data!r} gave non-finite metrics: {bad}")

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, indent=1, sort_keys=True, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> EvaluationResult:
        """Inverse of `to_json`; `ValueError` when `text` is something else."""
        fields = json.loads(text)
        if not isinstance(fields, dict) or fields.pop("format", None) != FORMAT:
            raise ValueError(f"not an evaluation result of format {FORMAT}")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not an evaluation result: {error}") from error


class ResultStore:
    """Evaluation results as one JSON file per key."""

    def __init__(self, root: Path):
        self._root = root / "evaluations"

    def find(self, key: str) -> EvaluationResult | None:
        """The stored result, marked cached; a file that is not a result of this key counts as absent."""
        try:
            result = EvaluationResult.from_json((self._root / f"{key}.json").read_text())
        except (FileNotFoundError, ValueError):
            return None
        return dataclasses.replace(result, cached=True) if result.key == key else None

    def publish(self, result: EvaluationResult) -> EvaluationResult:
        self._root.mkdir(parents=True, exist_ok=True)
        _write_atomically(self._root / f"{result.key}.json", result.to_json())
        return result

    def once(
        self, key: str, make: Callable[[], EvaluationResult], *, data: str, force: bool = False
    ) -> EvaluationResult:
        """The stored result, else that of `make`, computed by one process only; `force` computes in any case.

        Args:
            data: the name under which the caller knows the data; the result carries it.
        """
        if force:
            return self.publish(make())
        lease = self._root / f"{key}.lease"
        result, _ = compute_once(lease, lambda: self.find(key), lambda: self.publish(make()))
        return dataclasses.replace(result, data=data)


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
                raise EvaluationError(
                    f"features {key} cannot be read back from {self._root}; is the disk full or failing?"
                )
            self._evict(keep=key)
            return arrays

        return compute_once(self._root / f"{key}.lease", lambda: self.find(key), make)

    def find(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """The arrays of a complete and undamaged entry, else None."""
        entry = self._root / key
        try:
            meta = json.loads((entry / "meta.json").read_text())
            os.utime(entry / "meta.json")  # recency, for eviction
            if meta["format"] != FORMAT:
                return None
            arrays: dict[str, npt.NDArray[Any]] = {}
            for name, checksum in meta["arrays"].items():
                if _sha256(entry / f"{name}.npy") != checksum:
                    return None
                arrays[name] = np.load(entry / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, KeyError):
            return None
        return arrays

    def _write(self, key: str, recipe: Mapping[str, Any], write: Callable[[ArrayWriter], None]) -> None:
        for left_over in self._root.glob(f"{key}.tmp-*"):  # of a killed owner: this process holds the lease now
            shutil.rmtree(left_over, ignore_errors=True)
        aside = self._root / f"{key}.tmp-{uuid.uuid4().hex}"
        aside.mkdir(parents=True)
        try:
            writer = ArrayWriter(aside)
            write(writer)
            checksums = {name: _sha256(aside / f"{name}.npy", flush=True) for name in writer.names}
            meta = {"format": FORMAT, "recipe": dict(recipe), "arrays": checksums}
            _write_atomically(aside / "meta.json", json.dumps(meta, indent=1, sort_keys=True))
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


def _sha256(path: Path, *, flush: bool = False) -> str:
    with open(path, "rb") as file:
        if flush:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp-{uuid.uuid4().hex}")
    with open(aside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
