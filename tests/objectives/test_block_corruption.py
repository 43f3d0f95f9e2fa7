from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from objectives.errors import ObjectiveError
from objectives.masking import uniform
from objectives.parts.block_corruption import (
    BlockCorruption,
    blocks_from_uniform,
    first_blocks,
    mask_from_blocks,
    normal_noise,
)

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "gmml.json").read_text(encoding="utf-8"))["gmml"]
BY_CASE = pytest.mark.parametrize("case", GOLDEN["scripted_masks"], ids=lambda case: case["stream"])


def corruption(**changes):
    settings = {"size": 32, "align": 1, "share": 0.75, "fill": "noise", "alien_p": 0.5, "alien_share": 0.3}
    return BlockCorruption(**settings | changes)


def slow_mask(blocks, share, size):
    """Block after block until the share is covered."""
    mask, number = torch.zeros(size, size, dtype=torch.bool), 0
    while mask.sum() < share * size * size:
        row, column, height, width = blocks[number].tolist()
        mask[row : row + height, column : column + width] = True
        number += 1
    return mask, number


# The distribution of blocks


@BY_CASE
def test_blocks__equal_the_scripted_draws(golden_recipe, case):
    size, align, most = case["H"], case["align"], case["max_replace"]
    numbers = torch.from_numpy(golden_recipe.uniform(case["stream"], 1 + 4 * 200))
    least = min(0.5, most)
    share = least + (most - least) * numbers[:1]
    assert share.item() * size**2 == pytest.approx(case["target_pixels"], rel=1e-9)
    blocks = blocks_from_uniform(numbers[None, 1:], size, align)
    is_masked, count = first_blocks(blocks, share, size, align)
    assert count.item() == case["n_blocks"]
    assert blocks[0, :8].tolist() == case["first_blocks"]
    assert blocks[0, count.item() - 1].tolist() == case["last_block"]
    mask = is_masked[0, 0]
    assert mask.sum().item() == case["masked_pixels"]
    assert mask[:10].sum(1).tolist() == case["row_sums_first10"]
    assert mask.flatten().nonzero().sum().item() == case["mask_index_sum"]


