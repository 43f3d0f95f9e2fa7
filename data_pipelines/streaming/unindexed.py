"""The stream of a set without an index: shards are read from front to back, in an order that cannot be resumed exactly.

For data that are too much to be read once before the first step (thousands of remote tars without sidecars), or that
cannot be indexed at all (`.tar.gz`). Wherever a set can be indexed, `Stream` over `open_dataset` is better: exact,
elastic, checked by CRCs, and cheaper per sample. What holds here:

- Each loader process of each rank is a reader without an end. It passes again and again over its share of the shards
  and shuffles what it reads in a bounded buffer, so every rank always has its next sample.
- In each pass the shares of all readers together are the whole set, none twice. Readers do not wait for each other: one
  may begin its next pass while another is still in this one.
- The order follows from (seed, samples consumed before the start, pass, rank, loader process). A resumed run begins a
  new pass in an order of its own: it does not repeat the beginning of an earlier one, but of the pass that was broken
  off it may see samples again, and others not at all.

Not here: the samples of one shard (`tar_stream`), micro-batches and loader processes (`stream`), views (`views`).
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.order import Ids, key, permutation
from data_pipelines.purposes import Purpose
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.locations import redact
from data_pipelines.storage.stores import FetchOptions, Store
from data_pipelines.streaming.stream import Stream, StreamState
from data_pipelines.streaming.tar_stream import Sample, read_samples
from data_pipelines.views.base import View

__all__ = ["UnindexedSamples", "UnindexedStream", "reader_share"]

BEGINNING = StreamState(0, 0)
SHUFFLED_SAMPLES = 1000  # held by a reader at most
SHUFFLED_BYTES = 128 << 20  # the same in bytes, for large samples
_JUDGED_TOGETHER = 1000  # samples of a rank, where `Stream` counts damaged ones per epoch
_VERSION = 2  # of the order

Item = Sample | CorruptSampleError  # the error stands in the place of a sample that lacks something

logger = logging.getLogger(__name__)


class UnindexedStream(Stream):
    """Endless micro-batches of one rank, as those of `Stream`, without its guarantees (see the module).

    Nobody knows the samples of the set, so `"sample_id"` of a batch is the position in the run, and the state is (0,
    samples consumed).

    Args:
        source: what `expand_source` takes, also shards `.tar.gz` and `.tgz`.
        views: what to make of each sample. Their fields are looked up in the first sample of the first shard; samples
            that lack one of them count as damaged.
        rank: of this process.
        world_size: number of ranks.
        seed: of order and views, from 0.
        state: where to begin.
        fetch: how remote shards are fetched and cached.
        max_corrupt_fraction: share of damaged samples, in each 1000 of a rank or more, that are replaced by the next.
        settings: further ones of `Stream`; block_size, window and num_streams have no effect.

    Raises:
        DataError: as `Stream`. While iterating: a shard is cut, damaged in a header, or cannot be read; too many
            samples are damaged.
    """

    dataset: UnindexedSamples

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        views: Sequence[View],
        *,
        rank: int,
        world_size: int,
        seed: int,
        state: StreamState = BEGINNING,
        fetch: FetchOptions | None = None,
        max_corrupt_fraction: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(
            UnindexedSamples(source, rank=rank, world_size=world_size, seed=seed, begin=state.position, fetch=fetch),
            views,
            rank=rank,
            world_size=world_size,
            seed=seed,
            state=state,
            max_corrupt_fraction=max_corrupt_fraction,
            **settings,
        )
        self.dataset.fields = frozenset().union(*(maker.reads for maker in self._samples.makers))
        self._share = max(_JUDGED_TOGETHER, math.ceil(1 / (max_corrupt_fraction or 1)))  # one of them may be damaged

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.dataset.restart()
        return super().__iter__()

    @property
    def order_signature(self) -> dict[str, Any]:
        return {
            "exact": False,
            "version": _VERSION,
            "shards": len(self.dataset.shards),
            "locations": self.dataset.digest,
            "seed": self.dataset.seed,
        }

    def require_order(self, saved: Mapping[str, Any]) -> None:
        """Refuse to go on from a state of the exact stream; from one of this kind, the first rank logs what it means.

        Raises:
            DataError: the state was recorded with an index.
        """
        if saved.get("exact", True):
            raise DataError(
                "data.unindexed=stream cannot go on with the exact order that the checkpoint was taken in; "
                "set data.unindexed=index or begin a new run"
            )
        if self.dataset.rank == 0:
            present = self.order_signature
            changed = [name for name in present if saved.get(name) != present[name]]
            logger.warning(
                "data.unindexed=stream: the run goes on with a new pass over the shards, not with the samples it had "
                "not seen yet%s",
                f"; changed since the checkpoint: {', '.join(changed)}" if changed else "",
            )


class UnindexedSamples:
    """The data set of such a stream: `read` gives the next sample of this process, whatever id is asked for.

    Attributes:
        shards: locations, sorted.
        fields: what `read` gives; at first, what the first sample has.
        num_samples: unknown, so it is more than any run consumes.
    """

    num_samples = 1 << 62

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        rank: int,
        world_size: int,
        seed: int,
        begin: int = 0,
        fetch: FetchOptions | None = None,
    ) -> None:
        fetch = fetch or FetchOptions()
        self._store = Store(fetch)
        self.shards = expand_source(source, allow_pipe=fetch.allow_pipe, store=self._store, compressed=True)
        self.rank, self.world_size, self.seed, self.begin = rank, world_size, seed, begin
        self.fields = self._first_fields()
        self.restart()

    @property
    def digest(self) -> str:
        """SHA-256 of the locations, without users, passwords and signatures; what the shards hold is not known."""
        return hashlib.sha256("\n".join(map(redact, self.shards)).encode()).hexdigest()

    def restart(self) -> None:
        """Begin anew with the next `read`."""
        self._items: Iterator[Item] | None = None
        self._last = "no sample"

    def read(self, sample_id: int) -> Sample:
        """The next sample.

        Raises:
            CorruptSampleError: it lacks a field.
            DataError: a shard is damaged or cannot be read, or no shard holds a sample.
        """
        if self._items is None:
            self._items = self._endless()
        item = next(self._items)
        if isinstance(item, CorruptSampleError):
            raise item
        self._last = f"shard {item['__url__']}, sample {item['__key__']!r}"
        return item

    def where(self, sample_id: int) -> str:
        """Shard and key of the sample that was read last."""
        return self._last

    def first_without(self, names: Sequence[str]) -> str:
        """What a message ends with: `fields` are those of the first sample."""
        return f" (the first sample of shard {redact(self.shards[0])})"

    def prefetch(self, sample_ids: Sequence[int]) -> None:
        """Do nothing: shards are fetched ahead as they are read."""

    def sample_order(self, **layout: int) -> Callable[[Ids], tuple[Ids, Ids]]:
        """Global positions -> (epochs, ids): the epoch is 0, the id is the position."""
        return lambda positions: (np.zeros_like(positions), positions)

    def _first_fields(self) -> frozenset[str]:
        first = next(read_samples(self._store, self.shards[0], None), None)
        if not isinstance(first, dict):
            raise DataError(f"shard {redact(self.shards[0])} has no sample KEY.FIELD to begin with; remove it")
        return frozenset(name for name in first if not name.startswith("__"))

    def _endless(self) -> Iterator[Item]:
        """What this process reads; only here it is known which loader process that is."""
        worker = get_worker_info()
        number, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        reader, num_readers = self.rank * num_workers + number, self.world_size * num_workers
        base = key(self.seed, self.begin, Purpose.SHARDS)
        return _mixed(self._passes(reader, num_readers, base), ViewRandom(key(Purpose.MIX, reader, base=base)))

    def _passes(self, reader: int, num_readers: int, base: int) -> Iterator[Item]:
        num_empty = 0  # passes in a row
        for number in count():
            num_empty += 1
            for shard, first, step in reader_share(len(self.shards), reader, num_readers, base, number):
                for item in islice(read_samples(self._store, self.shards[shard], self.fields), first, None, step):
                    num_empty = 0
                    yield item
            if num_empty > num_readers:  # each sample would have been this reader's in one of them
                raise DataError(f"no sample in {num_empty} passes over {len(self.shards)} shards; they are empty")


def reader_share(num_shards: int, reader: int, num_readers: int, base: int, number: int) -> list[tuple[int, int, int]]:
    """What one reader reads in one pass: whole shards, or every n-th sample of one where there are too few shards.

    Args:
        num_shards: of the set.
        reader: from 0.
        num_readers: loader processes of all ranks.
        base: key of the run.
        number: of the pass.

    Returns:
        (shard, first, step) in the order to read them: samples first, first + step, ... of the shard. The shares of all
        readers are the whole set, none twice; who has less in one pass has more in another.
    """
    order = permutation(num_shards, key(number, base=base)).tolist()
    reader = (reader + number) % num_readers
    if num_shards >= num_readers:
        return [(shard, 0, 1) for shard in order[reader::num_readers]]
    place, column = divmod(reader, num_shards)
    return [(order[column], place, len(range(column, num_readers, num_shards)))]


def _mixed(items: Iterator[Item], rng: ViewRandom) -> Iterator[Item]:
    """A shuffle buffer; once it is full, each new sample pushes a random one out."""
    held: list[tuple[Item, int]] = []  # with their sizes in bytes
    num_bytes = 0
    for item in items:
        size = sum(map(len, item.values())) if isinstance(item, dict) else 0
        held.append((item, size))
        num_bytes += size
        while len(held) > SHUFFLED_SAMPLES or num_bytes > SHUFFLED_BYTES:
            chosen = rng.below(len(held))
            held[chosen], held[-1] = held[-1], held[chosen]
            leaving, size = held.pop()
            num_bytes -= size
            yield leaving
