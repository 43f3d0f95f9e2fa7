"""What is where in a shard: a strict scan of the tar, and its result kept on disk.

The index holds, per sample, one byte range with its CRC-32 and the place of each field in it; reading a sample is then
one ranged read (see `shards`). What a tar must be to be scanned is in `tar_walk`.

On disk an index is a safetensors container (8 bytes: size of the header; JSON header; arrays) of two tensors:
`samples`, the row of each sample (`_row_type`) as bytes, and `keys`, the UTF-8 of all keys joined. It is mapped into
memory: opening costs little, processes share its pages, and nothing is ever unpickled. It lies beside the shard as
`<shard>.tar.index`, else in `$PRETRAIN_CACHE/index` (default `~/.cache/pretrain/index`).

Legend: S samples, F kinds of field.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
import warnings
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.claims import claimed
from data_pipelines.errors import DataError, TooLargeError
from data_pipelines.field_kinds import picture_names
from data_pipelines.files import cache_root, write_atomically
from data_pipelines.parsing import parse_json
from data_pipelines.shards.tar_walk import Damage, LeftOut, Member, walk
from data_pipelines.storage.locations import PIPE, is_local, redact, scheme_of, split_location
from data_pipelines.storage.stores import Store

__all__ = ["ShardIndex", "is_newer", "load_index", "load_indices", "read_sidecar", "scan_shard", "sidecar"]

INDEX_FORMAT = "pretrain-index/1"
_HEADER_BYTES = 1 << 20  # the most that an index may take before its arrays
_LARGEST = 256 << 20  # the most that is fetched of one, whatever size a shard is said to have: 4 million samples
_LEFT_OUT = (  # of all shards the same text, so that it is said once
    "left out members of shards that are hidden (._000.jpg, .DS_Store) or have no KEY.FIELD name (README); "
    "`pretrain data verify` counts them"
)
_ABSENT = 0xFFFFFFFF  # begin and end of a field that a sample lacks


def _row_type(num_fields: int) -> np.dtype[np.void]:
    """One sample; `struct` reads the same bytes as "<QIIII" followed by two "I" per field."""
    return np.dtype(
        [
            ("start", "<u8"),  # offset of the sample's first tar header
            ("size", "<u4"),  # bytes from there to the end of its last member, padding included
            ("crc32", "<u4"),  # of these bytes
            ("key_begin", "<u4"),
            ("key_end", "<u4"),
            ("fields", "<u4", (num_fields, 2)),  # begin and end from `start` on; 0xFFFFFFFF: the sample lacks it
        ]
    )


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """Byte ranges of one shard, in the order of the tar."""

    num_bytes: int  # of the whole tar
    field_names: tuple[str, ...]  # (F,) sorted
    rows: npt.NDArray[np.void]  # (S,) of `_row_type(F)`
    keys: npt.NDArray[np.uint8]  # UTF-8 of all keys, joined

    @property
    def num_samples(self) -> int:
        return len(self.rows)

    @property
    def start(self) -> npt.NDArray[np.uint64]:
        """(S,) offset of each sample in the shard."""
        return self.rows["start"]

    @property
    def size(self) -> npt.NDArray[np.uint32]:
        """(S,) bytes of each sample, tar headers and padding included."""
        return self.rows["size"]

    @property
    def crc32(self) -> npt.NDArray[np.uint32]:
        """(S,) of these bytes."""
        return self.rows["crc32"]

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, in memory or in the mapped file."""
        return int(self.rows.nbytes + self.keys.nbytes)

    def row(self, sample: int) -> tuple[int, ...]:
        """The numbers of one sample (in `[0, num_samples)`, not checked), in the order of `_row_type`.

        Plain integers out of `struct`, since numpy scalars would cost ten times as much.
        """
        return self._struct.unpack_from(self._row_bytes, sample * self._struct.size)

    def cut(self, row: tuple[int, ...], content: bytes) -> dict[str, Any]:
        """The fields of a sample, cut out of the bytes of its range, and its key as `"__key__"`."""
        sample: dict[str, Any] = {"__key__": str(self._key_bytes[row[3] : row[4]], "utf-8")}
        at = 5
        for name in self.field_names:  # a comprehension over zipped slices takes twice as long
            if row[at] != _ABSENT:
                sample[name] = content[row[at] : row[at + 1]]
            at += 2
        return sample

    def key(self, sample: int) -> str:
        row = self.row(sample)
        return str(self._key_bytes[row[3] : row[4]], "utf-8")

    def field_ranges(self, sample: int) -> dict[str, tuple[int, int]]:
        """Field name -> (begin, end) inside the sample's byte range."""
        row = self.row(sample)
        ranges = zip(self.field_names, row[5::2], row[6::2], strict=True)
        return {name: (begin, end) for name, begin, end in ranges if begin != _ABSENT}

    @cached_property
    def _struct(self) -> struct.Struct:
        return struct.Struct(f"<QIIII{2 * len(self.field_names)}I")

    @cached_property
    def _row_bytes(self) -> memoryview:
        return self.rows.view(np.uint8).data

    @cached_property
    def _key_bytes(self) -> memoryview:
        return self.keys.data

    @cached_property
    def common_fields(self) -> frozenset[str]:
        """Names under which every sample has a field, see `shared_names`."""
        present = self.rows["fields"][:, :, 0] != _ABSENT  # (S, F)
        common = {name for name, everywhere in zip(self.field_names, present.all(axis=0), strict=True) if everywhere}
        for names in {picture_names(name) for name in self.field_names} - {()}:
            found = [name for name in names if name in self.field_names]
            columns = [self.field_names.index(name) for name in found]
            if common.isdisjoint(found) and (present[:, columns].sum(axis=1) == 1).all():
                common.add(found[0])
        return frozenset(common)

    def first_without(self, names: Sequence[str]) -> int | None:
        """The first sample that has none of these fields."""
        columns = [column for column, name in enumerate(self.field_names) if name in names]
        lacking = (self.rows["fields"][:, columns, 0] == _ABSENT).all(axis=1)  # (S,)
        return int(lacking.argmax()) if lacking.any() else None

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, ranges and content CRCs; independent of where the shard lies and how it is called."""
        sha = hashlib.sha256(f"pretrain-shard-index 1 {self.num_bytes} {' '.join(self.field_names)}\n".encode())
        begin, end = self.rows["fields"][:, :, 0], self.rows["fields"][:, :, 1]
        sha.update(self._key_bytes)
        sha.update(self.rows["key_end"].astype("<i8").data)
        sha.update(self.rows["start"].astype("<i8").data)
        for column in (self.rows["size"], self.rows["crc32"], begin, np.where(begin == _ABSENT, _ABSENT, end - begin)):
            sha.update(np.ascontiguousarray(column, "<u4").data)
        return sha.hexdigest()

    def to_bytes(self) -> bytes:
        """The safetensors container; equal indices give equal bytes."""
        rows, keys = self._row_bytes, self._key_bytes
        header = {
            "__metadata__": {
                "format": INDEX_FORMAT,
                "num_bytes": str(self.num_bytes),
                "fields": json.dumps(self.field_names),
            },
            "samples": {"dtype": "U8", "shape": [len(self.rows), self._struct.size], "data_offsets": [0, len(rows)]},
            "keys": {"dtype": "U8", "shape": [len(keys)], "data_offsets": [len(rows), len(rows) + len(keys)]},
        }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # the arrays begin at a multiple of 8
        return b"".join((struct.pack("<Q", len(text)), text, rows, keys))

    def save(self, path: Path) -> None:
        """Write atomically: a reader sees the whole index or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, self.to_bytes())

    @classmethod
    def open(cls, source: Path | bytes, num_bytes: int) -> ShardIndex | None:
        """The index in a file (mapped) or in bytes, if it is whole and made for a shard of `num_bytes`, else None."""
        try:
            content = source if isinstance(source, bytes) else _mapped(source)
            (header_size,) = struct.unpack_from("<Q", content)
            if header_size > _HEADER_BYTES:
                return None
            header = parse_json(content[8 : 8 + header_size])
            facts = header["__metadata__"]
            if facts["format"] != INDEX_FORMAT or int(facts["num_bytes"]) != num_bytes:
                return None
            names = tuple(map(str, parse_json(facts["fields"])))
            samples, keys = (_tensor(content, 8 + header_size, header[name]) for name in ("samples", "keys"))
            index = cls(num_bytes, names, samples.view(_row_type(len(names))), keys)
        except (OSError, ValueError, KeyError, TypeError, struct.error):
            return None
        return index if index._is_whole() else None

    def _is_whole(self) -> bool:
        """False if a range leaves what it lies in, so that no damaged index makes a read go wrong in silence."""
        rows, ends = self.rows, self.rows["fields"][:, :, 1]
        return bool(
            len(rows) > 0
            and (rows["start"] + rows["size"] <= self.num_bytes).all()
            and (rows["key_begin"] <= rows["key_end"]).all()
            and int(rows["key_end"][-1]) == len(self.keys)
            and ((ends == _ABSENT) | (ends <= rows["size"][:, None])).all()
        )


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _tensor(content: bytes | mmap.mmap, base: int, entry: dict[str, Any]) -> npt.NDArray[np.uint8]:
    begin, end = entry["data_offsets"]
    return np.frombuffer(content, np.uint8, end - begin, base + begin)


