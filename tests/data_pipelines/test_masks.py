"""Masks: exact counts, blocks that are blocks, and GMML's regions as the official code draws them."""

from __future__ import annotations

import itertools
import re
import zlib
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.masks import BlockMask, GridMask, GroupMask, Mask, RandomMask, mask_from
from data_pipelines.randomness import ViewRandom

GRIDS = [(14, 14), (8, 8), (7, 7), (1, 1), (3, 20)]


def draws(mask: Mask, rows: int, cols: int, number: int) -> np.ndarray:
    return np.stack([mask.draw(rows, cols, ViewRandom(seed)) for seed in range(number)])


def adjacency(is_hidden: np.ndarray) -> float:
    """Pairs of hidden neighbours per hidden cell."""
    down = (is_hidden[:, 1:] & is_hidden[:, :-1]).sum()
    across = (is_hidden[:, :, 1:] & is_hidden[:, :, :-1]).sum()
    return float(down + across) / float(is_hidden.sum())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("ratio", [0.0, 0.15, 0.5, 0.75, 0.9, 1.0])
@pytest.mark.parametrize("kind", [RandomMask, BlockMask])
def test_mask__count_is_exact(kind: type[RandomMask] | type[BlockMask], ratio: float, grid: tuple[int, int]) -> None:
    rows, cols = grid
    found = draws(kind(patch=16, ratio=ratio), rows, cols, 15)
    assert found.shape == (15, rows, cols) and found.dtype == np.bool_
    assert (found.sum((1, 2)) == int(rows * cols * ratio)).all()


@pytest.mark.parametrize("kind", [RandomMask, BlockMask])
def test_mask__drawn_ratio_covers_its_range(kind: type[RandomMask] | type[BlockMask]) -> None:
    counts = draws(kind(patch=16, ratio=(0.1, 0.5)), 14, 14, 400).sum((1, 2))
    assert counts.min() in range(19, 24) and counts.max() in range(93, 99)
    assert abs(counts.mean() - 0.3 * 196) < 4


def test_mask__same_key_same_mask_other_key_other_mask() -> None:
    masks = [RandomMask(patch=16, ratio=0.5), BlockMask(patch=16, ratio=0.5), GroupMask(patch=16, ratio=0.5)]
    for mask in masks:
        first, again, other = (mask.draw(14, 14, ViewRandom(seed)) for seed in (5, 5, 6))
        assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_mask__probability_is_the_share_with_any_mask() -> None:
    hidden = draws(BlockMask(patch=16, ratio=0.4, probability=0.5), 8, 8, 600).any((1, 2))
    assert 250 < hidden.sum() < 350
    assert not draws(RandomMask(patch=1, ratio=0.4, probability=0.0), 4, 4, 20).any()


def test_random_mask__every_cell_equally_often() -> None:
    rate = draws(RandomMask(patch=16, ratio=0.75), 7, 7, 2000).mean(0)
    assert abs(rate.mean() - 36 / 49) < 1e-9 and rate.min() > 0.68 and rate.max() < 0.79


@pytest.mark.parametrize(
    ("side", "ratio", "expected"), [(14, 29 / 196, 1.372), (14, 0.3, 1.56), (14, 0.5, 1.677), (8, 0.3, 1.315)]
)
def test_block_mask__adjacency_of_the_official_generator(side: int, ratio: float, expected: float) -> None:
    """Pairs of hidden neighbours per hidden cell over 2000 draws of DINOv3's generator; uniform masks have 0.54."""
    found = draws(BlockMask(patch=16, ratio=ratio + 1e-9), side, side, 500)
    assert adjacency(found) == pytest.approx(expected, abs=0.06)
    assert adjacency(draws(RandomMask(patch=16, ratio=0.3), side, side, 500)) < 0.65


def test_block_mask__short_counts_of_the_inexact_generator() -> None:
    """DINOv2's hits 58 of 196 in 0.935 of 2000 draws, with a least count of 55."""
    counts = draws(BlockMask(patch=16, ratio=0.3, exact=False), 14, 14, 1000).sum((1, 2))
    assert counts.max() == 58 and counts.min() >= 50
    assert (counts == 58).mean() == pytest.approx(0.935, abs=0.03)


def test_block_mask__largest_block() -> None:
    found = draws(BlockMask(patch=1, ratio=0.5, area=(4, 6), aspect=(1.0, 1.0)), 20, 20, 50)
    assert adjacency(found) < adjacency(draws(BlockMask(patch=1, ratio=0.5), 20, 20, 50)) - 0.1


