"""Files to shards: `pack(source, dest)` writes a data set to train on, or goes on where a killed run stopped.

The order of the samples is a hash of their names, and the items of every shard are fixed before the first is written
(`plan`). So the same input and options give the same bytes, with any number of processes, in one run or several.
While the work is under way `.packing` in the destination holds the request and a record per shard; `dataset.json` is
written last.

Not here: what counts as input (`inputs`), one sample (`conversion`), one shard (`shard_writer`).
"""

from __future__ import annotations

import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.content import copies_between
from data_pipelines.cores import usable_cores
from data_pipelines.errors import DataError, TooManyDamagedError, suggest
from data_pipelines.field_kinds import field_kind
from data_pipelines.hidden import is_hidden
from data_pipelines.packing.conversion import Conversion, Encoding, parse_encoding
from data_pipelines.packing.folder import PackFolder
from data_pipelines.packing.inputs import FAMILIES, Listing, list_folder, suffix_of
from data_pipelines.packing.layout import same_text
from data_pipelines.packing.lists import LIST_SUFFIXES, list_rows
from data_pipelines.packing.plan import ShardPlan, plan_shards, without_duplicates
from data_pipelines.packing.shard_writer import ShardJob, ShardRecord, finished_shard, sample_key, write_shard
from data_pipelines.packing.tars import list_tars
from data_pipelines.pixel_sums import PixelSums
from data_pipelines.shards.manifest import ChannelStats, Manifest, Split, split_digest
from data_pipelines.split_names import in_order
from data_pipelines.worker_pool import run_jobs

__all__ = ["KINDS", "pack"]

KINDS = ("auto", "images", "pairs", "sequences", "points", "volumes", "list", "tars")
CREATED_BY = "pretrain data pack 2"  # the number changes with the rules that determine the bytes
_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")
_MAX_CLASSES = 1 << 20  # labels beyond are identifiers of something, not classes to be counted
_NAMED_FAILURES = 5

Progress = Callable[[int, int], None]