@pytest.mark.parametrize(
    "case", GOLDEN["mask_statistics"], ids=lambda case: f"{case['H']}-{case['align']}-{case['max_replace']}"
)
def test_blocks__have_the_sampler_s_statistics(case):
    """Against 600 draws of the authors' sampler; bounds are four standard errors of the two means' difference."""
    size, align, most, num = case["H"], case["align"], case["max_replace"], 600
    numbers = uniform(torch.arange(num), 1 + 4 * 240, 0)
    least = min(0.5, most)
    blocks = blocks_from_uniform(numbers[:, 1:], size, align)
    is_masked, count = first_blocks(blocks, least + (most - least) * numbers[:, 0], size, align)
    share = is_masked.double().mean((1, 2, 3))
    assert share.mean().item() == pytest.approx(case["mask_fraction_mean"], abs=4 * case["std"] * (2 / num) ** 0.5)
    assert share.std().item() == pytest.approx(case["std"], rel=0.15)
    assert share.min() >= least
    assert count.double().mean().item() == pytest.approx(case["blocks_mean"], rel=0.05)
    assert count.max() < 240  # nothing was cut short
    patch = max(4, min(16, size // 8)) if align > 1 else 16
    cells = is_masked.double().unflatten(2, (-1, patch)).unflatten(4, (-1, patch)).mean((3, 5))
    assert (cells == 1).double().mean().item() == pytest.approx(case["fully_masked_patch_fraction"], abs=0.02)
    for row, key in ((0, "first_row_coverage"), (-1, "last_row_coverage")):
        assert is_masked[:, 0, row].double().mean().item() == pytest.approx(case[key], abs=0.04), key


@pytest.mark.parametrize(("size", "align"), [(32, 1), (32, 4), (48, 8)])
def test_first_blocks__equal_a_slow_loop(size, align):
    numbers = uniform(torch.arange(20), 4 * 150, 3)
    blocks = blocks_from_uniform(numbers, size, align)
    share = torch.linspace(0.01, 0.8, 20, dtype=torch.float64)
    is_masked, count = first_blocks(blocks, share, size, align)
    for image in range(20):
        mask, number = slow_mask(blocks[image], share[image].item(), size)
        assert torch.equal(is_masked[image, 0], mask)
        assert count[image].item() == number


def test_first_blocks__all_of_them_when_they_cover_too_little():
    blocks = torch.tensor([[[0, 0, 2, 2], [1, 1, 2, 2]]])
    is_masked, count = first_blocks(blocks, torch.tensor([0.9]), 8, 1)
    assert (count.item(), is_masked.sum().item()) == (2, 7)


def test_first_blocks__same_block_over_and_over():
    """Every block covers the same cells, where the sum of weights is closest to the next power of two."""
    blocks = torch.tensor([[0, 0, 4, 4]]).expand(1, 240, 4).clone()
    blocks[0, 239] = torch.tensor([4, 4, 4, 4])
    is_masked, count = first_blocks(blocks, torch.tensor([0.4]), 8, 1)
    assert (count.item(), is_masked.sum().item()) == (240, 32)
    assert first_blocks(blocks, torch.tensor([0.25]), 8, 1)[1].item() == 1


def test_mask_from_blocks__union_and_padding():
    blocks = torch.tensor([[[1, 2, 3, 4], [0, 0, 0, 0]], [[6, 6, 9, 9], [0, 0, 1, 1]]])
    mask = mask_from_blocks(blocks, 8)
    assert mask.shape == (2, 1, 8, 8)
    assert mask[0, 0].nonzero().tolist() == [[row, column] for row in (1, 2, 3) for column in (2, 3, 4, 5)]
    assert mask[1].sum().item() == 5


# Corruption of a batch


@pytest.fixture
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_of_batch__depends_on_each_sample_s_seed_alone(images):
    """All but the partner: with views of other samples beside it, a sample is corrupted alike."""
    seed = torch.arange(6)
    drawn = corruption().of_batch({"seed": seed}, images)  # two views of six samples
    again = corruption().of_batch({"seed": seed[[4, 2]]}, images[[4, 2, 10, 8]])
    for name in ("is_masked", "fill", "is_alien"):
        assert torch.equal(getattr(again, name), getattr(drawn, name)[[4, 2, 10, 8]]), name
    assert not torch.equal(drawn.is_masked[:6], drawn.is_masked[6:])  # views are drawn apart
    assert not torch.equal(corruption().of_batch({"seed": seed + 6}, images).is_masked, drawn.is_masked)


def test_of_batch__leaves_the_generator_alone(images):
    state = torch.get_rng_state()
    corruption().of_batch({"seed": torch.arange(6)}, images)
    assert torch.equal(torch.get_rng_state(), state)


def test_of_batch__two_populations():
    num = 1000
    images = torch.zeros(num, 1, 32, 32)
    drawn = corruption().of_batch({"seed": torch.arange(num)}, images)
    share = drawn.is_masked.double().mean((1, 2, 3))
    assert drawn.is_alien.double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert share[drawn.is_alien].min() >= 0.3
    assert share[drawn.is_alien].mean().item() == pytest.approx(0.315, abs=0.01)
    assert share[~drawn.is_alien].min() >= 0.5
    assert share[~drawn.is_alien].mean().item() == pytest.approx(0.63, abs=0.02)
    counts = drawn.partner.bincount(minlength=num)
    assert (drawn.partner.min() >= 0, drawn.partner.max() < num, counts.max() < 10) == (True, True, True)


def test_of_batch__partner_is_of_the_same_view(images):
    drawn = corruption().of_batch({"seed": torch.arange(3)}, images)  # four views of three samples
    assert torch.equal(drawn.partner // 3, torch.arange(12) // 3)


@pytest.mark.parametrize("fill", ["noise", "zeros"])
def test_apply__only_masked_pixels_change(images, fill):
    drawn = corruption(fill=fill).of_batch({"seed": torch.arange(6)}, images)
    corrupted = drawn.apply(images)
    masked = drawn.is_masked.expand_as(images)
    assert torch.equal(corrupted[~masked], images[~masked])
    for number in range(12):
        inside = masked[number]
        if drawn.is_alien[number]:
            assert torch.equal(corrupted[number][inside], images[drawn.partner[number]][inside])
        elif fill == "zeros":
            assert (corrupted[number][inside] == 0).all()
        else:
            assert corrupted[number][inside].std().item() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(("probability", "expected"), [(0.0, False), (1.0, True)])
def test_of_batch__alien_probability_at_its_ends(images, probability, expected):
    drawn = corruption(alien_p=probability).of_batch({"seed": torch.arange(6)}, images)
    assert (drawn.is_alien == expected).all()


def test_of_batch__what_is_given_is_used(images):
    given = {
        "blocks": torch.tensor([[[0, 0, 4, 4]]]).expand(12, 1, 4),
        "fill": torch.full((), 7.0),
        "is_alien": torch.arange(12) % 2 == 1,
        "partner": torch.arange(12).flip(0),
    }
    corrupted = corruption().of_batch({"seed": torch.arange(6), **given}, images).apply(images)
    assert (corrupted[0, :, :4, :4] == 7).all()
    assert torch.equal(corrupted[1, :, :4, :4], images[10, :, :4, :4])
    assert torch.equal(corrupted[:, :, 4:], images[:, :, 4:])


def test_of_batch__autocast_changes_nothing(images):
    plain = corruption().of_batch({"seed": torch.arange(6)}, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = corruption().of_batch({"seed": torch.arange(6)}, images)
    assert torch.equal(cast.is_masked, plain.is_masked)
    assert torch.equal(cast.fill, plain.fill)


@pytest.mark.parametrize("align", [5, 16, 32, 9])
def test_corruption__alignment_has_to_fit(align):
    with pytest.raises(ObjectiveError, match=rf"objective\.align {align} does not fit images of 32 pixels"):
        corruption(align=align)


# Noise


def test_normal_noise__is_normal():
    noise = normal_noise(torch.arange(40), 5001)
    assert noise.shape == (40, 5001)
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)
    assert (noise**4).mean().item() == pytest.approx(3, abs=0.1)
    assert (noise.abs() < 1).double().mean().item() == pytest.approx(0.6827, abs=0.005)
    half = noise[:, :2500]
    for other in (noise[:, 2501:], half.roll(1, 0), half.roll(1, 1)):
        size = min(other.shape[1], 2500)
        pair = torch.stack([half[:, :size].flatten(), other[:, :size].flatten()])
        assert abs(pair.corrcoef()[0, 1].item()) < 0.015  # 4 standard errors


def test_uniform__stays_below_one():
    numbers = uniform(torch.arange(100), 1000, 0)
    assert (numbers.min() >= 0, numbers.max() < 1, numbers.dtype) == (True, True, torch.float64)
    assert numbers.mean().item() == pytest.approx(0.5, abs=0.005)
