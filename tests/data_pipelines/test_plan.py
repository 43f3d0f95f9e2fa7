"""Split, order and shard of every item are functions of names, sizes and the seed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from data_pipelines.packing.inputs import Item, Listing, Piece
from data_pipelines.packing.plan import plan_shards, split_of, without_duplicates

SPLITS = [("train", 0.7), ("val", 0.2), ("test", 0.1)]


def items(number: int, size: int = 1000) -> list[Item]:
    return [Item(f"{n:05d}.jpg", (Piece("jpg", f"{n:05d}.jpg", 0, size),)) for n in range(number)]


@pytest.mark.parametrize("number", [1, 2, 99, 1000])
@pytest.mark.parametrize("shard_samples", [1, 7, 100, None])
@pytest.mark.parametrize("seed", [0, 5])
def test_plan_shards__every_item_once_numbered_without_gap(number: int, shard_samples: int | None, seed: int) -> None:
    plans = plan_shards(items(number), SPLITS, seed=seed, shard_bytes=30_000, shard_samples=shard_samples)
    packed = [item for plan in plans for item in plan.items]
    assert sorted(packed) == items(number)
    assert [plan.first for plan in plans] == [sum(len(p.items) for p in plans[:n]) for n in range(len(plans))]
    assert len({plan.name for plan in plans}) == len(plans)
    assert all(split_of(item, SPLITS) == plan.split for plan in plans for item in plan.items)
    # 1000 bytes take 3 blocks, `json` and `cls` 4, so 8 samples of 3584 bytes fit
    assert max(len(plan.items) for plan in plans) <= (shard_samples or 30_000 // 3584)


def test_plan_shards__shuffles_by_seed() -> None:
    def order(seed: int) -> list[str]:
        (plan,) = plan_shards(items(1000), [("train", 1.0)], seed=seed, shard_bytes=1 << 40, shard_samples=None)
        return [item.name for item in plan.items]

    assert order(0) == order(0) != order(1)
    ranks = [int(name[:5]) for name in order(0)]
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(ranks))
    assert neighbours < 10, "about 2 of 1000 by chance"


def test_plan_shards__a_file_larger_than_a_shard_has_one_of_its_own() -> None:
    big = Item("big.npy", (Piece("volume.npy", "big.npy", 0, 1 << 20),))
    plans = plan_shards([*items(3), big], [("train", 1.0)], seed=0, shard_bytes=100_000, shard_samples=None)
    assert sorted(len(plan.items) for plan in plans)[0] == 1
    assert sum(len(plan.items) for plan in plans) == 4


def test_split_of__has_the_fractions_and_never_moves_an_item() -> None:
    parts = {item.name: split_of(item, SPLITS) for item in items(10_000)}
    for name, fraction in SPLITS:
        assert list(parts.values()).count(name) == pytest.approx(10_000 * fraction, abs=5 * 48)  # 5 sigma of 0.7
    assert all(split_of(item, SPLITS) == parts[item.name] for item in items(100))
    widened = [("train", 0.8), ("val", 0.1), ("test", 0.1)]
    assert all(split_of(item, widened) == "train" for item in items(10_000) if parts[item.name] == "train")


def test_split_of__keeps_sequences_together() -> None:
    frames = [Item(f"drive{n // 10}/{n}.jpg", (), None, f"drive{n // 10}") for n in range(500)]
    splits = {item.sequence: split_of(item, SPLITS) for item in frames}
    assert all(split_of(item, SPLITS) == splits[item.sequence] for item in frames)
    assert len(set(splits.values())) == 3


def test_without_duplicates__keeps_the_first_name_of_each_content(tmp_path: Path) -> None:
    contents = {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"one", "f": b"three", "gone": b""}
    listing = Listing("set", "images", str(tmp_path))
    for name, data in contents.items():
        if data:
            (tmp_path / name).write_bytes(data)
        listing.items.append(Item(name, (Piece("jpg", name, 0, len(data) or 3),)))
    kept = [item.name for item in without_duplicates(listing, workers=1)]
    assert kept == ["a", "b", "d", "gone"], "a file that cannot be read is left for packing to report"