def pack(
    source: str | Path,
    dest: str | Path,
    *,
    kind: str = "auto",
    splits: Mapping[str, float] | None = None,
    seed: int = 0,
    shard_mb: float = 256,
    shard_samples: int | None = None,
    size: int | None = None,
    reencode: str | int | None = None,
    masks: str | Path | None = None,
    classes: Sequence[str] | None = None,
    ignore_index: int | None = None,
    channels: str | None = None,
    dedupe: bool = False,
    name: str | None = None,
    workers: int | None = None,
    max_bad: float = 0.0,
    progress: Progress | None = None,
) -> Manifest:
    """Pack files into shards with a `dataset.json`.

    Args:
        source: a folder, a list of paths (CSV, plain lines, parquet), a tar, or a folder of tars.
        dest: folder for the shards, new or left behind by a killed run of the same request.
        kind: what the source is, one of `KINDS`; `auto` goes by the suffixes.
        splits: name -> fraction, adding up to 1; a name (or sequence) always falls into the same split. Default: the
            splits that the source has (folders or tars called train, val, test), else all in `train`.
        seed: of the order of the samples.
        shard_mb: megabytes (10^6) of files as found per shard.
        shard_samples: samples per shard, instead of `shard_mb`.
        size: shorter side in pixels that larger images are reduced to, masks with them.
        reencode: `jpeg:QUALITY`, `webp:QUALITY`, `png`, or a JPEG quality; default: bytes as found.
        masks: folder of masks (PNG) or label volumes, one per file of the source.
        classes: names in index order. Folders and labels that are names get their index in it and must be among them;
            indices and masks are checked against their number.
        ignore_index: value of masks that is no class.
        channels: where arrays of volumes with four axes have them, `first` or `last`; default: first, and those that
            look otherwise count as damaged.
        dedupe: leave out samples whose first file equals that of an earlier name.
        name: of the data set; default that of the source.
        workers: processes; default one per CPU this process may use. One shard is the work of one process.
        max_bad: fraction of damaged samples that are left out; more of them are an error.
        progress: called with samples done and in all.

    Returns:
        The content of `dataset.json`.

    Raises:
        DataError: the request is wrong, the source is empty or damaged (`TooManyDamagedError`), or the destination
            holds something else.
        WorkerDied: a worker process ended early. The same call goes on where it stopped, as after any kill.
    """
    source, dest, masks = Path(source), Path(dest), None if masks is None else Path(masks)
    asked_splits = None if splits is None else _checked_splits(splits)
    classes = None if classes is None else _checked_classes(classes)
    encoding = None if reencode is None else parse_encoding(reencode)
    _check_numbers(shard_mb=shard_mb, shard_samples=shard_samples, size=size, workers=workers)
    if not 0 <= max_bad < 1:
        raise DataError(f"max_bad={max_bad} is not allowed; it is a fraction from 0 to below 1")
    workers = workers or usable_cores()
    with PackFolder(dest, source) as folder:
        listing = _list(source, kind, masks, classes, folder.unpacked)
        listing.name = name or listing.name
        if channels is not None and listing.family != "volumes":
            raise DataError(f"--channels {channels}: is of volumes, and {source} holds {listing.family}; leave it out")
        fractions = _splits(listing, asked_splits)
        listing.ignore_index = listing.ignore_index if ignore_index is None else ignore_index
        asked = {
            "kind": listing.family,
            "input": listing.digest(),
            "splits": [name if fraction is None else [name, fraction] for name, fraction in fractions],
            "seed": seed,
            "shard_mb": shard_mb if shard_samples is None else None,
            "shard_samples": shard_samples,
            "size": size,
            "reencode": encoding and str(encoding),
            "dedupe": dedupe,
            "channels": channels,
        }
        options = {option: value for option, value in asked.items() if value is not None}
        request = {"created_by": CREATED_BY, "name": listing.name, **options}
        complete = folder.held(request, listing.newest)
        if complete is not None:
            return complete
        _warn_of_skipped(listing)
        items = without_duplicates(listing, workers) if dedupe else listing.items
        plans = plan_shards(items, fractions, seed=seed, shard_bytes=round(shard_mb * 1e6), shard_samples=shard_samples)
        _require_all_splits(fractions, plans, len(items))
        folder.begin(request)
        jobs = _jobs(plans, folder, _conversion(listing, size, encoding, channels))
        records = _write(jobs, workers, math.floor(max_bad * len(items)), progress)
        duplicates = len(listing.items) - len(items) if dedupe else None
        manifest = _describe(listing, plans, records, options, duplicates)
        folder.finish(manifest)
        _warn_of_rejected(records)
        _warn_of_copies(plans, records, dedupe)
        if transparent := sum(record.num_transparent for record in records):
            warnings.warn(f"{transparent} samples have transparent pictures; these are seen on white", stacklevel=2)
    return manifest


def _checked_splits(splits: Mapping[str, float]) -> list[tuple[str, float]]:
    for split, fraction in splits.items():
        if not _SPLIT_NAME.fullmatch(split) or not 0 < fraction <= 1:
            raise DataError(f"split {split!r}: {fraction} is not allowed; write NAME=FRACTION with a fraction above 0")
    if not math.isclose(math.fsum(splits.values()), 1, abs_tol=1e-9):
        raise DataError(f"the fractions of the splits add up to {math.fsum(splits.values()):g}; they must give 1")
    return [(split, float(fraction)) for split, fraction in splits.items()]


def _splits(listing: Listing, asked: list[tuple[str, float]] | None) -> list[tuple[str, float | None]]:
    """The splits to make, with the fractions of those that are drawn and None for those that the source has.

    Raises:
        DataError: the source has several, and others are asked for.
    """
    has = {item.split for item in listing.items if item.split is not None}
    if asked is None:
        return [(split, None) for split in in_order(has)] or [("train", 1.0)]
    if len(has) > 1:
        raise DataError(
            f"{listing.root} has the splits {', '.join(in_order(has))} already; leave --split out, or pack one of them"
        )
    listing.items = [item._replace(split=None) for item in listing.items]
    return list(asked)


def _checked_classes(classes: Sequence[str]) -> tuple[str, ...]:
    names = tuple(same_text(name.strip()) for name in classes)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated or not all(names):
        what = f"{repeated[0]!r} is named twice" if repeated and all(names) else "a name is empty"
        raise DataError(f"classes {','.join(names)}: {what}; give each class once, in the order of the indices")
    return names


