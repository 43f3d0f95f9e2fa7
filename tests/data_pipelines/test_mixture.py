"""Mixtures: shares, epochs of each part, resume anywhere, any number of ranks, and what is refused."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.order import SampleOrder, rank_positions
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.streaming.mixture import MAX_PATTERN, Mixture, MixtureOrder, Part, pattern_of

Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
Make = Callable[..., Dataset]

LAYOUT: dict[str, Any] = {"seed": 3, "block_size": 3, "window": 2, "num_streams": 4}


@pytest.fixture
def make(tmp_path: Path, write_tar: Write) -> Make:
    """`make("a", 5, "cls", "txt")`: a data set of 5 samples with these fields; their content is `a0`, `a1`, ..."""

    def dataset(name: str, count: int, *fields: str) -> Dataset:
        members = [(f"{name}{i}.{field}", f"{name}{i}".encode()) for i in range(count) for field in fields or ("txt",)]
        return open_dataset(write_tar(tmp_path / f"{name}.tar", members))

    return dataset


def slots(shares: Sequence[float]) -> list[int]:
    return np.bincount(pattern_of(shares)).tolist()


def test_pattern_of__golden_values() -> None:
    """A change breaks every recorded run on a mixture."""
    assert pattern_of([1]).tolist() == [0]
    assert pattern_of([1, 1]).tolist() == [0, 1]
    assert pattern_of([3, 1]).tolist() == [0, 0, 1, 0]
    assert pattern_of([0.5, 0.3, 0.2]).tolist() == [0, 1, 2, 0, 0, 1, 0, 2, 1, 0]
    irrational = pattern_of([1, 2**0.5, 3**0.5])
    assert len(irrational) == MAX_PATTERN and zlib.crc32(irrational.astype("<i8").tobytes()) == 3524266392


def test_pattern_of__shortest_exact_length() -> None:
    assert slots([0.7, 0.3]) == [7, 3]
    assert slots([1 / 3, 2 / 3]) == [1, 2]
    assert slots([640, 10_000]) == [8, 125]
    assert slots([1, 4095]) == [1, 4095]
    assert slots([1e-300, 1e-300]) == slots([1e300, 1e300]) == [1, 1]


def test_pattern_of__sweep__shares_and_spread() -> None:
    """Shares to within one slot in L, and any prefix of the pattern holds a part to within a few slots of its share."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        shares = rng.uniform(0.01, 1, rng.integers(1, 9)) ** rng.integers(1, 3)
        pattern = pattern_of(shares)
        length, parts = len(pattern), len(shares)
        assert length <= MAX_PATTERN
        realised = np.bincount(pattern, minlength=parts) / length
        assert (np.abs(realised - shares / shares.sum()) < 1 / length + 1e-9).all(), shares
        taken = np.cumsum(pattern[:, None] == np.arange(parts), axis=0)  # (L, parts)
        ahead = taken - np.arange(1, length + 1)[:, None] * realised
        assert np.abs(ahead).max() < 2, shares


def test_pattern_of__share_too_small() -> None:
    with pytest.raises(DataError, match=r"a mixture share of 1e-06 is too small; it is at least 1 / 65536 = 1.5e-05"):
        pattern_of([1e-6, 1 - 1e-6])


def orders(counts: Sequence[Sequence[int]], seed: int) -> list[SampleOrder]:
    return [SampleOrder(c, seed=seed + i, block_size=3, window=2, num_streams=3) for i, c in enumerate(counts)]


def draw_mixture(rng: np.random.Generator) -> tuple[list[list[int]], Callable[[], MixtureOrder]]:
    counts = [rng.integers(1, 12, rng.integers(1, 4)).tolist() for _ in range(rng.integers(1, 5))]
    pattern, seed = pattern_of(rng.integers(1, 9, len(counts))), int(rng.integers(1000))
    first_ids = np.cumsum([0] + [sum(c) for c in counts]).tolist()[:-1]
    return counts, lambda: MixtureOrder(pattern, orders(counts, seed), first_ids)


