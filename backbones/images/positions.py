"""Fixed two-dimensional sin-cos positions, as in MAE (He et al. 2021, arXiv:2111.06377), and tables for another grid.

NOT here: learned and rotary positions, which timm's models own.
"""

from __future__ import annotations

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional

from backbones.errors import BackboneError

__all__ = ["RESAMPLINGS", "moved_positions", "resample_positions", "sincos_positions"]

RESAMPLINGS = ("timm", "dino")


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


def resample_positions(
    table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int, method: str
) -> Tensor:
    """Positions of a trained grid, interpolated for the grid of an image of another size.

    "timm" interpolates bicubically with antialiasing. "dino" does what DINO's code does (arXiv:2104.14294): bicubic
    without antialiasing, and with a step between samples of old / (new + 0.1) in place of old / new. On a random table
    from 14 to 6 patches a side the two differ by four fifths of the values' norm, on a trained and smooth one by less.

    Args:
        table: (1, num_prefix + N, D); the prefix's positions are passed through.
        old_grid, new_grid: (rows, columns).
        method: one of `RESAMPLINGS`.

    Returns:
        (1, num_prefix + new rows * new columns, D) in the type of `table`; `table` itself when the grids are equal.
    """
    if method == "timm":
        return resample_abs_pos_embed(
            table, new_size=list(new_grid), old_size=list(old_grid), num_prefix_tokens=num_prefix
        )
    if new_grid == old_grid:
        return table
    patches = table[:, num_prefix:].unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    resampled = functional.interpolate(
        patches.to(torch.promote_types(table.dtype, torch.float32)),
        scale_factor=tuple((new + 0.1) / old for new, old in zip(new_grid, old_grid, strict=True)),
        mode="bicubic",
    )  # (1, D, new rows, new columns)
    return torch.cat([table[:, :num_prefix], resampled.flatten(2).mT.to(table.dtype)], dim=1)


def moved_positions(table: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int], num_prefix: int) -> Tensor:
    """Positions of an encoder as initial positions of another one with another grid.

    A sin-cos table is a known function of the grid, so that of the new grid is computed; any other table is
    interpolated bicubically with antialiasing.

    Args:
        table: (1, num_prefix + N, D); the prefix's positions are passed through.
        old_grid, new_grid: (rows, columns).

    Returns:
        (1, num_prefix + new rows * new columns, D) in the type of `table`.
    """
    dim, patches = table.shape[-1], table[0, num_prefix:].float()  # (N, D)
    rounding = torch.finfo(table.dtype).eps
    if dim % 4 == 0 and torch.allclose(patches, sincos_positions(dim, old_grid).to(patches), atol=rounding):
        return torch.cat([table[:, :num_prefix], sincos_positions(dim, new_grid).to(table)[None]], dim=1)
    return resample_positions(table, old_grid, new_grid, num_prefix, "timm")
