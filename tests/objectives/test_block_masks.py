from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from objectives.masking import random_noise
from objectives.parts.block_masks import _blocks, _exact, block_masks, masked_counts

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dinov3.json").read_text())["masking"]
NUM_DRAWS = 2000


def seeds(count: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + count)


def adjacent_pairs(mask: Tensor, side: int) -> Tensor:
    """Pairs of masked 4-neighbors per masked patch, (n,)."""
    maps = mask.unflatten(1, (side, side))
    pairs = (maps[:, 1:] & maps[:, :-1]).sum((1, 2)) + (maps[:, :, 1:] & maps[:, :, :-1]).sum((1, 2))
    return pairs / mask.sum(1)


@pytest.mark.parametrize(("side", "num_crops"), [(14, 16), (16, 16), (8, 16), (14, 128)])
def test_counts__those_of_the_authors_code(side: int, num_crops: int) -> None:
    golden = GOLDEN["deterministic_targets"][f"grid{side}_B{num_crops}"]
    counts = masked_counts(num_crops, side * side, 0.5, (0.1, 0.5))
    assert len(counts) == golden["n_masked_images"] and sum(counts) == golden["upperbound_sum"]
    wanted = [count for count in golden["targets_per_masked_image"] if count != "..."]
    assert [*counts[:4], *counts[-4:]] == [*wanted[:4], *wanted[-4:]]


@pytest.mark.parametrize("name", [f"grid{side}_target{count}" for side, *counts in (
    (14, 29, 58, 98), (16, 38, 76, 128), (8, 9, 19, 32)) for count in counts])  # fmt: skip
def test_blocks__are_spread_as_those_of_the_authors_code(name: str) -> None:
    """Numbers of 2000 draws: how many reach their count before they are filled up, and how compact they are."""
    golden = GOLDEN[name]
    side, count = map(int, re.findall(r"\d+", name))
    drawn = seeds(NUM_DRAWS)
    wanted_counts = torch.full((NUM_DRAWS,), count)
    blocks = _blocks(drawn, (side, side), wanted_counts)
    hits = (blocks.sum(1) == count).double().mean().item()
    wanted = golden["v2_fraction_hitting_target"]
    assert hits == pytest.approx(wanted, abs=3 * math.sqrt(2 * wanted * (1 - wanted) / NUM_DRAWS))
    assert int(blocks.sum(1).max()) <= count
    exact = _exact(drawn, blocks, wanted_counts)
    assert (exact.sum(1) == count).all() and (exact | ~blocks).all()
    pairs = adjacent_pairs(exact, side)
    error = 3 * math.sqrt(2) * pairs.std().item() / math.sqrt(NUM_DRAWS)
    assert pairs.mean().item() == pytest.approx(golden["v3_mean_adjacent_pairs_per_masked_token"], abs=error + 5e-4)


def test_masks__of_a_batch_have_exact_counts_and_weights() -> None:
    crops = torch.cat([random_noise(seeds(64), 1, view)[:, 0] for view in range(2)])
    golden = GOLDEN["collate_bs64_grid14"]["masked_images, masked_tokens, upperbound, sum(masks_weight)"][0]
    masks = block_masks(crops, (14, 14))
    per_crop = masks.is_masked.sum(1)
    assert [int((per_crop > 0).sum()), len(masks.idx), int(per_crop.sum())] == golden[:3]
    assert masks.weight.sum().item() == pytest.approx(golden[3], rel=1e-5)
    assert torch.equal(masks.idx, masks.is_masked.flatten().nonzero()[:, 0])
    assert torch.equal(masks.unmasked_idx, (~masks.is_masked).flatten().nonzero()[:, 0])
    assert tuple(sorted(per_crop[per_crop > 0].tolist())) == masked_counts(128, 196, 0.5, (0.1, 0.5))
    assert 0 < (per_crop[:64] > 0).sum() < 64  # both crops of images, not one of them


def test_masks__depend_on_the_seeds_alone() -> None:
    first, again, other = (block_masks(seeds(8, start), (6, 7)) for start in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.is_masked, other.is_masked)


@pytest.mark.parametrize(("share", "num_crops"), [(0.0, 4), (0.5, 1)])
def test_masks__of_no_crop(share: float, num_crops: int) -> None:
    masks = block_masks(seeds(num_crops), (4, 4), share=share)
    assert not masks.is_masked.any() and len(masks.idx) == len(masks.weight) == 0
    assert len(masks.unmasked_idx) == 16 * num_crops


def test_masks__of_all_crops_alike_do_not_depend_on_the_batch() -> None:
    whole = block_masks(seeds(8), (6, 6), share=1.0, ratio=(0.3, 0.3)).is_masked
    halves = [block_masks(seeds(4, start), (6, 6), share=1.0, ratio=(0.3, 0.3)).is_masked for start in (0, 4)]
    assert torch.equal(whole, torch.cat(halves))


def test_masks__no_device_is_waited_for() -> None:
    """Tensors without numbers fail wherever the host asks for one."""
    masks = block_masks(seeds(8).to("meta"), (6, 6))
    assert masks.idx.shape == masks.weight.shape == (sum(masked_counts(8, 36, 0.5, (0.1, 0.5))),)
