from __future__ import annotations

import numpy as np
import pytest
import torch

from objectives.masking import random_mask, random_noise


def splitmix64(seed: int, index: int, stream: int) -> int:
    """The same draw in Python's unbounded integers."""
    gamma, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    start = mix((seed + (stream + 1) * gamma) & mask)
    return mix((start + (index + 1) * gamma) & mask) >> 1


def test_random_noise__equals_the_hash_in_python_integers():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 123456789]
    noise = random_noise(torch.tensor(seeds), 5, stream=3)
    assert noise.dtype == torch.int64
    assert noise.tolist() == [[splitmix64(seed, index, 3) for index in range(5)] for seed in seeds]


def test_random_noise__depends_on_the_sample_alone():
    seeds = torch.arange(100, 108)
    whole = random_noise(seeds, 64)
    parts = torch.cat([random_noise(part, 64) for part in seeds.flip(0).split(3)]).flip(0)
    assert torch.equal(whole, parts)
    assert not torch.equal(whole, random_noise(seeds, 64, stream=1))


def test_random_noise__neighbouring_seeds_and_streams_are_unrelated():
    first = random_noise(torch.arange(2000), 64).double() / 2**63
    second = random_noise(torch.arange(2000), 64, stream=1).double() / 2**63
    assert first.mean().item() == pytest.approx(0.5, abs=0.005)
    assert first.var().item() == pytest.approx(1 / 12, rel=0.02)
    for other in (second, first.roll(1, 0), first.roll(1, 1), second.roll(1, 0)):
        correlation = np.corrcoef(first.flatten(), other.flatten())[0, 1]
        assert abs(correlation) < 0.012  # 4 standard errors of 128000 independent pairs


def test_random_mask__each_patch_is_dropped_equally_often():
    dropped = random_mask(random_noise(torch.arange(4000), 16), 0.75).is_masked.double().mean(0)
    torch.testing.assert_close(dropped, torch.full((16,), 0.75, dtype=torch.float64), atol=0.03, rtol=0)


@pytest.mark.parametrize(("num", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (100, 0.9, 9), (2, 0.5, 1)])
def test_random_mask__keeps_the_smallest_and_splits_all(num, ratio, kept):
    noise = random_noise(torch.arange(5), num)
    mask = random_mask(noise, ratio)
    assert mask.keep_idx.shape == (5, kept)  # 100 patches at 0.9 keep 9: the product is truncated in floating point
    both = torch.cat([mask.keep_idx, mask.drop_idx], dim=1)
    assert torch.equal(both.sort(dim=1).values, torch.arange(num).expand(5, num))
    assert (noise.gather(1, mask.keep_idx).amax(1) < noise.gather(1, mask.drop_idx).amin(1)).all()
    expected = torch.zeros(5, num, dtype=torch.bool)
    for sample, idx in enumerate(mask.drop_idx.tolist()):
        expected[sample, idx] = True
    assert torch.equal(mask.is_masked, expected)


@pytest.mark.parametrize(("num", "ratio"), [(4, 0.8), (4, 0.0), (1, 0.5)])
def test_random_mask__something_must_stay_and_something_must_go(num, ratio):
    with pytest.raises(ValueError, match=f"of {num} patches"):
        random_mask(torch.zeros(2, num), ratio)
