"""A set of shards as one array of samples: `open_dataset(source).read(sample_id)`.

Samples are read at random through the index of each shard (`index`): one range of bytes and one CRC-32 per sample, no
tar parsing.

Not here: where bytes come from (`stores`), in which order samples are read (`order`), what their bytes mean (`decode`).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.index import ShardIndex, load_index
from data_pipelines.source import expand_source
from data_pipelines.stores import Store

__all__ = ["Dataset", "Shard", "open_dataset"]


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    location: str  # absolute local path or URL
    num_samples: int
    num_bytes: int

    @property
    def path(self) -> Path:
        """The file, when it is a local one."""
        return Path(self.location)


def open_dataset(source: str | Path | Sequence[str | Path]) -> Dataset:
    """Open the shards of a source (see `expand_source`); the first time, each shard is read whole to index it.

    Raises:
        DataError: nothing found, or a shard is damaged; names shard, member or offset, expected and actual.
    """
    locations = expand_source(source)
    return Dataset(locations, [load_index(Path(location)) for location in locations])


class Dataset:
    """Samples of several shards, numbered from 0 through the shards in order.

    Attributes:
        shards: the tar files, sorted by path.
        num_samples: in all shards together.
        counts: samples per shard.
        fields: names that every sample has, such as `jpg`, `cls`, `seg.png`.
    """

    def __init__(self, locations: Sequence[str], indices: Sequence[ShardIndex]) -> None:
        self._indices = list(indices)
        named = zip(locations, indices, strict=True)
        self.shards = tuple(Shard(location, index.num_samples, index.num_bytes) for location, index in named)
        self.counts = tuple(shard.num_samples for shard in self.shards)
        self.num_samples = sum(self.counts)
        self.fields = frozenset[str].intersection(*(index.common_fields for index in indices))
        self._ends = list(accumulate(self.counts))
        self._store = Store()

    @cached_property
    def digest(self) -> str:
        """SHA-256 that identifies names, order and content (by CRC) of the samples, wherever the shards lie."""
        return hashlib.sha256("".join(index.digest for index in self._indices).encode()).hexdigest()

    @cached_property
    def description(self) -> dict[str, Any]:
        """`dataset.json` beside the first shard, `{}` if there is none."""
        path = self.shards[0].path.with_name("dataset.json")
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise DataError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise DataError(f"{path} holds a JSON {type(content).__name__}; it must be an object")
        return content

    def __len__(self) -> int:
        return self.num_samples

    def read(self, sample_id: int) -> dict[str, Any]:
        """The fields of one sample as bytes, and its key as `"__key__"` (str).

        Raises:
            DataError: the shard is gone, shorter than its index, or its bytes do not match their CRC-32.
        """
        number, local = self._locate(sample_id)
        index = self._indices[number]
        start, size = int(index.start[local]), int(index.size[local])
        content = self._store.read(self.shards[number].location, start, size)
        crc = zlib.crc32(content)
        if crc != index.crc32[local]:
            raise CorruptSampleError(
                f"{self.where(sample_id)}: bytes {start}..{start + size} have CRC-32 {crc:08x}, expected "
                f"{index.crc32[local]:08x}: the shard changed or is damaged; copy it again or remove its index"
            )
        sample: dict[str, Any] = {name: content[a:b] for name, (a, b) in index.field_ranges(local).items()}
        sample["__key__"] = index.key(local)
        return sample

    def where(self, sample_id: int) -> str:
        """Shard and key of a sample, as error messages name it."""
        number, local = self._locate(sample_id)
        return f"shard {self.shards[number].location}, sample {self._indices[number].key(local)!r}"

    def require_field(self, *candidates: str) -> str:
        """The first of `candidates` that every sample has.

        Raises:
            DataError: there is none; names what there is.
        """
        for name in candidates:
            if name in self.fields:
                return name
        near = difflib.get_close_matches(candidates[0], sorted(self.fields), n=1)
        raise DataError(
            f"{self.shards[0].path.parent}: no field {' or '.join(candidates)} in every sample; "
            f"every sample has {', '.join(sorted(self.fields)) or 'none'}{f' (nearest: {near[0]})' if near else ''}"
        )

    def _locate(self, sample_id: int) -> tuple[int, int]:
        if not 0 <= sample_id < self.num_samples:
            raise DataError(f"sample id {sample_id} is outside 0..{self.num_samples - 1}")
        number = bisect_right(self._ends, sample_id)
        return number, sample_id - (self._ends[number] - self.counts[number])

    def close(self) -> None:
        """Close the shard files; the next read opens what it needs again."""
        self._store.close()
