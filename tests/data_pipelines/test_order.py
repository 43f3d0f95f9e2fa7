"""Sample order: golden values, a slow reference, and sweeps that show it to be a permutation cut into equal shares.

The sweeps draw layouts from a seeded generator; a failing one is printed whole.
"""

from __future__ import annotations

import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.order import EpochOrder, SampleOrder, key, permutation, rank_positions, sample_ids

MASK = (1 << 64) - 1
Sample = tuple[int, int]  # (epoch, sample id)


def test_order__golden_values() -> None:
    """Computed with the reference of the order's specification; a change breaks every recorded run."""
    assert key(1, 2) == 15671754871817308195
    assert permutation(8, key(1)).tolist() == [2, 5, 1, 4, 6, 0, 3, 7]
    ids = sample_ids([7, 5, 6], range(18), seed=3, block_size=2, window=2, num_streams=2)
    assert ids.tolist() == [15, 12, 14, 6, 8, 2, 7, 3, 0, 9, 1, 10, 17, 11, 16, 4, 13, 5]


def test_key__prefix_and_parts() -> None:
    assert key(5, 6, 7) == key(7, base=key(5, 6))
    assert len({key(a, b) for a in range(40) for b in range(40)}) == 1600  # (1, 0) and (0, 31) collide in a polynomial


def slow_epoch(counts: list[int], seed: int, epoch: int, block: int, window: int, streams: int) -> list[int]:
    """The epoch written out with lists: blocks, windows, segments, and dealing from the segments in turn."""

    def shuffled(items: list[object], k: int) -> list[object]:
        def finalised(x: int) -> int:
            x = (x + 0x9E3779B97F4A7C15) & MASK
            x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
            x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
            return x ^ (x >> 31)

        return [items[i] for i in sorted(range(len(items)), key=lambda i: finalised(i ^ k))]

    blocks: list[object] = []
    first = 0
    for count in counts:
        ids = list(range(first, first + count))
        blocks += [ids[i : i + block] for i in range(0, count, block)]
        first += count
    blocks = shuffled(blocks, key(seed, epoch, 1))
    flat: list[object] = []
    for number, begin in enumerate(range(0, len(blocks), window)):
        joined = [i for ids in blocks[begin : begin + window] for i in ids]  # type: ignore[attr-defined]
        flat += shuffled(joined, key(seed, epoch, 2, number))
    turns = [turn % streams for turn in range(epoch * first, epoch * first + first)]  # stream of each position
    segments, begin = [], 0
    for stream in range(streams):
        segments.append(iter(flat[begin : begin + turns.count(stream)]))
        begin += turns.count(stream)
    return [next(segments[stream]) for stream in turns]  # type: ignore[misc]


def test_epoch_order__equals_slow_reference_and_is_a_permutation() -> None:
    rng = np.random.default_rng(1)
    for _ in range(60):
        counts = rng.integers(0, 40, rng.integers(1, 8)).tolist()
        counts[0] += 1
        block, window, streams = (int(rng.integers(1, high)) for high in (12, 6, 10))
        seed, epoch, n = int(rng.integers(1 << 40)), int(rng.integers(5)), sum(counts)
        order = EpochOrder(counts, seed=seed, epoch=epoch, block_size=block, window=window, num_streams=streams)
        expected = slow_epoch(counts, seed, epoch, block, window, streams)
        assert sorted(expected) == list(range(n))
        assert order(range(n)).tolist() == expected
        shuffled = rng.permutation(n)  # any position at any time, past a full window cache
        assert order(shuffled).tolist() == [expected[i] for i in shuffled]


def test_sample_order__epochs_follow_without_gap_and_differ() -> None:
    order = SampleOrder([5, 9], seed=0, block_size=3, window=2, num_streams=4)
    epochs, ids = order(range(42))
    assert epochs.tolist() == [0] * 14 + [1] * 14 + [2] * 14
    passes = ids.reshape(3, 14)
    assert all(sorted(one) == list(range(14)) for one in passes.tolist())
    assert len({tuple(one) for one in passes.tolist()}) == 3
    again = SampleOrder([5, 9], seed=0, block_size=3, window=2, num_streams=4)
    assert again([27, 28, 3, 41])[1].tolist() == ids[[27, 28, 3, 41]].tolist()


