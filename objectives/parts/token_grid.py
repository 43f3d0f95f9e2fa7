"""Patch tokens of one grid brought to another.

Legend: B images, N' and N patches of the two grids, D width.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from backbones.precision import at_least_float32

__all__ = ["on_grid"]


def on_grid(tokens: Tensor, own: tuple[int, int], wanted: tuple[int, int], method: str, antialias: bool) -> Tensor:
    """Tokens (B, N', D) of a grid of patches resized to another grid, (B, N, D); before they are normalized.

    Args:
        method: "bicubic" or "bilinear".
    """
    if own == wanted:
        return tokens
    maps = at_least_float32(tokens).mT.unflatten(2, own)  # (B, D, rows, columns)
    resized = functional.interpolate(maps, size=wanted, mode=method, align_corners=False, antialias=antialias)
    return resized.flatten(2).mT