def sidecar(shard: str) -> str:
    """Location of the index beside a shard."""
    folder, name, query = split_location(shard)
    return f"{folder}/{name}.index{query}"


def read_sidecar(location: str, store: Store, num_bytes: int) -> bytes | None:
    """The file beside a shard of `num_bytes`; None if there is none, empty if it is too large to be its index.

    A member takes at least 512 bytes of a tar, and at most 32 bytes and its name of an index. (An index that is larger
    all the same, because only few samples have each of a hundred fields, is made anew by a scan.)
    """
    try:
        return store.read_file(sidecar(location), min(num_bytes, _LARGEST) + _HEADER_BYTES)
    except TooLargeError:
        return b""


def load_index(location: str, store: Store, *, num_bytes: int | None = None, digest: str = "") -> ShardIndex:
    """The index of a shard: its sidecar, else the cached one, else a new scan (of the whole shard) that is then cached.

    A local shard that is newer than its sidecar is scanned, and both must agree: copying may turn times around, but a
    shard that was changed in place is not what its index describes.

    Args:
        location: absolute path or URL.
        store: where bytes come from.
        num_bytes: size of the shard where it is listed; saves a request when the shard is remote.
        digest: of the index where it is listed, so that a remote shard that was replaced is not taken for the old one.

    Raises:
        DataError: the shard is missing, does not have `num_bytes`, is damaged, or was changed since it was indexed.
    """
    index = _loaded(location, store, num_bytes, digest, wait=True)
    assert index is not None  # it was waited for
    return index


