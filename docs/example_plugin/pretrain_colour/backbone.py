"""A small convolutional encoder: one token per patch at every depth, mixed by large depthwise kernels.

After A. Trockman, J. Z. Kolter, "Patches Are All You Need?" (ConvMixer), arXiv:2201.09792, with group instead of batch
norms: a norm over the batch would make a sample's features depend on its neighbours in the batch.

Legend: B batch, C channels, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["PatchConv", "patch_conv"]


class PatchConv(nn.Module):
    """The network; `forward_features` and `group_matcher` are what pretrain needs of it."""

    def __init__(self, in_chans: int, patch_size: int, dim: int, depth: int, kernel_size: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList([_Block(dim, kernel_size) for _ in range(depth)])
        self.norm = nn.GroupNorm(1, dim)

    def forward_features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, D, rows, columns), a map whose cells become the patch tokens."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How deep each parameter lies, as timm's models say it; for `optimizer.layer_decay`."""
        return {"stem": r"^stem", "blocks": r"^blocks" if coarse else [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}


class _Block(nn.Module):
    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.mix_patches = nn.Conv2d(dim, dim, kernel_size, padding="same", groups=dim)
        self.mix_channels = nn.Sequential(nn.Conv2d(dim, 2 * dim, 1), nn.GELU(), nn.Conv2d(2 * dim, dim, 1))
        self.norms = nn.ModuleList([nn.GroupNorm(1, dim), nn.GroupNorm(1, dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix_patches(self.norms[0](x))
        return x + self.mix_channels(self.norms[1](x))  # (B, D, rows, columns)


def patch_conv(
    in_chans: int = 3, patch_size: int = 8, dim: int = 96, depth: int = 4, kernel_size: int = 5
) -> PatchConv:
    """The entry point. `in_chans` and `patch_size` come from `backbone:` of a recipe, the rest from its `options`."""
    return PatchConv(in_chans, patch_size, dim, depth, kernel_size)