def test_mixture_order__sweep__each_part_runs_through_its_own_epochs() -> None:
    rng = np.random.default_rng(1)
    for _ in range(25):
        counts, make_order = draw_mixture(rng)
        order, first = make_order(), 0
        parts, inside = order.places(range(400))
        epochs, ids = order(range(400))
        for part, shards in enumerate(counts):
            size, here = sum(shards), parts == part
            assert inside[here].tolist() == list(range(here.sum())), counts  # no position skipped, none twice
            assert (epochs[here] == np.arange(here.sum()) // size).all(), counts
            own = ids[here] - first
            for epoch in range(int(here.sum()) // size):
                assert sorted(own[epoch * size : (epoch + 1) * size].tolist()) == list(range(size)), counts
            first += size


def test_mixture_order__sweep__resume_anywhere_on_any_number_of_ranks() -> None:
    rng = np.random.default_rng(2)
    for _ in range(12):
        counts, make_order = draw_mixture(rng)
        whole = np.stack(make_order()(range(150)))  # (2, positions)
        for begin in range(60):
            assert (np.stack(make_order()(range(begin, begin + 7))) == whole[:, begin : begin + 7]).all(), (
                counts,
                begin,
            )
        position, order = 0, make_order()
        while position < 120:
            world, share = (int(n) for n in rng.integers(1, 6, 2))
            batch = world * share
            found = [
                np.stack(order(position + rank_positions(batch, world, rank, num_streams=3))) for rank in range(world)
            ]
            expected = whole[:, position : position + batch]
            assert sorted(np.concatenate(found, axis=1).T.tolist()) == sorted(expected.T.tolist()), (counts, position)
            position += batch


def test_mixture__reads_its_parts_under_one_numbering(make: Make) -> None:
    mixture = Mixture([Part("a", make("a", 3)), Part("b", make("b", 2))])
    assert mixture.num_samples == len(mixture) == 5
    assert [mixture.read(i)["txt"] for i in range(5)] == [b"a0", b"a1", b"a2", b"b0", b"b1"]
    assert mixture.where(4).startswith("b: shard ") and mixture.where(4).endswith("sample 'b1'")
    for sample_id in (-1, 5):
        with pytest.raises(DataError, match=f"sample id {sample_id} is outside 0..4"):
            mixture.read(sample_id)


def test_mixture__order_offsets_ids_and_counts_epochs_per_part(make: Make) -> None:
    mixture = Mixture([Part("a", make("a", 4), weight=1), Part("b", make("b", 2), weight=1)])
    epochs, ids = mixture.sample_order(**LAYOUT)(range(16))
    assert (ids[::2] < 4).all() and (ids[1::2] >= 4).all()
    assert epochs[::2].tolist() == [0] * 4 + [1] * 4 and epochs[1::2].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_mixture__parts_are_shuffled_differently(make: Make) -> None:
    mixture = Mixture([Part("a", make("a", 40)), Part("b", make("b", 40))])
    _, ids = mixture.sample_order(**LAYOUT)(range(80))
    assert ids[::2].tolist() != (ids[1::2] - 40).tolist()


def test_mixture__repeat_is_relative_to_the_other_parts(make: Make) -> None:
    mixture = Mixture([Part("a", make("a", 10), repeat=3), Part("b", make("b", 15))])
    epochs, ids = mixture.sample_order(**LAYOUT)(range(45))
    times = np.bincount(ids, minlength=25)
    assert set(times[:10].tolist()) == {3} and set(times[10:].tolist()) == {1} and epochs.max() == 2


def test_mixture__digest_follows_content_and_shares_not_names(make: Make) -> None:
    a, b = make("a", 3), make("b", 2)

    def digest(**weights: float) -> str:
        datasets = {"a": a, "b": b, "x": a}
        return Mixture([Part(name, datasets[name], weight=weight) for name, weight in weights.items()]).digest

    assert digest(a=1, b=1) == digest(a=2, b=2) == digest(x=1, b=1)
    assert len({digest(a=1, b=1), digest(a=2, b=1), digest(b=1, a=1), digest(a=1), a.digest}) == 5


def test_mixture__common_fields(make: Make) -> None:
    mixture = Mixture([Part("a", make("a", 1, "cls", "txt", "json")), Part("b", make("b", 1, "txt", "cls"))])
    assert mixture.fields == {"cls", "txt"}
    assert mixture.require_field("json", "txt") == "txt"
    with pytest.raises(DataError, match=r"mixture of a, b: no field json in every sample; every sample has cls, txt"):
        mixture.require_field("json")


def test_mixture__prefetch_asks_each_part_for_its_own(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    mixture = Mixture([Part("a", make("a", 3)), Part("b", make("b", 2))])
    asked: dict[str, list[int]] = {}
    for part in mixture.parts:
        monkeypatch.setattr(part.dataset, "prefetch", lambda ids, name=part.name: asked.update({name: list(ids)}))
    mixture.prefetch([4, 0, 3, 2])
    assert asked == {"a": [0, 2], "b": [1, 0]}


def test_mixture__refuses(make: Make) -> None:
    a, b = make("a", 1), make("b", 1)
    for parts, message in (
        ([], "a mixture of no parts"),
        ([Part("a", a), Part("a", b)], "mixture part 'a' is named 2 times"),
        ([Part("a", a, weight=0)], r"mixture part 'a': weight=0 is not allowed; it is a positive number"),
        ([Part("a", a, repeat=-1.0)], r"mixture part 'a': repeat=-1.0 is not allowed"),
        ([Part("a", a, weight=float("nan"))], r"mixture part 'a': weight=nan is not allowed"),
        ([Part("a", a, weight=1, repeat=1)], "mixture part 'a' has a weight and a repeat"),
        ([Part("a", a, weight=1), Part("b", b)], "mixture part 'b' has no weight, others have"),
    ):
        with pytest.raises(DataError, match=message):
            Mixture(parts)
