"""A set of shards as one array of samples: `open_dataset(source).read(sample_id)`.

Samples are read at random through the index of each shard (`index`): one range of bytes and one CRC-32 per sample, no
tar parsing. Shards that a `dataset.json` of ours lists (`manifest`) are opened when a sample of them is first read, so
a set of 100 000 shards opens in seconds; the others are indexed at once. Indices are held up to `INDEX_BYTES`.

Not here: where bytes come from (`stores`), in which order samples are read (`order`), what their bytes mean (`decode`).
"""

from __future__ import annotations

import hashlib
import os
import threading
import zlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.errors import CorruptSampleError, DataError, MissingFieldError, suggest
from data_pipelines.field_kinds import cut_names, picture_names, shared_names, under_shared_names
from data_pipelines.order import SampleOrder
from data_pipelines.parsing import parse_json
from data_pipelines.shards.index import ShardIndex, is_newer, load_index, load_indices, sidecar
from data_pipelines.shards.manifest import MANIFEST_BYTES, MANIFEST_NAME, Manifests, split_digest
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.locations import is_local, redact, sibling, split_location
from data_pipelines.storage.stores import FetchOptions, Store

__all__ = ["Dataset", "Shard", "first_field", "locate", "open_dataset"]

INDEX_BYTES = 256 << 20  # of open indices per process, most of them pages that processes share; 6 million samples
_INDEX_OVERHEAD = 8 << 10  # what an open index costs besides its arrays
_SEARCHED_SHARDS = 64  # for a sample that lacks a field
_CUT_REMEDY = ": a key ends at the first dot of a name, so cat.0.jpg and cat.1.jpg are one sample; write cat_0.jpg"


@dataclass(frozen=True, slots=True)
class Shard:
    """One tar file."""

    location: str  # absolute local path or URL
    num_samples: int
    num_bytes: int
    index_digest: str

    @property
    def path(self) -> Path:
        """The file, when it is a local one."""
        return Path(self.location)

    @property
    def name(self) -> str:
        """File name, without the folder or the query string of its location."""
        return split_location(self.location)[1]


