"""Is a data set whole? Every shard is read completely and every damage is named, the last ones too.

Of each shard: that it is there, its bytes, SHA-256 and number of samples against `dataset.json`, the structure of the
tar (`tar_walk`), the CRC-32 of every sample against the sidecar index, whether every member decodes as what its field
says, whether labels are classes that there are, and whether every sample has a picture where others have. A
`dataset.json` of other people counts as far as it lists shards with `file` or `name`, `bytes`, `samples` and `sha256`.
Nothing is unpickled: fields named like pickles are counted and never read.

Not here: the same checks at run time, where the first damage of a sample ends the reading of it (`shards`, `stream`).
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.content import compared_field, content_hash, copies_between
from data_pipelines.errors import DataError
from data_pipelines.field_kinds import cut_names, is_never_read, kind_of_field
from data_pipelines.fields import decode_field, label_mix_up
from data_pipelines.parsing import parse_json
from data_pipelines.shards.index import ShardIndex, read_sidecar
from data_pipelines.shards.manifest import MANIFEST_BYTES, MANIFEST_NAME, listed_shards
from data_pipelines.shards.source import expand_source, missing_shards
from data_pipelines.shards.tar_walk import Damage, LeftOut, Member, walk
from data_pipelines.split_names import split_of_tar
from data_pipelines.storage.locations import PIPE, redact, scheme_of, sibling, split_location
from data_pipelines.storage.stores import FetchOptions, Store
from data_pipelines.worker_pool import Advance, run_jobs

__all__ = ["Finding", "Report", "verify"]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        shard: location of the shard (or of the `dataset.json`).
        key: of the sample, when it is known.
        offset: byte of the shard where it is wrong, when it has a place.
        problem: what is wrong there, with expected and actual values.
    """

    shard: str
    key: str | None
    offset: int | None
    problem: str

    def __str__(self) -> str:
        sample = "" if self.key is None else f", sample {self.key!r}"
        place = "" if self.offset is None else f" at offset {self.offset}"
        return f"{self.shard}{sample}{place}: {self.problem}"


@dataclass
class Report:
    """What `verify` read and what it found, by shard and offset."""

    findings: list[Finding] = field(default_factory=list)
    num_shards: int = 0
    num_samples: int = 0
    num_bytes: int = 0
    fields: Counter[str] = field(default_factory=Counter)  # members per field
    unknown: frozenset[str] = frozenset()  # fields that are counted only: nothing says what they hold
    never_read: frozenset[str] = frozenset()  # fields named like pickles
    num_pictured: int = 0  # samples with a picture
    contents: dict[str, list[int]] = field(default_factory=dict)  # split, "" if unknown -> hash of each sample
    left_out: list[str] = field(default_factory=list)  # names of members that are hidden or not called KEY.FIELD

    def add(self, other: Report) -> None:
        self.findings += other.findings
        self.num_shards += other.num_shards
        self.num_samples += other.num_samples
        self.num_bytes += other.num_bytes
        self.fields += other.fields
        self.unknown |= other.unknown
        self.never_read |= other.never_read
        self.num_pictured += other.num_pictured
        for split, contents in other.contents.items():
            self.contents.setdefault(split, []).extend(contents)
        self.left_out += other.left_out


@dataclass(frozen=True)
class _Folder:
    """What the `dataset.json` of a folder says about the shards beside it."""

    shards: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by file name
    splits: Mapping[str, str] = field(default_factory=dict)  # of each shard
    kinds: Any = None  # by field
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class _Job:
    number: int  # of the shard in the source
    location: str
    folder: _Folder
    decode: bool
    fetch: FetchOptions


