"""`dataset.json`: what a packed data set says about itself, one file per directory of shards.

It names fields, classes, splits and shards, so that a set of thousands of shards opens without reading each of them,
and it is the last file that packing writes: a directory without it is not finished. Other people's `dataset.json`
(without our `format`) describe their data in their own way; for those `read_manifest` returns None and the shards are
indexed one by one.

Nothing heavy is imported. Not here: what wrote it (`pack`), what a field holds (`field_kinds`, `fields`), how the
shards are read (`dataset`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_pipelines.errors import DataError
from data_pipelines.parsing import parse_json
from data_pipelines.storage.locations import redact, sibling, split_location

if TYPE_CHECKING:
    from data_pipelines.storage.stores import Store

__all__ = [
    "FORMAT",
    "MANIFEST_BYTES",
    "MANIFEST_NAME",
    "UNFINISHED",
    "ChannelStats",
    "Manifest",
    "Manifests",
    "ShardEntry",
    "Split",
    "listed_shards",
    "read_manifest",
    "split_digest",
]

MANIFEST_NAME = "dataset.json"
UNFINISHED = ".packing/request.json"  # beside the shards until all are there
MANIFEST_BYTES = 64 << 20  # the most that is read of one: 200,000 shards, or the keys of two million frames in order
FORMAT = "pretrain-dataset/1"


@dataclass(frozen=True)
class ShardEntry:
    """One shard of a split."""

    name: str  # file name beside `dataset.json`
    samples: int
    bytes: int
    sha256: str  # of the tar
    index_digest: str  # `ShardIndex.digest`


@dataclass(frozen=True)
class Split:
    """The shards of one split, in order."""

    samples: int
    digest: str  # `split_digest` of the shards
    shards: tuple[ShardEntry, ...]
    class_counts: tuple[int, ...] | None = None  # samples per class index
    sequences: Mapping[str, Sequence[str]] | None = None  # name -> keys in order of time


@dataclass(frozen=True)
class ChannelStats:
    """Mean and standard deviation per channel over all pixels of all splits, values in [0, 1]."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: int


@dataclass(frozen=True)
class Manifest:
    """The content of `dataset.json`."""

    name: str
    fields: Mapping[str, str]  # those that every sample has -> one of `FIELD_KINDS`
    splits: Mapping[str, Split]
    options: Mapping[str, Any] = field(default_factory=dict)  # what determines the bytes, besides the input
    classes: tuple[str, ...] | None = None  # in index order
    ignore_index: int | None = None  # value of masks that counts as no label
    stats: ChannelStats | None = None
    duplicates: int | None = None  # samples left out because an equal one is there
    rejected: int | None = None  # samples left out because they are damaged
    created_by: str = ""

    @property
    def num_samples(self) -> int:
        return sum(split.samples for split in self.splits.values())

    @cached_property
    def shards(self) -> dict[str, ShardEntry]:
        """File name -> entry, over all splits."""
        return {shard.name: shard for split in self.splits.values() for shard in split.shards}

    def to_bytes(self) -> bytes:
        """JSON text; equal manifests give equal bytes."""
        content = {"format": FORMAT, **asdict(self)}
        return (json.dumps(_without_none(content), indent=1) + "\n").encode()


def split_digest(index_digests: Iterable[str]) -> str:
    """SHA-256 that identifies the samples of some shards in order, wherever they lie (as `Dataset.digest`)."""
    return hashlib.sha256("".join(index_digests).encode()).hexdigest()


def listed_shards(content: Any) -> dict[str, tuple[str, Mapping[str, Any]]]:
    """The shards that a parsed `dataset.json` lists, by file name: the split and what is said of it.

    Ours or whoever's has `splits`: of other origin an entry counts as far as it has `name` or `file`, and `bytes`,
    `samples` and `sha256` if it likes.
    """
    splits = content.get("splits") if isinstance(content, Mapping) else None
    return {
        str(entry.get("name", entry.get("file"))): (str(name), entry)
        for name, split in (splits.items() if isinstance(splits, Mapping) else ())
        for entry in ((split.get("shards") if isinstance(split, Mapping) else None) or ())
        if isinstance(entry, Mapping)
    }


def read_manifest(content: bytes | Mapping[str, Any]) -> Manifest | None:
    """Read `dataset.json`; None if it is not one of ours.

    Raises:
        DataError: it is not JSON, or has our format but lacks what the format demands.
    """
    if isinstance(content, bytes):
        try:
            content = parse_json(content)
        except ValueError as error:
            raise DataError(f"{MANIFEST_NAME} is not valid JSON: {error}") from None
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        return None
    try:
        return _parse(content)
    except KeyError as error:
        raise DataError(f"{MANIFEST_NAME} of format {FORMAT} lacks {error}; pack the data again") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{MANIFEST_NAME} of format {FORMAT} is malformed ({error}); pack the data again") from None


class Manifests:
    """The `dataset.json` of folders, each fetched and parsed once."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._read: dict[str, Manifest | None] = {}  # by folder

    def of(self, location: str) -> Manifest | None:
        """That of the folder of a shard, or of a folder whose location ends in `/`; None if there is none of ours.

        Raises:
            DataError: as `read_manifest`, with the folder; or it cannot be fetched.
        """
        folder = split_location(location)[0]
        if folder not in self._read:
            described = sibling(location, MANIFEST_NAME)
            content = self.store.read_file(described, MANIFEST_BYTES) if described else None
            try:
                self._read[folder] = read_manifest(content) if content else None
            except DataError as error:
                raise DataError(f"{redact(folder)}/{error}") from None
        return self._read[folder]


def _parse(content: Mapping[str, Any]) -> Manifest:
    stats = content.get("stats")
    return Manifest(
        name=str(content["name"]),
        fields={str(name): str(kind) for name, kind in content["fields"].items()},
        splits={str(name): _parse_split(split) for name, split in content["splits"].items()},
        options=dict(content.get("options", {})),
        classes=_optional_tuple(content.get("classes")),
        ignore_index=content.get("ignore_index"),
        stats=stats and ChannelStats(tuple(stats["mean"]), tuple(stats["std"]), int(stats["pixels"])),
        duplicates=content.get("duplicates"),
        rejected=content.get("rejected"),
        created_by=str(content.get("created_by", "")),
    )


def _parse_split(split: Mapping[str, Any]) -> Split:
    return Split(
        samples=int(split["samples"]),
        digest=str(split["digest"]),
        shards=tuple(
            ShardEntry(
                name=str(shard["name"]),
                samples=int(shard["samples"]),
                bytes=int(shard["bytes"]),
                sha256=str(shard["sha256"]),
                index_digest=str(shard["index_digest"]),
            )
            for shard in split["shards"]
        ),
        class_counts=_optional_tuple(split.get("class_counts")),
        sequences=split.get("sequences"),
    )


def _optional_tuple(values: Sequence[Any] | None) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _without_none(value: Any) -> Any:
    """Optional keys that are not set do not appear in the file."""
    if isinstance(value, dict):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_without_none(entry) for entry in value]
    return value
