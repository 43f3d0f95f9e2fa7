"""What is in a data set, in numbers: sizes, shapes, channel means, class balance, copies.

Samples are read in order, shard by shard, and the tallies of the shards are added up in their order, so the numbers do
not depend on how many processes made them. Samples that do not read or decode are counted and left out.

Not here: which samples are damaged and where (`verify`), how the numbers of a field are collected (`tallies`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.content import COMPARED, content_hash
from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.field_kinds import kind_of_field
from data_pipelines.inspection.tallies import ArrayTally, ImageTally, LabelTally, MaskTally, balance, spread
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.storage.stores import FetchOptions
from data_pipelines.worker_pool import Advance, run_jobs

__all__ = ["FieldStats", "Stats", "stats"]

Tally = ImageTally | LabelTally | MaskTally | ArrayTally

_SAMPLES_PER_REPORT = 64  # to the progress bar


@dataclass(frozen=True)
class FieldStats:
    """One field.

    Attributes:
        kind: as `manifest.FIELD_KINDS`; None for fields that nothing is known about.
        count: samples that have it.
        total_bytes: of its members together.
        bytes: of its members: min, p5, median, p95, max.
        values: what its kind gives: `width`, `height`, `pixels`, `mean` and `std` per channel in [0, 1] (image);
            `classes`, class -> samples, with `balance` (label); class -> pixels (mask); `arrays` by name with
            `dtypes`, `shape` per axis, `min`, `max`, `mean`, `std` (per channel if there are), `not_finite`.
    """

    kind: str | None
    count: int
    total_bytes: int
    bytes: dict[str, int]
    values: dict[str, Any]


@dataclass(frozen=True)
class Stats:
    """Numbers about the first `read` samples of a data set.

    Attributes:
        shards, bytes, samples: of the whole source.
        read: samples the other numbers are about.
        damaged: samples among them that do not read, or of which a field does not decode.
        duplicates: samples whose content equals that of an earlier one, in the field `compared`.
        class_names: of `dataset.json`, in the order of the class indices.
        recipe: settings that these numbers propose.
    """

    shards: int
    bytes: int
    samples: int
    read: int
    damaged: int
    compared: str | None
    duplicates: int
    class_names: list[str]
    fields: dict[str, FieldStats]
    recipe: dict[str, list[float]]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Job:
    number: int  # of the shard in the source
    location: str
    num_samples: int  # to read, from the first of the shard
    declared: Any  # `fields` of dataset.json
    fetch: FetchOptions | None


@dataclass
class _Shard:
    """What was counted in one shard, later in several."""

    read: int = 0
    damaged: int = 0
    sizes: dict[str, list[int]] = field(default_factory=dict)  # field -> bytes of each of its members
    tallies: dict[str, Tally] = field(default_factory=dict)  # field -> its values
    contents: dict[str, list[int]] = field(default_factory=dict)  # field -> 64 bit hash of each of its members

    def merge(self, other: _Shard) -> None:
        self.read += other.read
        self.damaged += other.damaged
        for mine, others in ((self.sizes, other.sizes), (self.contents, other.contents)):
            for name, values in others.items():
                mine.setdefault(name, []).extend(values)
        for name, tally in other.tallies.items():
            if name in self.tallies:
                self.tallies[name].merge(tally)  # type: ignore[arg-type] # the same field has the same kind everywhere
            else:
                self.tallies[name] = tally


def stats(
    source: str | Path | Sequence[str | Path],
    *,
    limit: int | None = None,
    workers: int = 1,
    fetch: FetchOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Stats:
    """Read a data set once and count.

    Args:
        source: as `open_dataset`.
        limit: read the first so many samples only; sizes of the whole are given all the same.
        workers: processes; shards are shared out among them.
        fetch: how remote shards are read.
        progress: called now and then with the number of samples read so far and of all to read.

    Raises:
        DataError: the source is wrong or a shard of it is damaged.
    """
    dataset = open_dataset(source, fetch=fetch)
    jobs = list(_jobs(dataset, limit, fetch))
    to_read, num_read = sum(job.num_samples for job in jobs), 0

    def advance(count: int) -> None:
        nonlocal num_read
        num_read += count
        if progress is not None:
            progress(num_read, to_read)

    counted, everything = dict(run_jobs(_count_shard, jobs, workers, advance)), _Shard()
    for number in range(len(jobs)):
        everything.merge(counted[number])
    return _summarise(dataset, everything)


def _jobs(dataset: Dataset, limit: int | None, fetch: FetchOptions | None) -> Sequence[_Job]:
    declared = dataset.description.get("fields")
    jobs: list[_Job] = []
    left = dataset.num_samples if limit is None else limit
    for shard in dataset.shards:
        if left > 0:
            jobs.append(_Job(len(jobs), shard.location, min(left, shard.num_samples), declared, fetch))
            left -= shard.num_samples
    return jobs


def _count_shard(job: _Job, advance: Advance) -> tuple[int, _Shard]:
    counted, dataset = _Shard(), open_dataset(job.location, fetch=job.fetch)
    for number in range(job.num_samples):
        counted.read += 1
        if counted.read % _SAMPLES_PER_REPORT == 0 or counted.read == job.num_samples:
            advance(counted.read - (counted.read - 1) // _SAMPLES_PER_REPORT * _SAMPLES_PER_REPORT)
        try:
            sample = dataset.read(number)
            del sample["__key__"]
            _count_sample(sample, job.declared, counted)
        except CorruptSampleError:
            counted.damaged += 1
    dataset.close()
    return job.number, counted


def _count_sample(sample: Mapping[str, bytes], declared: Any, counted: _Shard) -> None:
    for name, data in sample.items():
        kind = kind_of_field(name, declared)
        counted.sizes.setdefault(name, []).append(len(data))
        if kind in COMPARED:
            counted.contents.setdefault(name, []).append(content_hash(data))
        if kind not in (None, "json", "text"):
            tally = counted.tallies.get(name) or _new_tally(str(kind))
            try:
                tally.add(data)
            except DataError as error:
                raise CorruptSampleError(str(error)) from None
            counted.tallies[name] = tally


def _new_tally(kind: str) -> Tally:
    if kind == "image":
        return ImageTally()
    if kind == "label":
        return LabelTally()
    return MaskTally() if kind == "mask" else ArrayTally(kind)


def _summarise(dataset: Dataset, counted: _Shard) -> Stats:
    description = dataset.description
    declared, classes = description.get("fields"), description.get("classes")
    kinds = {name: kind_of_field(name, declared) for name in sorted(counted.sizes)}
    class_names = list(map(str, classes)) if isinstance(classes, list) else []
    fields = {name: _field_stats(kind, name, counted, len(class_names)) for name, kind in kinds.items()}
    compared = min(counted.contents, key=lambda name: COMPARED.index(str(kinds[name])), default=None)
    contents = np.array(counted.contents[compared], np.uint64) if compared else np.zeros(0, np.uint64)
    return Stats(
        shards=len(dataset.shards),
        bytes=sum(shard.num_bytes for shard in dataset.shards),
        samples=dataset.num_samples,
        read=counted.read,
        damaged=counted.damaged,
        compared=compared,
        duplicates=len(contents) - len(np.unique(contents)),
        class_names=class_names,
        fields=fields,
        recipe=_recipe(fields),
    )


def _field_stats(kind: str | None, name: str, counted: _Shard, num_classes: int) -> FieldStats:
    sizes, tally = counted.sizes[name], counted.tallies.get(name)
    values = {} if tally is None else tally.summary()
    if kind == "label" and tally is not None:
        empty = dict.fromkeys(range(num_classes), 0)  # classes without a sample count for the balance
        values["classes"] = dict(sorted({**empty, **values["classes"]}.items()))
        values["balance"] = balance(list(values["classes"].values()))
    return FieldStats(kind, len(sizes), sum(sizes), spread(sizes), values)


def _recipe(fields: Mapping[str, FieldStats]) -> dict[str, list[float]]:
    """Settings for the first image field."""
    for found in fields.values():
        if found.kind == "image" and "mean" in found.values:
            rounded = {name: [round(value, 4) for value in found.values[name]] for name in ("mean", "std")}
            return {"backbone.pixel_mean": rounded["mean"], "backbone.pixel_std": rounded["std"]}
    return {}
