"""Which item goes where: split, order and shard as pure functions of names, sizes and the seed.

Nothing here depends on the machine, the number of processes or what was packed before, so a plan can be made again
after a kill. The split of an item depends on its name (or its sequence) only, so adding files or changing the seed
moves none from one split to another.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from data_pipelines.packing.inputs import Item, Listing, Piece
from data_pipelines.worker_pool import Advance, run_jobs

__all__ = ["ShardPlan", "plan_shards", "split_of", "without_duplicates"]

_TAR_BLOCK = 512
_SMALL_FIELDS = 4 * _TAR_BLOCK  # `json` and `cls`, each a header and a block
_FILES_PER_JOB = 256


class ShardPlan(NamedTuple):
    """One shard of the data set."""

    name: str
    split: str
    first: int  # number of its first item in the whole data set
    items: Sequence[Item]


def plan_shards(
    items: Sequence[Item],
    splits: Sequence[tuple[str, float | None]],
    *,
    seed: int,
    shard_bytes: int,
    shard_samples: int | None,
) -> list[ShardPlan]:
    """Distribute items over splits and shards, shuffled.

    Args:
        splits: name and fraction of each, the fractions adding up to 1; of no effect on items that have a split.
        shard_bytes: a shard ends before the files as found (not what is made of them) exceed this.
        shard_samples: a shard ends after this many items; takes the place of `shard_bytes`.
    """
    parts: dict[str, list[Item]] = {name: [] for name, _ in splits}
    for item in items:
        parts[split_of(item, splits)].append(item)
    plans, first = list[ShardPlan](), 0
    for split, part in parts.items():
        part.sort(key=lambda item: _hash(f"{seed}\0{item.name}"))
        for number, (begin, end) in enumerate(_slices(part, shard_bytes, shard_samples)):
            plans.append(ShardPlan(f"{split}-{number:06d}.tar", split, first + begin, part[begin:end]))
        first += len(part)
    return plans


def split_of(item: Item, splits: Sequence[tuple[str, float | None]]) -> str:
    """The split of an item: the one it came in, else by a hash; all frames of a sequence have the same."""
    if item.split is not None:
        return item.split
    place = int.from_bytes(_hash(f"split\0{item.sequence or item.name}")[:8], "big") / 2**64
    ends = accumulate(fraction or 0.0 for _, fraction in splits)
    return next((name for (name, _), end in zip(splits, ends, strict=True) if place < end), splits[-1][0])


def without_duplicates(listing: Listing, workers: int) -> list[Item]:
    """Of the items with the same content (of their first file, by SHA-256), keep the first in the order of names.

    Of copies in several splits of the source, one outside `train` is kept: what is tested on stays as it came. Only
    files that have the size of another are read.
    """
    sizes = Counter(item.pieces[0].size for item in listing.items)
    alike = [item.pieces[0] for item in listing.items if sizes[item.pieces[0].size] > 1]
    jobs = [
        (number, listing.root, alike[number : number + _FILES_PER_JOB])
        for number in range(0, len(alike), _FILES_PER_JOB)
    ]
    digests = dict[int, list[bytes]](run_jobs(_digests, jobs, workers, lambda done: None))
    in_order = (digest for number in sorted(digests) for digest in digests[number])
    contents = [next(in_order) if sizes[item.pieces[0].size] > 1 else b"" for item in listing.items]
    chosen = dict[bytes, int]()  # the item that is kept of each content
    for number in sorted(range(len(contents)), key=lambda number: listing.items[number].split == "train"):
        chosen.setdefault(contents[number], number)
    pairs = zip(listing.items, contents, strict=True)
    return [item for number, (item, content) in enumerate(pairs) if not content or chosen[content] == number]


def _digests(job: tuple[int, str, Sequence[Piece]], advance: Advance) -> tuple[int, list[bytes]]:
    """SHA-256 of each piece; empty for files that cannot be read, which packing will report."""
    number, root, pieces = job
    digests = []
    for piece in pieces:
        try:
            with open(os.path.join(root, piece.path), "rb") as file:
                file.seek(piece.begin)
                digests.append(hashlib.sha256(file.read(piece.size)).digest())
        except OSError:
            digests.append(b"")
    return number, digests


def _slices(items: Sequence[Item], shard_bytes: int, shard_samples: int | None) -> Iterator[tuple[int, int]]:
    begin, filled = 0, 0
    for number, item in enumerate(items):
        size = _tar_bytes(item)
        full = filled + size > shard_bytes if shard_samples is None else number - begin == shard_samples
        if full and number > begin:
            yield begin, number
            begin, filled = number, 0
        filled += size
    if begin < len(items):
        yield begin, len(items)


def _tar_bytes(item: Item) -> int:
    """Bytes in a tar, when the files are stored as found."""
    return _SMALL_FIELDS + sum(_TAR_BLOCK - piece.size // -_TAR_BLOCK * _TAR_BLOCK for piece in item.pieces)


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