@pytest.mark.parametrize("cell", [2, 3])
def test_grid_mask__one_of_each_cell_stays(cell: int) -> None:
    found = draws(GridMask(patch=16, cell=cell), 12, 12, 60)
    squares = found.reshape(60, 12 // cell, cell, 12 // cell, cell).transpose(0, 1, 3, 2, 4)
    assert ((~squares).sum((3, 4)) == 1).all()
    assert len({m.tobytes() for m in found}) == cell**2


class Scripted(ViewRandom):
    """The counter hash of the recorded draws: u_i from a name and i."""

    def __init__(self, stream: str) -> None:
        self.seed, self.count = zlib.crc32(stream.encode()), 0

    def _u(self) -> float:
        self.count += 1
        z, mask = (self.seed + self.count * 0x9E3779B9) & 0xFFFFFFFF, 0xFFFFFFFF
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            z = ((z ^ (z >> shift)) * factor) & mask
        return ((z ^ (z >> 16)) + 0.5) / 2**32

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._u()

    def below(self, n: int) -> int:
        return int(self._u() * n)


@pytest.mark.parametrize(
    ("size", "align", "most", "blocks", "masked_pixels", "index_sum"),
    [
        (224, 1, 0.75, 63, 36029, 953913198),
        (224, 16, 0.75, 21, 28160, 762689792),
        (224, 16, 0.5, 20, 25088, 746565376),
        (224, 16, 0.3, 11, 15616, 432126336),
        (32, 4, 0.75, 21, 592, 265784),
        (96, 16, 0.75, 25, 5376, 25709952),
    ],
)
def test_group_mask__official_regions(
    size: int, align: int, most: float, blocks: int, masked_pixels: int, index_sum: int
) -> None:
    """`scripted_masks` of the recorded values: the official sampler of GMML, its draws replaced by a known sequence."""
    rng = Scripted(f"gmml.draw.{size}.{align}.{most}")
    mask = GroupMask(patch=align, ratio=(min(0.5, most), most))
    cells = mask.draw(size // align, size // align, rng)
    pixels = cells.repeat(align, 0).repeat(align, 1)
    assert (int(pixels.sum()), int(np.flatnonzero(pixels).sum())) == (masked_pixels, index_sum)
    assert rng.count == 1 + 4 * blocks


def test_group_mask__share_and_asymmetry() -> None:
    """Over 600 draws of the official sampler: 0.636 (sd 0.07) hidden, 0.54 of the first and 0.38 of the last row."""
    found = draws(GroupMask(patch=4, ratio=(0.5, 0.75)), 8, 8, 600)
    assert found.mean() == pytest.approx(0.636, abs=0.015) and found.mean((1, 2)).min() >= 0.5
    assert found[:, 0].mean() == pytest.approx(0.535, abs=0.04) and found[:, -1].mean() == pytest.approx(
        0.383, abs=0.04
    )


def test_group_mask__needs_room_for_a_block() -> None:
    with pytest.raises(DataError, match=r"side=0.3 of 32 x 32 pixels is no more than one patch of 16"):
        GroupMask(patch=16, ratio=0.5).draw(2, 2, ViewRandom(0))


def test_mask_from__plain_data() -> None:
    assert mask_from({"kind": "random", "patch": 16, "ratio": 0.75}, "v") == RandomMask(patch=16, ratio=0.75)
    blocks = mask_from(
        {"kind": "blocks", "patch": 8, "ratio": [0.1, 0.5], "area": [4, None], "probability": 0.5, "name": "ibot"}, "v"
    )
    assert blocks == BlockMask(patch=8, ratio=(0.1, 0.5), probability=0.5, name="ibot")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"kind": "block", "patch": 16},
            "kind='block' is not allowed; it is one of random, blocks, grid, groups",
        ),
        ({"patch": 16, "ratio": 0.5}, "kind=None is not allowed"),
        ("random", "mask='random' is not allowed; it is a mapping"),
        ({"kind": "random", "patch": 16, "ration": 0.5}, "unknown key 'ration'"),
        ({"kind": "random", "patch": 16, "ration": 0.5}, "did you mean 'ratio'?"),
        ({"kind": "random", "ratio": 0.5}, "'patch' is missing"),
        ({"kind": "random", "patch": 0, "ratio": 0.5}, "patch=0 is not allowed; it is an integer from 1"),
        ({"kind": "random", "patch": 1, "ratio": 1.5}, "ratio=1.5 is not allowed; it is a share in 0..1"),
        ({"kind": "random", "patch": 1, "ratio": [0.5, 0.2]}, "ratio=(0.5, 0.2) is not allowed"),
        ({"kind": "random", "patch": 1, "ratio": True}, "ratio=True is not allowed"),
        ({"kind": "random", "patch": 1, "ratio": float("nan")}, "ratio=nan is not allowed"),
        ({"kind": "random", "patch": 1, "ratio": 0.5, "name": "a.b"}, "name='a.b' is not allowed"),
        ({"kind": "random", "patch": 1, "ratio": 0.5, "probability": 2}, "probability=2 is not allowed"),
        ({"kind": "blocks", "patch": 1, "ratio": 0.5, "area": [0, 4]}, "area=(0, 4) is not allowed"),
        ({"kind": "blocks", "patch": 1, "ratio": 0.5, "area": 4}, "area=4 is not allowed"),
        ({"kind": "blocks", "patch": 1, "ratio": 0.5, "aspect": [0, 1]}, "aspect=(0, 1) is not allowed"),
        ({"kind": "grid", "patch": 1, "cell": 1}, "cell=1 is not allowed; it is an integer from 2"),
        ({"kind": "groups", "patch": 1, "ratio": 0.5, "side": 1}, "side=1 is not allowed"),
    ],
)
def test_mask_from__refuses(spec: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        mask_from(spec, "v")
    assert "view 'v'" in str(caught.value) or "mask 'mask'" in str(caught.value) or "mask 'a.b'" in str(caught.value)


def test_mask__sweep_of_sizes_terminates() -> None:
    for rows, cols, ratio in itertools.product((1, 2, 5), (1, 4), (0.0, 0.6, 1.0)):
        assert BlockMask(patch=1, ratio=ratio).draw(rows, cols, ViewRandom(1)).sum() == int(rows * cols * ratio)
