"""What every encoder returns, whatever it is inside.

Legend: B batch, N tokens of the whole sample, K tokens that ran, R registers, P prefix tokens (class token and
registers), D width, A axes of space.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Features", "ImageFeatures", "take_tokens"]


@dataclass(frozen=True)
class Features:
    """Tokens after the encoder's final norm.

    Attributes:
        tokens: (B, N, D), one per place of the sample, row-major where there is a grid; (B, K, D) in the order of
            `keep_idx` when only some of them ran.
        cls: (B, D), or None for an encoder without a class token.
        registers: (B, R, D), or None for an encoder without registers.
        grid: tokens along each axis of the whole sample, such as (rows, columns), so N is their product; None where
            tokens lie on no grid.
        coords: (B, N, A), where tokens that lie on no grid are, in the units of the batch; None where there is a grid.
        levels: token streams (B, P + N, D) within the encoder, before the final norm and with prefix tokens first,
            after the layers that were asked for; empty when none were.
        is_valid: (B, N) bool, False for tokens of nothing but padding; None: there are none such.
    """

    tokens: Tensor
    cls: Tensor | None
    registers: Tensor | None
    grid: tuple[int, ...] | None
    coords: Tensor | None = None
    levels: tuple[Tensor, ...] = ()
    is_valid: Tensor | None = None

    @property
    def patches(self) -> Tensor:
        """`tokens`, by the name that they have in images."""
        return self.tokens

    @property
    def pooled(self) -> Tensor:
        """One vector per sample, (B, D): the class token, or `mean` of an encoder without one."""
        return self.mean if self.cls is None else self.cls

    @property
    def mean(self) -> Tensor:
        """(B, D) mean of the tokens that are valid."""
        if self.is_valid is None:
            return self.tokens.mean(1)
        weights = self.is_valid.to(self.tokens.dtype).unsqueeze(-1)  # (B, N, 1)
        return (self.tokens * weights).sum(1) / weights.sum(1).clamp_min(1)


@dataclass(frozen=True)
class ImageFeatures(Features):
    """Features of images, whose tokens are patches on a grid of (rows, columns)."""

    grid: tuple[int, int]

    def to(self, dtype: torch.dtype) -> ImageFeatures:
        """The same features in another type."""
        cls = None if self.cls is None else self.cls.to(dtype)
        registers = None if self.registers is None else self.registers.to(dtype)
        levels = tuple(level.to(dtype) for level in self.levels)
        return ImageFeatures(self.tokens.to(dtype), cls, registers, self.grid, levels=levels)


def take_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Picks per-sample tokens: (B, N, D) at indices (B, K) -> (B, K, D)."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
