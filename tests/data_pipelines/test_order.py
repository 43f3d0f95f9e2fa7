"""Sample order: golden values, a slow reference, and sweeps that show it to be a permutation cut into equal shares."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.order import EpochOrder, SampleOrder, key, permutation, rank_positions, sample_ids

MASK = (1 << 64) - 1


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
