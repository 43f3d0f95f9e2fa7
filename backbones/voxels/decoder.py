"""From the stages of a hierarchical encoder back to voxels, as in UNETR (Hatamizadeh et al. 2022, arXiv:2103.10504).

NeRF-MAE's form of it (arXiv:2404.01300): each block doubles the resolution and joins the encoder's stage of that
resolution as it is; the last one goes from tokens to voxels and joins nothing. Norms are instance norms without
weights, whose statistics are at least float32.

Legend: B batch, (X, Y, Z) tokens or voxels, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.precision import at_least_float32

__all__ = ["VoxelDecoder"]

_SLOPE = 0.01  # of the leaky ReLUs


class VoxelDecoder(nn.Module):
    """Predicts some numbers per voxel."""

    def __init__(self, stage_dims: Sequence[int], patch_size: int, output_dim: int) -> None:
        """For stages of widths `stage_dims`, the finest first, whose tokens are `patch_size` voxels wide there."""
        super().__init__()
        fine = stage_dims[0] // 2
        pairs = reversed(list(zip(stage_dims[1:], stage_dims, strict=False)))
        ups = [_UpBlock(coarse, finer, 2, joins=True) for coarse, finer in pairs]
        self.blocks = nn.ModuleList([*ups, _UpBlock(stage_dims[0], fine, patch_size, joins=False)])
        self.predict = nn.Conv3d(fine, output_dim, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Numbers (B, output_dim, X, Y, Z) per voxel from stages (B, X, Y, Z, D), the finest first."""
        *finer, x = (level.permute(0, 4, 1, 2, 3) for level in levels)  # (B, D, X, Y, Z) each
        for block, joined in zip(self.blocks, [*reversed(finer), None], strict=True):
            x = block(x) if joined is None else block(x, joined)
        predicted: Tensor = self.predict(x)
        return predicted


class _UpBlock(nn.Module):
    def __init__(self, input_dim: int, dim: int, factor: int, *, joins: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(input_dim, dim, factor, stride=factor)
        self.conv1 = nn.Conv3d(2 * dim if joins else dim, dim, 3, padding=1)
        self.conv2 = nn.Conv3d(dim, dim, 3, padding=1)
        self.match = nn.Conv3d(2 * dim, dim, 1) if joins else None

    def forward(self, x: Tensor, joined: Tensor | None = None) -> Tensor:
        """(B, input_dim, X, Y, Z) -> (B, dim, factor * X, ...); `joined` has the shape of the result."""
        x = self.up(x)
        if joined is not None:
            x = torch.cat([x, joined], dim=1)
        residual = x if self.match is None else _normed(self.match(x))
        x = functional.leaky_relu(_normed(self.conv1(x)), _SLOPE)
        return functional.leaky_relu(_normed(self.conv2(x)) + residual, _SLOPE)


def _normed(x: Tensor) -> Tensor:
    return functional.instance_norm(at_least_float32(x)).to(x.dtype)