def _check_numbers(**numbers: float | None) -> None:
    for option, value in numbers.items():
        if value is not None and value <= 0:
            raise DataError(f"{option}={value} is not allowed; it must be above 0")


def _list(
    source: Path,
    kind: str,
    masks: Path | None,
    classes: tuple[str, ...] | None,
    unpacked: Callable[[], Path],
) -> Listing:
    """List the source with what fits its kind."""
    if kind not in KINDS:
        raise DataError(f"kind={kind!r} is not allowed; kinds are {', '.join(KINDS)}{suggest(kind, KINDS)}")
    if not source.exists():
        folder = source.absolute().parent
        names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
        raise DataError(
            f"no such file or folder to pack: {source} (only local ones are packed){suggest(source.name, names)}"
        )
    if (kind == "pairs" and masks is None) or (masks is not None and kind not in ("auto", "pairs", "volumes")):
        raise DataError(
            f"kind={kind!r} with masks={masks}: pairs need a folder of masks, only pairs and volumes take one"
        )
    tars = FAMILIES["tars"]
    if source.is_dir():
        holds_tars = any(suffix_of(entry.name) in tars and not is_hidden(entry.name) for entry in source.iterdir())
        if kind == "tars" or (kind == "auto" and holds_tars):
            return list_tars(source, unpacked, classes)
        if kind != "list":
            listing = list_folder(source, kind=kind, masks=masks, classes=classes)
            listing.classes = classes or listing.classes
            return listing
    elif suffix_of(source.name) in tars and kind in ("auto", "tars"):
        return list_tars(source, unpacked, classes)
    elif source.suffix in LIST_SUFFIXES and kind in ("auto", "list") and masks is None:
        return list_rows(source, classes)
    allowed = f"a folder, a tar or a list ({' '.join(LIST_SUFFIXES)})"
    raise DataError(f"cannot pack {source} as kind={kind!r}; give {allowed} and a kind that fits, or kind='auto'")


def _warn_of_skipped(listing: Listing) -> None:
    if listing.skipped:
        named = ", ".join(f"{count} {suffix}" for suffix, count in sorted(listing.skipped.items()))
        warnings.warn(f"left out of {listing.root}, not {listing.family}: {named}", stacklevel=3)


def _require_all_splits(splits: Sequence[tuple[str, float | None]], plans: Sequence[ShardPlan], num_items: int) -> None:
    empty = [split for split, _ in splits if not any(plan.split == split for plan in plans)]
    if empty:
        raise DataError(
            f"split {empty[0]!r} gets none of the {num_items} samples (whole sequences stay together); "
            "give it a larger fraction or leave it out"
        )


def _conversion(listing: Listing, size: int | None, encoding: Encoding | None, channels: str | None) -> Conversion:
    root = os.path.abspath(listing.root)
    return Conversion(listing.family, root, size, encoding, listing.classes, listing.ignore_index, channels)


def _jobs(plans: Sequence[ShardPlan], folder: PackFolder, conversion: Conversion) -> list[ShardJob]:
    return [
        ShardJob(folder.path(plan.name), folder.record(plan.name), plan.first, plan.items, conversion) for plan in plans
    ]


def _write(jobs: Sequence[ShardJob], workers: int, allowed: int, progress: Progress | None) -> list[ShardRecord]:
    """Write the shards that are not finished yet; the records of all.

    Raises:
        TooManyDamagedError: more than `allowed` items are damaged; raised as soon as that is known.
    """
    finished = {job.path: record for job in jobs if (record := finished_shard(job)) is not None}
    open_jobs = [job for job in jobs if job.path not in finished]
    records = list(finished.values())
    total = sum(len(job.items) for job in jobs)
    done = total - sum(len(job.items) for job in open_jobs)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    advance(0)
    _require_few_rejected(records, allowed, total)
    with closing(run_jobs(write_shard, open_jobs, workers, advance)) as results:
        for record in results:
            records.append(record)
            _require_few_rejected(records, allowed, total)
    return records


