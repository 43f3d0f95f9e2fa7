"""Fixed three-dimensional sin-cos positions, those of NeRF-MAE (Irshad et al. 2024, arXiv:2404.01300).

They are a function of the place alone, so the table of a larger grid begins with that of a smaller one, and a volume of
another size needs no interpolation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.errors import BackboneError

__all__ = ["sincos_positions_3d"]


def sincos_positions_3d(dim: int, grid: tuple[int, int, int]) -> Tensor:
    """Position table of a grid of cubes.

    With w_k = 10000^(-k / n), k = 0 .. n - 1, the token at (x, y, z) gets [sin(y w), cos(y w), sin(x w), cos(x w),
    sin(z w), cos(z w)]: the second axis comes first, as in the authors' code. An axis has n = dim / 6 frequencies;
    where 6 does not divide the width, the first axes in this order have one more. Computed in float64.

    Args:
        dim: width of a token; an even number of at least 6.
        grid: tokens along each axis, (X, Y, Z).

    Returns:
        (X * Y * Z, dim) float32, row-major.

    Raises:
        BackboneError: another width.
    """
    if dim % 2 or dim < 6:
        raise BackboneError(f"sin-cos positions need a width that is even and at least 6, not {dim}; change the width")
    x, y, z = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    waves = []
    for number, axis in enumerate((y, x, z)):
        count = dim // 6 + (number < dim // 2 % 3)
        frequency = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)  # (n,)
        angle = axis.flatten().outer(frequency)  # (X * Y * Z, n)
        waves += [angle.sin(), angle.cos()]
    return torch.cat(waves, dim=1).float()
