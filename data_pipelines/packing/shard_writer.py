"""One shard from its items: a deterministic tar, its index, and a record of what went in.

The tar is plain USTAR without time, owner and group, fields of a sample adjacent and sorted, so equal items give equal
bytes. It appears under its name only when it is complete; the index beside it is written last and means "this shard
is done". `tarfile` writes it and not `webdataset.TarWriter`, whose headers are PAX and whose import loads torch: two
CPU seconds and ten times the memory in every worker process.

Not here: which items go into which shard (`pack`).
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from data_pipelines.content import compared_field, content_hash
from data_pipelines.errors import DataError
from data_pipelines.files import sha256, write_atomically
from data_pipelines.packing.conversion import Conversion, Sample, convert
from data_pipelines.packing.inputs import Item
from data_pipelines.parsing import parse_json
from data_pipelines.pixel_sums import PixelSums
from data_pipelines.shards.index import ShardIndex, is_newer, scan_shard, sidecar
from data_pipelines.shards.manifest import ShardEntry
from data_pipelines.worker_pool import Advance

__all__ = ["ShardJob", "ShardRecord", "finished_shard", "sample_key", "write_shard"]


@dataclass(frozen=True)
class ShardJob:
    """A shard to write."""

    path: str  # of the tar
    record: str  # where the record is kept until the data set is complete
    first: int  # number of the first item in the whole data set
    items: Sequence[Item]
    conversion: Conversion


@dataclass(frozen=True)
class ShardRecord:
    """What packing a shard found out."""

    name: str  # of the tar
    entry: ShardEntry | None  # None when all items were rejected: there is no tar then
    fields: tuple[str, ...]  # those that every sample has
    class_counts: dict[int, int]
    sums: PixelSums
    rejected: tuple[tuple[str, str], ...]  # name of the item, what is wrong with it
    contents: tuple[int, ...]  # `content_hash` of each sample written, 0 where there is nothing to compare
    num_transparent: int  # samples with a picture that is not opaque

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> ShardRecord:
        stored = parse_json(content)
        return cls(
            name=stored["name"],
            entry=stored["entry"] and ShardEntry(**stored["entry"]),
            fields=tuple(stored["fields"]),
            class_counts={int(label): count for label, count in stored["class_counts"].items()},
            sums=PixelSums(**stored["sums"]),
            rejected=tuple((name, reason) for name, reason in stored["rejected"]),
            contents=tuple(stored["contents"]),
            num_transparent=int(stored["num_transparent"]),
        )


@dataclass
class _Seen:
    """What was seen in the samples of a shard while it was written."""

    labels: Counter[int] = field(default_factory=Counter)
    sums: PixelSums = field(default_factory=PixelSums)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)
    num_transparent: int = 0

    def add(self, sample: Sample) -> None:
        compared = compared_field(sample.fields, None)
        self.contents.append(content_hash(sample.fields[compared]) if compared else 0)
        self.sums.add(sample.sums)
        self.num_transparent += sample.is_transparent
        if sample.label is not None:
            self.labels[sample.label] += 1


def sample_key(number: int) -> str:
    """Key of a sample that has no name of its own: its number in the whole data set, sortable as text, without dots."""
    return f"{number:09d}"


def write_shard(job: ShardJob, advance: Advance) -> ShardRecord:
    """Write tar, record and index, in this order, each under its name only when it is complete."""
    temporary, name = Path(f"{job.path}.tmp"), os.path.basename(job.path)
    seen = _Seen()
    _write_tar(temporary, job, advance, seen)
    entry, index = None, None
    if len(seen.rejected) < len(job.items):
        index = scan_shard(temporary, job.path)
        entry = ShardEntry(name, index.num_samples, index.num_bytes, sha256(temporary), index.digest)
        os.replace(temporary, job.path)
    else:
        temporary.unlink()
    fields = tuple(sorted(index.common_fields)) if index else ()
    record = ShardRecord(
        name=name,
        entry=entry,
        fields=fields,
        class_counts=dict(sorted(seen.labels.items())),
        sums=seen.sums,
        rejected=tuple(seen.rejected),
        contents=tuple(seen.contents),
        num_transparent=seen.num_transparent,
    )
    write_atomically(Path(job.record), record.to_bytes())
    if index is not None:
        write_atomically(Path(sidecar(job.path)), index.to_bytes())
    return record


def finished_shard(job: ShardJob) -> ShardRecord | None:
    """The record of a shard that an earlier run finished; None if it must be written (again)."""
    try:
        record = ShardRecord.from_bytes(Path(job.record).read_bytes())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if record.entry is None:
        return record
    with suppress(OSError, DataError):
        index = ShardIndex.open(Path(sidecar(job.path)), os.stat(job.path).st_size)
        if is_newer(job.path, sidecar(job.path)):  # changed since, or the two were copied: written again
            return None
        if index is not None and index.digest == record.entry.index_digest:
            return record
    return None


def _write_tar(path: Path, job: ShardJob, advance: Advance, seen: _Seen) -> None:
    with open(path, "wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for number, item in enumerate(job.items, start=job.first):
                try:
                    sample = convert(item, job.conversion)
                except DataError as error:
                    seen.rejected.append((item.name, str(error)))
                else:
                    _add_sample(tar, item.key or sample_key(number), sample.fields)
                    seen.add(sample)
                advance(1)
        file.flush()
        os.fsync(file.fileno())


def _add_sample(tar: tarfile.TarFile, key: str, fields: Mapping[str, bytes]) -> None:
    for name in sorted(fields):
        member = tarfile.TarInfo(f"{key}.{name}")  # time and owner 0, no names
        member.size, member.mode = len(fields[name]), 0o444
        tar.addfile(member, BytesIO(fields[name]))