def load_indices(locations: Sequence[str], store: Store) -> dict[str, ShardIndex]:
    """The indices of several shards by location, as `load_index` gives them.

    Processes that open the same shards at once, such as the ranks of a machine, share the scans: each takes those that
    no other is at, and waits for what the others are at only when nothing else is left.

    Raises:
        DataError: as `load_index`.
    """
    found: dict[str, ShardIndex] = {}
    for location in locations:
        if (index := _loaded(location, store, wait=False)) is not None:
            found[location] = index
    return {location: found.get(location) or load_index(location, store) for location in locations}


def _loaded(
    location: str, store: Store, num_bytes: int | None = None, digest: str = "", *, wait: bool
) -> ShardIndex | None:
    """What `load_index` describes; without `wait`, None while another process scans the shard."""
    local = is_local(location)
    size = store.size(location) if local or num_bytes is None else num_bytes
    if num_bytes not in (None, size):
        raise DataError(
            f"shard {redact(location)} has {size} bytes, expected {num_bytes} (dataset.json, or when it was opened "
            "first); copy the shard and its dataset.json again"
        )
    version = os.stat(location).st_mtime_ns if local else digest
    identity = hashlib.sha256(f"{location}\n{size}\n{version}".encode()).hexdigest()
    beside = ShardIndex.open(Path(sidecar(location)), size) if local else None
    if beside is not None and not is_newer(location, sidecar(location)):
        return beside
    cached = _cached(identity)
    index = ShardIndex.open(cached, size) if cached is not None else None
    index = index or _made_once(location, store, size, cached, wait=wait)
    if beside is not None and index is not None and beside.digest != index.digest:
        raise DataError(
            f"shard {location} was changed after the index beside it was written, and holds something else now; copy "
            f"both again, or remove {sidecar(location)} to read the shard as it is"
        )
    return index


