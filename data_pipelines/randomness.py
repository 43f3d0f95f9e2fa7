"""Randomness inside a sample: keyed by (seed, epoch, sample id, view), never by rank, worker or wall clock.

Scalars come from SplitMix64 (Steele, Lea, Flood, OOPSLA 2014) on plain integers: the same everywhere and in every
version of numpy and torch, and without the set-up cost of a generator. What needs many numbers at once (noise on a
point cloud, say) takes a `torch.Generator` from the same key.
"""

from __future__ import annotations

import torch

from data_pipelines.order import GOLDEN, key, splitmix64
from data_pipelines.purposes import Purpose

__all__ = ["ViewRandom", "sample_seed"]


def sample_seed(seed: int, epoch: int, sample_id: int) -> int:
    """64-bit key of everything random about one sample in one epoch; view `i` draws from `key(i, base=...)` of it."""
    return key(seed, epoch, Purpose.SAMPLE, sample_id)


class ViewRandom:
    """The draws of one view of one sample, in the order they are asked for."""

    __slots__ = ("_key",)

    def __init__(self, key: int) -> None:
        self._key = key

    def uniform(self, low: float, high: float) -> float:
        """A float in `[low, high)`."""
        return low + (high - low) * (self._next() >> 11) * 2.0**-53

    def below(self, n: int) -> int:
        """An integer in `[0, n)`."""
        return (self._next() * n) >> 64

    def fork(self, purpose: int) -> ViewRandom:
        """Draws for another purpose, independent of those from here on."""
        return ViewRandom(key(purpose, base=self._key))

    def generator(self) -> torch.Generator:
        """A new generator for tensors, seeded by the next draw."""
        return torch.Generator().manual_seed(self._next())

    def _next(self) -> int:
        value = splitmix64(self._key)
        self._key = (self._key + GOLDEN) & ((1 << 64) - 1)
        return value
