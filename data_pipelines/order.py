"""Sample order as pure functions of (seed, epoch, layout): the whole loader state is how many samples were consumed.

Order of an epoch: shards are cut into blocks of consecutive samples, the blocks are permuted, every `window` permuted
blocks are joined and their samples permuted, and the resulting list is cut into `num_streams` contiguous segments
that are interleaved: consecutive positions come from consecutive segments. Reads stay local (a segment works on one
window at a time) while a batch mixes many shards.

Permutations sort a splitmix64 hash (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA
2014), so the order depends on integers only and not on the random streams of a numpy or torch version. Changing
anything here changes every recorded order: the golden values in the tests guard it, and `ORDER_VERSION` is part of a
stream's signature.

Not here: reading (`shards`), who builds a batch (`stream`), randomness inside a sample (`randomness`).
"""

from __future__ import annotations

import operator
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError
from data_pipelines.purposes import Purpose

__all__ = [
    "GOLDEN",
    "ORDER_VERSION",
    "EpochOrder",
    "SampleOrder",
    "key",
    "permutation",
    "rank_positions",
    "sample_ids",
    "splitmix64",
]

ORDER_VERSION = 1
Ids = npt.NDArray[np.int64]

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15  # step of the SplitMix64 counter
_MUL_1, _MUL_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def splitmix64(x: int) -> int:
    """Finalize one 64-bit counter; plain integers, since numpy scalars cost many times more."""
    x = (x + GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * _MUL_1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL_2) & _MASK
    return x ^ (x >> 31)


def key(*parts: int, base: int = 0) -> int:
    """Hash non-negative integers to 64 bits; `key(a, b) == key(b, base=key(a))`, so a common prefix is hashed once."""
    for part in parts:
        base = splitmix64(base ^ splitmix64(part))
    return base


def permutation(n: int, key: int) -> Ids:
    """Permute `range(n)` by sorting the hash of every index under `key`."""
    x = np.arange(n, dtype=np.uint64)
    x ^= np.uint64(key)
    x += np.uint64(GOLDEN)  # array arithmetic on uint64 wraps, as splitmix64 wants
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MUL_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MUL_2)
    x ^= x >> np.uint64(31)
    return np.argsort(x)  # splitmix64 is a bijection, so no two hashes are equal and any kind of sort gives this


