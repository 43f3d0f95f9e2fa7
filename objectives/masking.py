"""Which patches are hidden, as a pure function of each sample's seed.

The seed travels with the sample, so a mask is the same on any device, rank, world size and after any restart; no
generator state has to be saved. NOT here: what is done with the hidden patches.

Legend: B batch, N patches, K kept, M = N - K dropped.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["RandomMask", "random_mask", "random_noise", "uniform"]


@dataclass(frozen=True)
class RandomMask:
    """Patches of each sample that stay and that go, as row-major indices in random order.

    Attributes:
        keep_idx: (B, K) int64.
        drop_idx: (B, M) int64.
    """

    keep_idx: Tensor
    drop_idx: Tensor

    @property
    def is_masked(self) -> Tensor:
        """(B, N) bool, True where a patch is dropped."""
        num_patches = self.keep_idx.shape[1] + self.drop_idx.shape[1]
        is_masked = torch.zeros(len(self.drop_idx), num_patches, dtype=torch.bool, device=self.drop_idx.device)
        return is_masked.scatter(1, self.drop_idx, True)


def random_noise(seed: Tensor, num_patches: int, stream: int = 0) -> Tensor:
    """Independent random sort keys per sample and patch.

    A counter hash (the finaliser of SplitMix64, Steele et al. 2014) in wrapping int64 arithmetic: exact, hence equal
    on every device, and free of the ties that half-precision noise has.

    Args:
        seed: (B,) int64.
        num_patches: N.
        stream: separates several draws for one sample, for example one per view.

    Returns:
        (B, N) int64, uniform over 0 .. 2^63 - 1, on the seed's device.
    """
    counter = torch.arange(1, num_patches + 1, device=seed.device)  # (N,)
    # Two rounds: neighbouring seeds must not give shifted copies of one sequence.
    start = _mix(seed + _signed((stream + 1) * _GOLDEN_GAMMA))  # (B,)
    return _shift_right(_mix(start[:, None] + counter * _GOLDEN_GAMMA), 1)  # (B, N)


def uniform(seed: Tensor, count: int, stream: int = 0) -> Tensor:
    """Independent uniform numbers per sample: seeds (n,) to (n, count) float64 in [0, 1), see `random_noise`."""
    return (random_noise(seed, count, stream) >> 10).double() / 2**53


def random_mask(noise: Tensor, mask_ratio: float) -> RandomMask:
    """Keeps the patches with the smallest noise, the same number in every sample.

    Args:
        noise: (B, N), any ordered type.
        mask_ratio: share dropped; K = int(N * (1 - mask_ratio)), truncated in floating point as the paper's code does.

    Raises:
        ValueError: the ratio leaves no patch to see or none to predict.
    """
    num_patches = noise.shape[1]
    num_kept = int(num_patches * (1 - mask_ratio))
    if not 0 < num_kept < num_patches:
        raise ValueError(
            f"mask_ratio {mask_ratio} keeps {num_kept} of {num_patches} patches; at least one must stay and one must go"
        )
    order = noise.argsort(dim=1, stable=True)  # (B, N)
    return RandomMask(keep_idx=order[:, :num_kept], drop_idx=order[:, num_kept:])


def _signed(value: int) -> int:
    """`value` modulo 2^64 as the int64 of the same bits."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MULTIPLIERS = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit in."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift_right(value, 30)) * _MULTIPLIERS[0]
    value = (value ^ _shift_right(value, 27)) * _MULTIPLIERS[1]
    return value ^ _shift_right(value, 31)
