"""What is where in a shard: a strict scan of the tar, and its result kept on disk.

A cut or damaged tar often reads back as a shorter one without any error (tarfile, like webdataset, stops silently at
a bad header), so the scan demands a clean end of archive and adjacent, complete, unrepeated samples. The index holds,
per sample, one byte range with its CRC-32 and the place of each field in it; reading a sample is then one `pread`
(see `shards`).

Kept as an npz without pickles, written atomically: as a sidecar `<shard>.tar.index.npz` when someone put one beside
the shard, else in `$PRETRAIN_CACHE/index` (default `~/.cache/pretrain/index`).

Legend: S samples, F kinds of field.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError

__all__ = ["ShardIndex", "load_index", "scan_shard"]

INDEX_FORMAT = 1
_TAR_BLOCK = 512
_ABSENT = 0xFFFFFFFF  # offset of a field that a sample lacks
_MAX_SAMPLE_BYTES = 0xFFFFFFFE  # offsets inside a sample are 32 bits wide


@dataclass(frozen=True)
class ShardIndex:
    """Byte ranges of one shard, in the order of the tar."""

    format: int
    num_bytes: int  # of the whole tar
    keys: npt.NDArray[np.uint8]  # UTF-8 of all keys, joined
    key_end: npt.NDArray[np.int64]  # (S,) where each key ends in `keys`
    start: npt.NDArray[np.int64]  # (S,) offset of the sample's first tar header
    size: npt.NDArray[np.uint32]  # (S,) bytes from there to the end of its last member, padding included
    crc32: npt.NDArray[np.uint32]  # (S,) of that range
    field_names: npt.NDArray[np.str_]  # (F,) sorted
    field_offset: npt.NDArray[np.uint32]  # (S, F) relative to `start`; 0xFFFFFFFF where the sample lacks the field
    field_size: npt.NDArray[np.uint32]  # (S, F)

    @property
    def num_samples(self) -> int:
        return len(self.start)

    def key(self, sample: int) -> str:
        begin = int(self.key_end[sample - 1]) if sample else 0
        return self.keys[begin : int(self.key_end[sample])].tobytes().decode()

    def field_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        """Field name -> (begin, end) inside the sample's byte range."""
        offsets, sizes = self.field_offset[sample].tolist(), self.field_size[sample].tolist()
        named = zip(self._names, offsets, sizes, strict=True)
        return {name: (offset, offset + size) for name, offset, size in named if offset != _ABSENT}

    @cached_property
    def _names(self) -> list[str]:
        return [str(name) for name in self.field_names]

    @cached_property
    def common_fields(self) -> frozenset[str]:
        """Fields that every sample has."""
        everywhere = (self.field_offset != _ABSENT).all(axis=0)
        return frozenset(name for name, present in zip(self._names, everywhere, strict=True) if present)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, ranges and content CRCs; independent of where the shard lies and how it is called."""
        sha = hashlib.sha256(f"pretrain-shard-index {self.format} {self.num_bytes} {' '.join(self._names)}\n".encode())
        for array in (self.keys, self.key_end, self.start, self.size, self.crc32, self.field_offset, self.field_size):
            sha.update(np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes())
        return sha.hexdigest()

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole index or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, allow_pickle=False, **{f.name: np.asarray(getattr(self, f.name)) for f in fields(self)})
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise

    @classmethod
    def load(cls, path: Path, num_bytes: int) -> ShardIndex | None:
        """The index stored at `path` if it is whole and made for a shard of `num_bytes`, else None."""
        try:
            with np.load(path, allow_pickle=False) as stored:
                if int(stored["format"]) != INDEX_FORMAT or int(stored["num_bytes"]) != num_bytes:
                    return None
                arrays = {f.name: stored[f.name] for f in fields(cls) if f.name not in ("format", "num_bytes")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        index = cls(format=INDEX_FORMAT, num_bytes=num_bytes, **arrays)
        samples, kinds = len(index.start), len(index.field_names)
        whole = (
            index.key_end.shape == index.size.shape == index.crc32.shape == (samples,)
            and index.field_offset.shape == index.field_size.shape == (samples, kinds)
            and samples > 0
            and int((index.start + index.size).max()) <= num_bytes
        )
        return index if whole else None


def load_index(shard: Path) -> ShardIndex:
    """The index of `shard`: its sidecar, else the cached one, else a new scan that is then cached."""
    try:
        status = shard.stat()
    except OSError as error:
        raise DataError(f"cannot open shard {shard}: {error.strerror}") from None
    index = ShardIndex.load(shard.with_name(f"{shard.name}.index.npz"), status.st_size)
    if index is not None:
        return index
    identity = f"{shard.absolute()}\n{status.st_size}\n{status.st_mtime_ns}"
    cached = _cache_folder() / f"{hashlib.sha256(identity.encode()).hexdigest()}.npz"
    index = ShardIndex.load(cached, status.st_size)
    if index is None:
        index = scan_shard(shard)
        try:
            index.save(cached)
        except OSError as error:  # a read-only home costs a scan per process, no more
            warnings.warn(f"cannot keep shard indices in {cached.parent} ({error}); set PRETRAIN_CACHE", stacklevel=2)
    return index


def _cache_folder() -> Path:
    root = os.environ.get("PRETRAIN_CACHE")
    return (Path(root).expanduser() if root else Path.home() / ".cache" / "pretrain") / "index"


class _Samples:
    """Members collected into samples while the scan walks the tar."""

    def __init__(self, shard: Path) -> None:
        self.shard = shard
        self.keys: list[str] = []
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.fields: list[dict[str, tuple[int, int]]] = []  # name -> (absolute offset, size)

    def add(self, member: tarfile.TarInfo, end: int) -> None:
        folder, slash, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        if not stem or not dot or not extension:
            raise DataError(f"{self.where(member)} has no KEY.FIELD name; rename or remove it")
        key, field = f"{folder}{slash}{stem}", extension.lower()
        if not self.keys or self.keys[-1] != key:
            self.keys.append(key)
            self.starts.append(member.offset)
            self.ends.append(end)
            self.fields.append({})
        if field in self.fields[-1]:
            raise DataError(
                f"{self.where(member)} repeats field {field!r} of sample {key!r}; a sample has each field once"
            )
        self.fields[-1][field] = (member.offset_data, member.size)
        self.ends[-1] = end
        if end - self.starts[-1] > _MAX_SAMPLE_BYTES:
            raise DataError(f"{self.where(member)} makes sample {key!r} larger than 4 GiB; split it")

    def where(self, member: tarfile.TarInfo) -> str:
        return f"shard {self.shard}: member {member.name!r} at offset {member.offset}"


def scan_shard(shard: Path) -> ShardIndex:
    """Read a whole tar, check its structure and compute the CRC-32 of every sample.

    Raises:
        DataError: the file is empty, no plain tar, cut, or damaged in a header; a sample is repeated, split or unnamed;
            a member is not a regular file. The message names shard, member and offset.
    """
    samples = _Samples(shard)
    try:
        with open(shard, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            _walk(shard, file, num_bytes, samples)
            _reject_repeats(samples)
            ranges = zip(samples.starts, samples.ends, strict=True)
            crcs = [zlib.crc32(os.pread(file.fileno(), end - start, start)) for start, end in ranges]
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror or error}") from None
    return _pack(samples, num_bytes, crcs)


def _walk(shard: Path, file: BinaryIO, num_bytes: int, samples: _Samples) -> None:
    if num_bytes == 0:
        raise DataError(f"shard {shard} is empty (0 bytes); copy or write it again")
    end = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                if not (member.isreg() or member.isdir()) or member.issparse():
                    raise DataError(
                        f"{samples.where(member)} is a link or special file; shards hold regular files only"
                    )
                end = member.offset_data + -(-member.size // _TAR_BLOCK) * _TAR_BLOCK
                if end > num_bytes:
                    raise DataError(
                        f"{samples.where(member)} needs {end} bytes, the file has {num_bytes}: cut; copy it again"
                    )
                if member.isreg():
                    samples.add(member, end)
    except tarfile.TarError as error:
        if end:
            raise DataError(
                f"shard {shard}: damaged after offset {end} of {num_bytes} ({error}); copy it again"
            ) from None
        file.seek(0)
        head = file.read(16)
        raise DataError(f"shard {shard} is not a plain tar: it begins with {head!r} ({error})") from None
    _require_clean_end(shard, file, end, num_bytes)
    if not samples.keys:
        raise DataError(f"shard {shard} holds no sample ({num_bytes} bytes); remove it or write it again")


def _require_clean_end(shard: Path, file: BinaryIO, end: int, num_bytes: int) -> None:
    """A tar ends with two zero blocks and nothing but zeros after them; a cut or a bad header leaves something else."""
    clean = num_bytes - end >= 2 * _TAR_BLOCK
    file.seek(end)
    while clean and (chunk := file.read(1 << 20)):
        clean = not any(chunk)
    if not clean:
        raise DataError(
            f"shard {shard}: no clean end of archive at offset {end} of {num_bytes} bytes "
            "(cut, or a damaged header there); copy or write it again"
        )


def _reject_repeats(samples: _Samples) -> None:
    first: dict[str, int] = {}
    for number, key in enumerate(samples.keys):
        if key in first:
            raise DataError(
                f"shard {samples.shard}: sample {key!r} at offset {samples.starts[number]} was begun at offset "
                f"{samples.starts[first[key]]} already; the members of a sample must be adjacent and keys unique"
            )
        first[key] = number


def _pack(samples: _Samples, num_bytes: int, crcs: list[int]) -> ShardIndex:
    names = sorted(set().union(*samples.fields))
    offset = np.full((len(samples.keys), len(names)), _ABSENT, np.uint32)
    size = offset.copy()
    for row, (start, members) in enumerate(zip(samples.starts, samples.fields, strict=True)):
        for column, name in enumerate(names):
            if name in members:
                begin, length = members[name]
                offset[row, column], size[row, column] = begin - start, length
    keys = [key.encode() for key in samples.keys]
    starts = np.array(samples.starts, np.int64)
    return ShardIndex(
        format=INDEX_FORMAT,
        num_bytes=num_bytes,
        keys=np.frombuffer(b"".join(keys), np.uint8),
        key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
        start=starts,
        size=(np.array(samples.ends, np.int64) - starts).astype(np.uint32),
        crc32=np.array(crcs, np.uint32),
        field_names=np.array(names, np.str_),
        field_offset=offset,
        field_size=size,
    )
