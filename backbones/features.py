"""What every encoder returns, whatever it is inside.

Legend: B batch, N patch tokens of the whole image, K patch tokens that ran, R registers, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Features", "take_tokens"]


@dataclass(frozen=True)
class Features:
    """Tokens after the encoder's final norm.

    Attributes:
        patches: (B, N, D) in row-major order; (B, K, D) in the order of `keep_idx` when only some patches ran.
        cls: (B, D), or None for an encoder without a class token.
        registers: (B, R, D), or None for an encoder without registers.
        grid: (rows, columns) of the whole image's patches, so N = rows * columns.
    """

    patches: Tensor
    cls: Tensor | None
    registers: Tensor | None
    grid: tuple[int, int]

    def to(self, dtype: torch.dtype) -> Features:
        """The same features in another type."""
        cls = None if self.cls is None else self.cls.to(dtype)
        registers = None if self.registers is None else self.registers.to(dtype)
        return Features(self.patches.to(dtype), cls, registers, self.grid)


def take_tokens(tokens: Tensor, idx: Tensor) -> Tensor:
    """Picks per-sample tokens: (B, N, D) at indices (B, K) -> (B, K, D)."""
    return tokens.gather(1, idx.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