def _require_few_rejected(records: Sequence[ShardRecord], allowed: int, total: int) -> None:
    rejected = sum(len(record.rejected) for record in records)
    if rejected > allowed:
        raise TooManyDamagedError(
            f"{rejected} of {total} samples are damaged, {allowed} are allowed: {_first_rejected(records)}",
            remedy="repair or remove them and pack into a new folder, or go on here with a larger max_bad",
        )


def _warn_of_rejected(records: Sequence[ShardRecord]) -> None:
    rejected = sum(len(record.rejected) for record in records)
    if rejected:
        warnings.warn(f"left out {rejected} damaged samples: {_first_rejected(records)}", stacklevel=3)


def _warn_of_copies(plans: Sequence[ShardPlan], records: Sequence[ShardRecord], dedupe: bool) -> None:
    """Samples of one split whose content is in another one, too: a score on it is too good."""
    by_name = {record.name: record for record in records}
    contents = {
        split: np.array([value for p in plans if p.split == split for value in by_name[p.name].contents], np.uint64)
        for split in dict.fromkeys(plan.split for plan in plans)
    }
    remedy = "" if dedupe else "; --dedupe leaves copies out"
    for copies in copies_between(contents):
        warnings.warn(f"{copies}, the first is number {copies.first} of {copies.split}{remedy}", stacklevel=3)


def _first_rejected(records: Sequence[ShardRecord]) -> str:
    rejected = sorted(failure for record in records for failure in record.rejected)
    named = "; ".join(f"{name}: {reason}" for name, reason in rejected[:_NAMED_FAILURES])
    return f"{named}; and {len(rejected) - _NAMED_FAILURES} more" if len(rejected) > _NAMED_FAILURES else named


def _describe(
    listing: Listing,
    plans: Sequence[ShardPlan],
    records: Sequence[ShardRecord],
    options: Mapping[str, Any],
    duplicates: int | None,
) -> Manifest:
    """Put the records of all shards together.

    Raises:
        DataError: no sample is left.
    """
    by_name = {record.name: record for record in records}
    written = [record for record in records if record.entry is not None]
    if not written:
        raise DataError(f"no sample of {listing.root} is left: all {len(listing.items)} are damaged")
    fields = set[str].intersection(*(set(record.fields) for record in written))
    sums = PixelSums()
    for record in records:
        sums.add(record.sums)
    return Manifest(
        name=listing.name,
        fields={name: str(field_kind(name)) for name in sorted(fields)},
        splits={
            split: _describe_split(listing, [plan for plan in plans if plan.split == split], by_name)
            for split in dict.fromkeys(plan.split for plan in plans)
        },
        options=options,
        classes=listing.classes,
        ignore_index=listing.ignore_index,
        stats=ChannelStats(tuple(sums.mean), tuple(sums.std), sums.pixels) if sums.pixels else None,
        duplicates=duplicates,
        rejected=sum(len(record.rejected) for record in records),
        created_by=CREATED_BY,
    )


def _describe_split(listing: Listing, plans: Sequence[ShardPlan], by_name: Mapping[str, ShardRecord]) -> Split:
    records = [by_name[plan.name] for plan in plans]
    shards = tuple(record.entry for record in records if record.entry is not None)
    counts = sum((Counter(record.class_counts) for record in records), Counter[int]())
    num_classes = len(listing.classes or ()) or max(counts, default=-1) + 1
    return Split(
        samples=sum(shard.samples for shard in shards),
        digest=split_digest(shard.index_digest for shard in shards),
        shards=shards,
        class_counts=tuple(counts[label] for label in range(num_classes)) if 0 < num_classes <= _MAX_CLASSES else None,
        sequences=_sequences(listing, plans, records),
    )


def _sequences(
    listing: Listing, plans: Sequence[ShardPlan], records: Sequence[ShardRecord]
) -> dict[str, list[str]] | None:
    """Keys of each sequence in the order of its frames, which is that of the listing."""
    if listing.items[0].sequence is None:
        return None
    rejected = {name for record in records for name, _ in record.rejected}
    keys = {item.name: sample_key(plan.first + number) for plan in plans for number, item in enumerate(plan.items)}
    sequences: dict[str, list[str]] = {}
    for item in listing.items:
        if item.name in keys and item.name not in rejected:
            sequences.setdefault(str(item.sequence), []).append(keys[item.name])
    return sequences
