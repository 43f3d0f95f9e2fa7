"""The draws of a sample: SplitMix64, even over their range, of their own for every seed, epoch and sample."""

from __future__ import annotations

import numpy as np

from data_pipelines.randomness import ViewRandom, sample_seed


def test_view_random__is_splitmix64() -> None:
    """First outputs of SplitMix64 from state 0, as in the JDK's SplittableRandom(0)."""
    rng = ViewRandom(0)
    assert [rng.below(1 << 64) for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_view_random__uniform_and_below_cover_their_range() -> None:
    rng = ViewRandom(7)
    floats = np.array([rng.uniform(2.0, 5.0) for _ in range(20_000)])
    assert floats.min() >= 2 and floats.max() < 5 and abs(floats.mean() - 3.5) < 0.03
    assert abs(np.corrcoef(floats[:-1], floats[1:])[0, 1]) < 0.03
    counts = np.bincount([rng.below(5) for _ in range(20_000)], minlength=5)
    assert len(counts) == 5 and (np.abs(counts - 4000) < 300).all()
    assert ViewRandom(1).below(1) == 0


def test_sample_seed__differs_in_every_part() -> None:
    seeds = {sample_seed(s, e, i) for s in range(5) for e in range(5) for i in range(200)}
    assert len(seeds) == 5 * 5 * 200


def test_fork__is_of_its_own_for_every_purpose_and_takes_no_draw() -> None:
    rng = ViewRandom(3)
    first, again, other = (rng.fork(purpose).below(1 << 64) for purpose in (1, 1, 2))
    assert first == again and len({first, other, ViewRandom(3).below(1 << 64)}) == 3
    assert rng.below(1 << 64) == ViewRandom(3).below(1 << 64)
    rng.below(2)
    assert rng.fork(1).below(1 << 64) != first