def is_newer(path: str, other: str) -> bool:
    """Whether a local file was changed after another one.

    Raises:
        DataError: one of them cannot be looked at.
    """
    try:
        return os.stat(path).st_mtime_ns > os.stat(other).st_mtime_ns
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror}") from None


def _made_once(location: str, store: Store, size: int, cached: Path | None, *, wait: bool) -> ShardIndex | None:
    """A new index, in the cache, of which each is made by one process; None while another one is at it."""
    if cached is None:
        return _made(location, store, size)
    index = None
    try:
        with claimed(cached, wait=wait) as is_mine:
            if not is_mine:
                return None
            index = ShardIndex.open(cached, size)  # made by another between the look before and the claim
            if index is None:
                index = _made(location, store, size)
                index.save(cached)
    except OSError as error:  # a read-only home costs a scan per process, no more
        warnings.warn(f"cannot keep shard indices in {cached.parent} ({error}); set PRETRAIN_CACHE", stacklevel=2)
    return index or _made(location, store, size)


def _made(location: str, store: Store, size: int) -> ShardIndex:
    """The index beside a remote shard, or that of a scan."""
    if not is_local(location) and scheme_of(location) != PIPE and (content := read_sidecar(location, store, size)):
        index = ShardIndex.open(content, size)
        if index is not None:
            return index
    return scan_shard(store.local_copy(location), redact(location))


def _cached(identity: str) -> Path | None:
    """Where an index is kept that does not lie beside its shard; None, with a warning, where there is no such place."""
    try:
        return cache_root() / "index" / f"{identity}.index"
    except DataError as error:
        warnings.warn(f"cannot keep shard indices: {error}", stacklevel=2)
        return None


def scan_shard(path: Path, name: str | None = None) -> ShardIndex:
    """Read a whole tar, check its structure (`walk`) and compute the CRC-32 of every sample; errors call it `name`.

    Raises:
        DataError: the file is empty, no plain tar, cut, or damaged in a header; a sample is repeated, split or unnamed;
            a member is not a regular file. The message names shard, member and offset.
    """
    shard = name or str(path)
    samples: dict[str, list[Member]] = {}
    try:
        with open(path, "rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            for found in walk(file, num_bytes):
                if isinstance(found, Damage):
                    sample = "" if found.key is None else f", sample {found.key!r}"
                    raise DataError(f"shard {shard}{sample} at offset {found.offset}: {found.problem}")
                if isinstance(found, LeftOut):
                    warnings.warn(_LEFT_OUT, stacklevel=2)
                    continue
                samples.setdefault(found.key, []).append(found)
            ranges = [(members[0].offset, members[-1].end) for members in samples.values()]
            crcs = [zlib.crc32(os.pread(file.fileno(), end - start, start)) for start, end in ranges]
    except OSError as error:
        raise DataError(f"cannot read shard {shard}: {error.strerror or error}") from None
    return _pack(samples, num_bytes, crcs)


def _pack(samples: Mapping[str, Sequence[Member]], num_bytes: int, crcs: Sequence[int]) -> ShardIndex:
    names = sorted({member.field for members in samples.values() for member in members})
    columns = {name: column for column, name in enumerate(names)}
    keys = [key.encode() for key in samples]
    key_ends = np.cumsum([len(key) for key in keys])
    rows = np.zeros(len(keys), _row_type(len(names)))
    rows["start"] = [members[0].offset for members in samples.values()]
    rows["size"] = [members[-1].end - members[0].offset for members in samples.values()]
    rows["crc32"] = crcs
    rows["key_begin"][1:], rows["key_end"] = key_ends[:-1], key_ends
    rows["fields"] = _ABSENT
    for fields, members in zip(rows["fields"], samples.values(), strict=True):
        for member in members:
            begin = member.begin - members[0].offset
            fields[columns[member.field]] = begin, begin + member.size
    return ShardIndex(num_bytes, tuple(names), rows, np.frombuffer(b"".join(keys), np.uint8))