def verify(
    source: str | Path | Sequence[str | Path],
    *,
    decode: bool = True,
    workers: int = 1,
    fetch: FetchOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read every shard of a source whole and collect what is wrong.

    Args:
        source: as `expand_source`.
        decode: also decode every member of a known kind.
        workers: processes; shards are shared out among them.
        fetch: how remote shards are read.
        progress: called after each shard with the number of shards done and of all.

    Raises:
        DataError: the source itself is wrong (nothing found, not allowed). Damages of shards are findings.

    Warns of what need not be wrong: copies of samples in several splits, names that look cut at a dot.
    """
    fetch = fetch or FetchOptions()
    store, report = Store(fetch), Report()
    locations = expand_source(source, allow_pipe=fetch.allow_pipe, store=store, allow_missing=True)
    folders: dict[str, _Folder] = {}
    for location in locations:
        place = split_location(location)[0]
        if place not in folders:
            folders[place] = _read_folder(location, store, report)
    store.close()
    said = f"missing, though {MANIFEST_NAME} lists it"
    report.findings += [Finding(location, None, None, said) for location in missing_shards(source)]
    jobs = [_Job(n, place, folders[split_location(place)[0]], decode, fetch) for n, place in enumerate(locations)]
    checked = {}
    for number, found in run_jobs(_check_shard, jobs, workers, lambda _: None):
        checked[number] = found
        if progress is not None:
            progress(len(checked), len(jobs))
    for number, job in enumerate(jobs):
        found = checked[number]
        others_have = any(other.num_pictured for other in checked.values())
        if found.num_samples and not found.num_pictured and others_have and not found.findings:
            problem = "no sample has a picture, though those of other shards have"
            found.findings.append(Finding(redact(job.location), None, None, problem))
        report.add(found)
    _warn(report)
    return report


def _warn(report: Report) -> None:
    contents = {split: np.array(hashes, np.uint64) for split, hashes in report.contents.items() if split}
    for copies in copies_between(contents):
        warnings.warn(f"{copies}, the first is number {copies.first} of {copies.split}", stacklevel=3)
    if cut := cut_names(report.fields):
        warnings.warn(
            f"fields {', '.join(cut[:5])} look like rests of names with dots: a key ends at the first dot, so "
            "cat.0.jpg and cat.1.jpg are one sample; unless that is meant, write cat_0.jpg or pack a folder",
            stacklevel=3,
        )


def _read_folder(shard: str, store: Store, report: Report) -> _Folder:
    location = sibling(shard, MANIFEST_NAME)
    content = None if location is None else store.read_file(location, MANIFEST_BYTES)
    if location is None or content is None:
        return _Folder()
    try:
        description = parse_json(content)
    except ValueError as error:
        report.findings.append(Finding(redact(location), None, None, f"not valid: {error}"))
        return _Folder()
    if not isinstance(description, dict):  # other people's, who may write what they like
        return _Folder()
    classes = description.get("classes")
    entries = listed_shards(description)
    return _Folder(
        shards={name: entry for name, (_, entry) in entries.items()},
        splits={name: split for name, (split, _) in entries.items()},
        kinds=description.get("fields"),
        classes=tuple(map(str, classes)) if isinstance(classes, list) else None,
    )


def _check_shard(job: _Job, advance: Advance) -> tuple[int, Report]:
    report, store = Report(num_shards=1), Store(job.fetch)
    problems: list[Problem] = []
    try:
        with open(store.local_copy(job.location), "rb") as file:
            report.num_bytes = file.seek(0, os.SEEK_END)
            problems.extend(_check(job, store, file, report))
    except DataError as error:
        problems.append((None, None, f"cannot be fetched: {error}"))
    except OSError as error:
        problems.append((None, None, f"cannot be read: {error.strerror or error}"))
    finally:
        store.close()
    problems.sort(key=lambda problem: -1 if problem[1] is None else problem[1])
    report.findings += [Finding(redact(job.location), *problem) for problem in problems]
    return job.number, report


Problem = tuple[str | None, int | None, str]  # key, offset, what is wrong


def _check(job: _Job, store: Store, file: BufferedReader, report: Report) -> Iterator[Problem]:
    expected = job.folder.shards.get(split_location(job.location)[1], {})
    members, damages = [], []
    for found in walk(file, report.num_bytes):
        if isinstance(found, Member):
            members.append(found)
        elif isinstance(found, LeftOut):
            report.left_out.append(found.name)
        else:
            damages.append(found)
    yield from ((damage.key, damage.offset, damage.problem) for damage in damages)
    report.num_samples = len({member.key for member in members})
    report.fields.update(member.field for member in members)
    yield from _check_manifest(file, expected, report)
    yield from _check_index(job.location, store, file, expected, report, damages)
    yield from _check_members(job, file, members, damages, report)


def _check_manifest(file: BufferedReader, expected: Mapping[str, Any], report: Report) -> Iterator[Problem]:
    """Size, SHA-256 and number of samples, as far as `dataset.json` gives them."""
    named = ("bytes", report.num_bytes), ("samples", report.num_samples)
    for name, actual in named:
        if name in expected and expected[name] != actual:
            yield None, None, f"{actual} {name}, {MANIFEST_NAME} says {expected[name]}"
    if "sha256" in expected:
        file.seek(0)
        actual_digest = hashlib.file_digest(file, "sha256").hexdigest()
        if actual_digest != expected["sha256"]:
            yield None, None, f"SHA-256 is {actual_digest}, {MANIFEST_NAME} says {expected['sha256']}"


def _check_index(
    location: str,
    store: Store,
    file: BufferedReader,
    expected: Mapping[str, Any],
    report: Report,
    damages: Sequence[Damage],
) -> Iterator[Problem]:
    """CRC-32 of every sample against the sidecar index, if there is one."""
    content = None if scheme_of(location) == PIPE else read_sidecar(location, store, report.num_bytes)
    if content is None:
        return
    sizes = dict.fromkeys((report.num_bytes, expected.get("bytes", report.num_bytes)))
    index = next(filter(None, (ShardIndex.open(content, size) for size in sizes)), None)
    if index is None:
        yield None, None, f"the sidecar index is damaged or of another file (this one has {report.num_bytes} bytes)"
        return
    if expected.get("index_digest", index.digest) != index.digest:
        yield None, None, f"digest of the sidecar index is {index.digest}, expected {expected['index_digest']}"
    if index.num_samples != report.num_samples and not damages:
        yield None, None, f"{report.num_samples} samples, the sidecar index has {index.num_samples}"
    for sample, (start, size, crc32) in enumerate(zip(index.start, index.size, index.crc32, strict=True)):
        file.seek(start)
        content = file.read(size)
        if len(content) != size:
            yield index.key(sample), int(start), f"needs {size} bytes, the file has {len(content)} there: cut"
        elif (actual := zlib.crc32(content)) != crc32:
            yield index.key(sample), int(start), f"CRC-32 of {size} bytes is {actual:08x}, the index says {crc32:08x}"


def _check_members(
    job: _Job, file: BufferedReader, members: Sequence[Member], damages: Sequence[Damage], report: Report
) -> Iterator[Problem]:
    """Decode every member of a known kind; labels must be classes that there are.

    Where most samples have a picture, all do. Where they say the name of their class (`class_name` in json), label and
    name must be the same class.
    """
    report.never_read = frozenset(filter(is_never_read, report.fields))
    kinds = {name: kind_of_field(name, job.folder.kinds) for name in report.fields}
    report.unknown = frozenset(name for name, kind in kinds.items() if kind is None) - report.never_read
    samples = dict[str, list[Member]]()
    for member in members:
        samples.setdefault(member.key, []).append(member)
    pictured = {member.key for member in members if kinds[member.field] == "image"}
    report.num_pictured = len(pictured)
    name = split_location(job.location)[1]
    contents = report.contents.setdefault(job.folder.splits.get(name) or split_of_tar(name) or "", [])
    needs_picture = 2 * len(pictured) > len(samples) and not damages
    for key, fields in samples.items():
        if needs_picture and key not in pictured:
            has = ", ".join(member.field for member in fields)
            yield key, fields[0].offset, f"has no picture, {len(pictured)} samples of the shard have; it has {has}"
        compared = compared_field((member.field for member in fields), job.folder.kinds)
        contents.append(0)
        values = dict[str, Any]()
        for member in fields:
            kind = kinds[member.field]
            if kind is None or not (job.decode or member.field == compared):
                continue
            file.seek(member.begin)
            content = file.read(member.size)
            if member.field == compared:
                contents[-1] = content_hash(content)
            if not job.decode:
                continue
            try:
                value = values[member.field] = decode_field(kind, content)
            except DataError as error:
                yield key, member.offset, f"field {member.field} ({kind}): {error}"
                continue
            if kind == "label" and job.folder.classes and not 0 <= value < len(job.folder.classes):
                allowed = f"0..{len(job.folder.classes) - 1}, the classes of {MANIFEST_NAME}"
                yield key, member.offset, f"field {member.field} (label): {value} is outside {allowed}"
        if problem := label_mix_up(values.get("cls"), values.get("json"), job.folder.classes):
            yield key, fields[0].offset, problem
