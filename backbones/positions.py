"""Fixed two-dimensional sin-cos positions, as in MAE (He et al. 2021, arXiv:2111.06377).

NOT here: learned and rotary positions, which timm's models own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.errors import BackboneError

__all__ = ["sincos_positions"]


def sincos_positions(dim: int, grid: tuple[int, int]) -> Tensor:
    """Position table of a grid of patches.

    With w_k = 10000^(-k / (dim/4)), k = 0 .. dim/4 - 1, the token at (row, column) gets
    [sin(column * w), cos(column * w), sin(row * w), cos(row * w)]: the column comes first, and each quarter is one
    block (not interleaved). Computed in float64, because float32 powers and sines differ in the last digits.

    Args:
        dim: width of a token; a multiple of 4.
        grid: (rows, columns).

    Returns:
        (rows * columns, dim) float32, row-major.

    Raises:
        BackboneError: `dim` is not a multiple of 4.
    """
    if dim % 4:
        raise BackboneError(f"sin-cos positions need a width that is a multiple of 4, not {dim}; change the width")
    rows, columns = grid
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))  # (dim/4,)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")  # (rows, columns) each
    angles = [axis.flatten().double().outer(frequency) for axis in (column, row)]  # 2 x (N, dim/4)
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()  # (N, dim)