def test_sample_order__seed_changes_order_and_mixes_shards() -> None:
    layout = {"block_size": 50, "window": 4, "num_streams": 8}
    first, second = (sample_ids([500] * 20, range(10_000), seed=seed, **layout) for seed in (0, 1))
    assert (first != second).mean() > 0.99
    assert abs(np.corrcoef(np.arange(10_000), first)[0, 1]) < 0.1
    assert len(np.unique(first[:256] // 500)) >= 12  # a batch of 256 touches most of the 20 shards


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 8, 12])
@pytest.mark.parametrize("num_streams", [1, 2, 8, 16, 24])
@pytest.mark.parametrize("global_batch", [24, 48, 96])
def test_rank_positions__equal_shares_of_the_batch(world_size: int, num_streams: int, global_batch: int) -> None:
    shares = [rank_positions(global_batch, world_size, rank, num_streams) for rank in range(world_size)]
    assert {len(share) for share in shares} == {global_batch // world_size}
    assert sorted(np.concatenate(shares).tolist()) == list(range(global_batch))
    if num_streams % world_size == 0 and global_batch % num_streams == 0:
        assert {len(np.unique(share % num_streams)) for share in shares} == {num_streams // world_size}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch": 10, "world_size": 3}, "global_batch=10 must be a positive multiple of world_size=3"),
        ({"rank": 2}, "rank=2 is outside 0..1"),
        ({"rank": -1}, "rank=-1 is outside 0..1"),
    ],
)
def test_rank_positions__refuses(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        rank_positions(**{"global_batch": 8, "world_size": 2, "rank": 0, "num_streams": 4, **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 0}, "block_size=0"),
        ({"window": -1}, "window=-1"),
        ({"num_streams": 0}, "num_streams=0"),
        ({"seed": -1}, "seed=-1"),
        ({"counts": [0, 0]}, "no sample to order"),
    ],
)
def test_sample_order__refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        SampleOrder(**{"counts": [3], "seed": 0, "block_size": 1, "window": 1, "num_streams": 1, **arguments})  # type: ignore[arg-type]


@dataclass(frozen=True)
class Layout:
    """All that the order or its division among ranks, loader workers and micro-batches depends on."""

    counts: tuple[int, ...]
    seed: int
    block_size: int
    window: int
    num_streams: int
    world_size: int
    num_workers: int
    micro_batch: int
    micro_batches: int  # per rank and step

    @property
    def num_samples(self) -> int:
        return sum(self.counts)

    @property
    def global_batch(self) -> int:
        return self.world_size * self.micro_batch * self.micro_batches

    def order(self) -> SampleOrder:
        layout = {"block_size": self.block_size, "window": self.window, "num_streams": self.num_streams}
        return SampleOrder(self.counts, seed=self.seed, **layout)


def draw_layout(rng: np.random.Generator) -> Layout:
    """1 to 8 shards of 0 to 60 samples, some of a single one; batches from 1 sample to far more than an epoch."""
    counts = rng.integers(0, rng.choice([2, 8, 61]), rng.integers(1, 9))
    counts[rng.integers(len(counts))] += 1
    low, high = np.array([[0, 1, 1, 1, 1, 1, 1, 1], [1 << 40, 17, 7, 13, 7, 5, 6, 4]])
    return Layout(tuple(counts.tolist()), *rng.integers(low, high).tolist())


