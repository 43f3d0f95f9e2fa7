"""Which voxels of a batch of volumes of different sizes are no padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["inside"]


def inside(size: Tensor, sides: Sequence[int]) -> Tensor:
    """Voxels below the true sizes of volumes that are padded at the high end.

    Args:
        size: (B, 3) int64, see `return_size` of a `volume` view.
        sides: (X, Y, Z) with padding.

    Returns:
        (B, X, Y, Z) bool.
    """
    x, y, z = (torch.arange(side, device=size.device) < size[:, axis, None] for axis, side in enumerate(sides))
    return x[:, :, None, None] & y[:, None, :, None] & z[:, None, None, :]