class EpochOrder:
    """Position in one epoch -> sample id, in memory of 4 bytes per block and a few windows.

    1e9 samples in 100 000 shards and blocks of 256 take 23 MB, and 75 MB for the second in which it is built.

    Args:
        counts: samples per shard; ids run through the shards in this order.
        seed: seed of the run.
        epoch: epoch number, from 0.
        block_size: consecutive samples that stay together until the window shuffle.
        window: blocks whose samples are shuffled together.
        num_streams: segments interleaved.
    """

    def __init__(
        self, counts: Sequence[int], *, seed: int, epoch: int, block_size: int, window: int, num_streams: int
    ) -> None:
        self._shard_len = np.asarray(counts, np.int64)
        self.num_samples = int(self._shard_len.sum())
        self.block_size, self.window, self.num_streams = block_size, window, num_streams
        self._window_key = key(seed, epoch, Purpose.WINDOW)

        blocks = -(-self._shard_len // block_size)  # (shards,)
        num_blocks = int(blocks.sum())
        self._first_block = np.cumsum(blocks) - blocks  # (shards,)
        self._first_id = np.cumsum(self._shard_len) - self._shard_len  # (shards,)
        # The one large array, kept as narrow as its values allow: the range of ids of a block follows from its number.
        self._blocks = permutation(num_blocks, key(seed, epoch, Purpose.BLOCKS)).astype(np.min_scalar_type(num_blocks))
        self._window_start = self._window_starts(num_blocks, blocks)

        # Stream = global position mod num_streams also across epochs: this epoch begins inside a round of the streams.
        self._lead = (epoch * self.num_samples) % num_streams
        streams = np.arange(num_streams)
        rounds = -(-(self._lead + self.num_samples - streams) // num_streams) + (streams - self._lead) // num_streams
        self._segment = np.concatenate([[0], np.cumsum(rounds)])
        self._windows: OrderedDict[int, Ids] = OrderedDict()

    def __call__(self, positions: Iterable[int] | Ids) -> Ids:
        """Sample ids at `positions` (each in `[0, num_samples)`), in the order given."""
        turn = np.asarray(positions, np.int64) + self._lead
        stream = turn % self.num_streams
        rank = self._segment[stream] + turn // self.num_streams - (stream < self._lead)
        windows = np.searchsorted(self._window_start, rank, side="right") - 1
        ids = np.empty(len(turn), np.int64)
        for window in np.unique(windows):
            here = windows == window
            ids[here] = self._window_ids(int(window))[rank[here] - self._window_start[window]]
        return ids

    def _window_starts(self, num_blocks: int, blocks: Ids) -> Ids:
        """Rank of the first sample of each window, and of the end: (windows + 1,)."""
        length = np.full(num_blocks, self.block_size, np.min_scalar_type(self.block_size))
        used = blocks > 0
        last = (self._first_block + blocks - 1)[used]
        length[last] = (self._shard_len - (blocks - 1) * self.block_size)[used]
        windows = np.add.reduceat(length[self._blocks], np.arange(0, num_blocks, self.window), dtype=np.int64)
        return np.concatenate([[0], np.cumsum(windows)])

    def _window_ids(self, window: int) -> Ids:
        if window in self._windows:
            self._windows.move_to_end(window)
            return self._windows[window]
        blocks = self._blocks[window * self.window : (window + 1) * self.window].astype(np.int64)
        shard = np.searchsorted(self._first_block, blocks, side="right") - 1
        inside = (blocks - self._first_block[shard]) * self.block_size
        length = np.minimum(self.block_size, self._shard_len[shard] - inside)
        shift = self._first_id[shard] + inside - (np.cumsum(length) - length)
        ids = np.arange(length.sum()) + np.repeat(shift, length)
        ids = ids[permutation(len(ids), key(window, base=self._window_key))]
        self._windows[window] = ids
        if len(self._windows) > 2 * self.num_streams + 2:  # every stream works on one window and may be leaving another
            self._windows.popitem(last=False)
        return ids


class SampleOrder:
    """Global position (running through all epochs without a gap) -> (epoch, sample id)."""

    def __init__(self, counts: Sequence[int], *, seed: int, block_size: int, window: int, num_streams: int) -> None:
        for name, value in (("block_size", block_size), ("window", window), ("num_streams", num_streams)):
            if value < 1:
                raise DataError(f"{name}={value} is not allowed; it is at least 1")
        if seed < 0:
            raise DataError(f"seed={seed} is not allowed; it is an integer from 0")
        self.counts = tuple(operator.index(count) for count in counts)
        self.num_samples = sum(self.counts)
        if self.num_samples < 1:
            raise DataError("there is no sample to order: every shard is empty")
        self.seed, self.block_size, self.window, self.num_streams = seed, block_size, window, num_streams
        self._epochs: OrderedDict[int, EpochOrder] = OrderedDict()

    def __call__(self, positions: Iterable[int] | Ids) -> tuple[Ids, Ids]:
        """Epochs and sample ids, both of the length of `positions`."""
        epochs, inside = np.divmod(np.asarray(positions, np.int64), self.num_samples)
        ids = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            ids[here] = self._epoch(int(epoch))(inside[here])
        return epochs, ids

    def _epoch(self, epoch: int) -> EpochOrder:
        if epoch not in self._epochs:
            self._epochs[epoch] = EpochOrder(
                self.counts,
                seed=self.seed,
                epoch=epoch,
                block_size=self.block_size,
                window=self.window,
                num_streams=self.num_streams,
            )
            if len(self._epochs) > 2:  # a batch straddles two
                self._epochs.popitem(last=False)
        return self._epochs[epoch]


def sample_ids(
    counts: Sequence[int],
    positions: Iterable[int] | Ids,
    *,
    seed: int,
    block_size: int,
    window: int,
    num_streams: int,
) -> Ids:
    """Sample ids at global positions; `SampleOrder` is the same with its epochs kept."""
    order = SampleOrder(counts, seed=seed, block_size=block_size, window=window, num_streams=num_streams)
    return order(positions)[1]


def rank_positions(global_batch: int, world_size: int, rank: int, num_streams: int) -> Ids:
    """Slots of a global batch that belong to `rank`: equal shares that together are the batch.

    When the numbers divide, a rank gets whole streams and therefore reads from few windows; otherwise it gets a
    contiguous slice. Either way the batch as a set does not depend on `world_size`.

    Raises:
        DataError: `global_batch` is not a multiple of `world_size`, or `rank` is outside `[0, world_size)`.
    """
    if world_size < 1 or global_batch < 1 or global_batch % world_size:
        raise DataError(f"global_batch={global_batch} must be a positive multiple of world_size={world_size}")
    if not 0 <= rank < world_size:
        raise DataError(f"rank={rank} is outside 0..{world_size - 1}")
    slots = np.arange(global_batch)
    if num_streams % world_size == 0 and global_batch % num_streams == 0:
        return slots[((slots % num_streams) * world_size) // num_streams == rank]
    share = global_batch // world_size
    return slots[rank * share : (rank + 1) * share]