def consumed(layout: Layout, begin: int, num_steps: int) -> list[list[Sample]]:
    """What each step from position `begin` on holds over all ranks, read as the loader reads it.

    Each rank cuts its share into micro-batches, which its workers build in turn and which come back in turn.
    """
    steps: list[list[Sample]] = [[] for _ in range(num_steps)]
    for rank in range(layout.world_size):
        order = layout.order()  # as in a process of its own
        slots = rank_positions(layout.global_batch, layout.world_size, rank, layout.num_streams)
        begins = begin + layout.global_batch * np.arange(num_steps)
        epochs, ids = order((begins[:, None] + slots).ravel())
        pairs = list(zip(epochs.tolist(), ids.tolist(), strict=True))
        requests = [pairs[first : first + layout.micro_batch] for first in range(0, len(pairs), layout.micro_batch)]
        workers = [iter(requests[worker :: layout.num_workers]) for worker in range(layout.num_workers)]
        for number in range(len(requests)):
            steps[number // layout.micro_batches] += next(workers[number % layout.num_workers])
    return steps


def test_order__sweep__each_sample_once_per_epoch_whatever_the_ranks_and_workers() -> None:
    rng = np.random.default_rng(2)
    for _ in range(150):
        layout = draw_layout(rng)
        n, batch = layout.num_samples, layout.global_batch
        num_steps = min(-(-3 * n // batch), 60)
        expected = list(zip(*(a.tolist() for a in layout.order()(range(num_steps * batch))), strict=True))
        found = consumed(layout, 0, num_steps)
        for step, samples in enumerate(found):
            assert sorted(samples) == sorted(expected[step * batch : (step + 1) * batch]), (layout, step)
        whole, rest = divmod(num_steps * batch, n)
        for epoch in range(whole + (rest > 0)):
            ids = [i for step in found for e, i in step if e == epoch]
            assert len(set(ids)) == len(ids) == (n if epoch < whole else rest), (layout, epoch)


def test_order__sweep__resume_at_every_position_equals_uninterrupted() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        layout = draw_layout(rng)
        n = min(layout.num_samples, 40)
        whole = list(zip(*(a.tolist() for a in layout.order()(range(3 * layout.num_samples))), strict=True))
        for begin in range(2 * n + 1):
            size = int(rng.integers(1, n + 1))
            epochs, ids = layout.order()(range(begin, begin + size))
            assert list(zip(epochs.tolist(), ids.tolist(), strict=True)) == whole[begin : begin + size], (layout, begin)


def test_order__sweep__another_world_size_goes_on_with_exactly_the_remaining_samples() -> None:
    rng = np.random.default_rng(4)
    for _ in range(60):
        layout = draw_layout(rng)
        n, position, seen = layout.num_samples, 0, set[Sample]()
        while position < 2 * n:  # a few steps on as many ranks, workers and micro-batches as chance gives
            changes = draw_layout(rng).__dict__ | {
                name: getattr(layout, name) for name in ("counts", "seed", "block_size", "window", "num_streams")
            }
            now = Layout(**changes)
            num_steps = int(rng.integers(1, 4))
            samples = [sample for step in consumed(now, position, num_steps) for sample in step]
            assert seen.isdisjoint(samples) and len(set(samples)) == len(samples), (layout, now, position)
            seen.update(samples)
            position += num_steps * now.global_batch
        whole, rest = divmod(position, n)
        expected = {(epoch, i) for epoch in range(whole) for i in range(n)}
        assert seen >= expected and len(seen) == whole * n + rest, layout


def test_order__last_batch_of_an_epoch_is_filled_from_the_next() -> None:
    """The policy: nothing is dropped, nothing is padded; a batch may straddle two epochs, or hold several."""
    order = SampleOrder([7, 3], seed=0, block_size=2, window=2, num_streams=2)
    batches = [order(range(first, first + 4)) for first in range(0, 20, 4)]
    assert [epochs.tolist() for epochs, _ in batches] == [[0] * 4, [0] * 4, [0, 0, 1, 1], [1] * 4, [1] * 4]
    assert sorted(np.concatenate([ids for _, ids in batches]).tolist()) == sorted([*range(10)] * 2)
    epochs, ids = order(range(5, 40))
    assert np.bincount(epochs).tolist() == [5, 10, 10, 10] and set(ids[5:15].tolist()) == set(range(10))


def test_sample_order__memory_is_4_bytes_per_block() -> None:
    """1e8 samples: what is held grows by the block and the shard, not by the sample; so 1e9 take ten times as much."""
    counts, block_size = [10_000] * 10_000, 256
    num_blocks = 10_000 * -(-10_000 // block_size)
    tracemalloc.start()
    order = SampleOrder(counts, seed=0, block_size=block_size, window=16, num_streams=8)
    epochs, ids = order(range(1024))
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert set(epochs.tolist()) == {0} and len(set(ids.tolist())) == 1024
    assert held < 4 * num_blocks + 3_000_000 and peak < 20 * num_blocks + 3_000_000