def open_dataset(
    source: str | Path | Sequence[str | Path], *, fetch: FetchOptions | None = None, limit: int | None = None
) -> Dataset:
    """Open the shards of a source (see `expand_source`).

    A shard that is neither listed in a `dataset.json` nor has an index beside it is read whole, the first time, by one
    of the processes that open it at once (`load_indices`).

    Args:
        source: what `expand_source` takes.
        fetch: how remote shards are fetched and cached.
        limit: use the first `limit` samples only, at least 1.

    Raises:
        DataError: nothing found, or a shard is damaged; names shard, member or offset, expected and actual.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit} is not allowed; it is at least 1 sample")
    fetch = fetch or FetchOptions()
    store = Store(fetch)
    manifests = Manifests(store)
    shards: list[Shard] = []
    opened: dict[int, ShardIndex] = {}
    fields: set[frozenset[str]] = set()
    num_samples = 0
    locations = expand_source(source, allow_pipe=fetch.allow_pipe, manifests=manifests)
    entries = [
        manifest.shards.get(split_location(location)[1]) if (manifest := manifests.of(location)) else None
        for location in locations
    ]
    unlisted = [location for location, entry in zip(locations, entries, strict=True) if entry is None]
    indices = load_indices(unlisted, store) if limit is None else {}  # how many shards a limit takes shows on the way
    for number, (location, entry) in enumerate(zip(locations, entries, strict=True)):
        manifest = manifests.of(location)
        if manifest and entry:
            shard, has = Shard(location, entry.samples, entry.bytes, entry.index_digest), frozenset(manifest.fields)
        else:
            index = opened[number] = indices.get(location) or load_index(location, store)
            shard = Shard(location, index.num_samples, index.num_bytes, index.digest)
            has = index.common_fields
        shards.append(shard)
        fields.add(has)
        num_samples += shard.num_samples
        if limit is not None and num_samples >= limit:
            break
    return Dataset(shards, shared_names(fields), store, opened=opened, limit=limit)


class Dataset:
    """Samples of several shards, numbered from 0 through the shards in order.

    Attributes:
        shards: the tar files, sorted by location.
        num_samples: in all shards together, or the `limit` below it.
        counts: samples used of each shard.
        fields: names that every sample has, such as `jpg`, `cls`, `seg.png`; pictures of several formats have one name,
            see `shared_names`.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        fields: frozenset[str],
        store: Store,
        *,
        opened: Mapping[int, ShardIndex],
        limit: int | None = None,
    ) -> None:
        self.shards, self.fields = tuple(shards), fields
        counts = [shard.num_samples for shard in shards]
        excess = sum(counts) - limit if limit else 0
        if excess > 0:  # only the last shard is longer than needed
            counts[-1] -= excess
        self._is_cut = excess > 0
        self.counts = tuple(counts)
        self.num_samples = sum(counts)
        self._begins = [0, *accumulate(counts)]
        self._store = store
        self._indices = _OpenIndices(self.shards, fields, store, opened)
        self._is_remote = any(not is_local(shard.location) for shard in shards)

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies names, order and content (by CRC) of the samples, wherever the shards lie.

        Raises:
            DataError: a local shard is gone, or was changed since it was indexed.
        """
        self._indices.require_unchanged()
        digest = split_digest(shard.index_digest for shard in self.shards)
        if not self._is_cut:
            return digest
        return hashlib.sha256(f"{digest} first {self.num_samples}".encode()).hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """`dataset.json` beside the first shard, whoever wrote it; `{}` if there is none, or no JSON object in it."""
        described = sibling(self.shards[0].location, MANIFEST_NAME)
        content = self._store.read_file(described, MANIFEST_BYTES) if described else None
        description = parse_json(content) if content else {}  # `open_dataset` saw that it is JSON
        return description if isinstance(description, dict) else {}

    def __len__(self) -> int:
        return self.num_samples

    def read(self, sample_id: int) -> dict[str, Any]:
        """The fields of one sample as bytes, and its key as `"__key__"` (str).

        Raises:
            CorruptSampleError: the bytes do not match their CRC-32.
            DataError: the shard is gone, shorter than its index, or not the one that `dataset.json` lists.
        """
        number, local = locate(sample_id, self._begins)
        index = self._indices[number]
        row = index.row(local)
        start, size, crc32 = row[:3]
        content = self._store.read(self.shards[number].location, start, size)
        found = zlib.crc32(content)
        if found != crc32:
            raise CorruptSampleError(
                f"{self.where(sample_id)}: bytes {start}..{start + size} have CRC-32 {found:08x}, expected {crc32:08x}"
                ": the shard changed or is damaged; copy it again or remove its index"
            )
        sample = index.cut(row, content)
        return sample if self.fields <= sample.keys() else under_shared_names(sample, self.fields)

    def prefetch(self, sample_ids: Iterable[int]) -> None:
        """Have the bytes of remote samples fetched together before they are read one by one."""
        if not self._is_remote:
            return
        ranges = []
        for sample_id in sample_ids:
            number, local = locate(sample_id, self._begins)
            start, size = self._indices[number].row(local)[:2]
            ranges.append((self.shards[number].location, start, size))
        self._store.prefetch(ranges)

    def sample_order(self, *, seed: int, block_size: int, window: int, num_streams: int) -> SampleOrder:
        """The order in which a stream reads: global positions -> (epochs, sample ids), see `order`."""
        return SampleOrder(self.counts, seed=seed, block_size=block_size, window=window, num_streams=num_streams)

    def where(self, sample_id: int) -> str:
        """Shard and key of a sample, as error messages name it."""
        number, local = locate(sample_id, self._begins)
        return f"shard {redact(self.shards[number].location)}, sample {self._indices[number].key(local)!r}"

    def require_field(self, *candidates: str) -> str:
        """The first of `candidates` that every sample has.

        Raises:
            DataError: there is none; names what there is.
        """
        try:
            return first_field(candidates, self.fields, redact(split_location(self.shards[0].location)[0]))
        except MissingFieldError as error:
            raise DataError(f"{error}{self.first_without(candidates)}") from None

    def first_without(self, names: Sequence[str]) -> str:
        """The end of a message: the first sample of the first shards that has none of these fields, and what it has."""
        for number, shard in enumerate(self.shards[:_SEARCHED_SHARDS]):
            index = self._indices[number]
            sample = index.first_without(names)
            if sample is not None:
                has = sorted(index.field_ranges(sample))
                where = f"; shard {redact(shard.location)}, sample {index.key(sample)!r} has {', '.join(has)}"
                return where + (_CUT_REMEDY if cut_names(has) else "")
        return ""

    def close(self) -> None:
        """Close the shard files; the next read opens what it needs again."""
        self._store.close()


def locate(sample_id: int, begins: Sequence[int]) -> tuple[int, int]:
    """Which of several runs of ids holds `sample_id`, and its place in it.

    Args:
        sample_id: from 0.
        begins: the first id of each run, and the end of the last one.

    Raises:
        DataError: the id is below 0 or behind the end.
    """
    if not 0 <= sample_id < begins[-1]:
        raise DataError(f"sample id {sample_id} is outside 0..{begins[-1] - 1}")
    number = bisect_right(begins, sample_id) - 1
    return number, sample_id - begins[number]


def first_field(candidates: Sequence[str], fields: frozenset[str], owner: str) -> str:
    """The first of `candidates` in `fields`; the error names `owner`, what it has and what is nearest."""
    for name in candidates:
        if name in fields:
            return name
    raise MissingFieldError(
        f"{owner}: no field {' or '.join(candidates)} in every sample; "
        f"every sample has {', '.join(sorted(fields)) or 'none'}{suggest(candidates[0], fields)}",
        candidates,
    )


class _OpenIndices:
    """Indices of shards, opened when first asked for; the most recently used stay open up to `INDEX_BYTES`.

    Threads may read at the same time; a pickled one begins with none open.
    """

    def __init__(
        self, shards: Sequence[Shard], fields: frozenset[str], store: Store, opened: Mapping[int, ShardIndex]
    ) -> None:
        self._shards, self._fields, self._store = shards, fields, store
        self._opened: OrderedDict[int, ShardIndex] = OrderedDict()  # least recently used first
        self._num_bytes = 0
        self._lock = threading.Lock()  # of opening and closing; what is open is read without
        for number, index in opened.items():
            self._keep(number, index)

    def __getitem__(self, number: int) -> ShardIndex:
        try:
            self._opened.move_to_end(number)
            return self._opened[number]
        except KeyError:  # never opened, or just closed by another thread
            with self._lock:
                index = self._open(number)
                self._keep(number, index)
            return index

    def _open(self, number: int) -> ShardIndex:
        shard = self._shards[number]
        index = load_index(shard.location, self._store, num_bytes=shard.num_bytes, digest=shard.index_digest)
        self._require_expected(shard, index)
        return index

    def require_unchanged(self) -> None:
        """Look at size and time of the local shards that are not open, and open those that may have been changed."""
        for number, shard in enumerate(self._shards):
            if number in self._opened or not is_local(shard.location):
                continue
            known = (sidecar(shard.location), str(sibling(shard.location, MANIFEST_NAME)))
            written = next(filter(os.path.exists, known), None)
            has_size = self._store.size(shard.location) == shard.num_bytes
            if written is None or not has_size or is_newer(shard.location, written):
                _ = self[number]

    def _require_expected(self, shard: Shard, index: ShardIndex) -> None:
        """A stale sidecar, or a shard that was changed since, must not decide what is trained on."""
        for what, found, expected in (
            ("samples", index.num_samples, shard.num_samples),
            ("index_digest", index.digest, shard.index_digest),
        ):
            if found != expected:
                raise DataError(
                    f"shard {redact(shard.location)}: {what} of its index is {found}, expected {expected} (dataset.json"
                    ", or when it was opened first); copy the shard, its index and dataset.json together again"
                )
        has = index.common_fields
        if lacking := [name for name in sorted(self._fields - has) if has.isdisjoint(picture_names(name))]:
            raise DataError(
                f"shard {redact(shard.location)}: not every sample has {', '.join(lacking)}, which its dataset.json "
                "lists as fields; pack the data again"
            )

    def _keep(self, number: int, index: ShardIndex) -> None:
        self._num_bytes += index.nbytes + _INDEX_OVERHEAD
        if number in self._opened:
            self._num_bytes -= self._opened[number].nbytes + _INDEX_OVERHEAD
        self._opened[number] = index
        while self._num_bytes > INDEX_BYTES and len(self._opened) > 1:
            self._num_bytes -= self._opened.popitem(last=False)[1].nbytes + _INDEX_OVERHEAD

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": OrderedDict(), "_num_bytes": 0, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
