"""From encoded images back to pixels, from volumes to voxels: decoders of MAE (arXiv:2111.06377) and SimMIM.

SimMIM is arXiv:2111.09886.

NOT here: the encoder, the choice of what is masked, the loss.

Legend: B batch, C channels, N patch tokens, K visible, M = N - K masked, D encoder width, E decoder width.
"""

from __future__ import annotations

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional

from backbones.errors import BackboneError
from backbones.features import Features, ImageFeatures
from backbones.images.base import ImageEncoder
from backbones.images.positions import sincos_positions
from backbones.norms import make_norms_exact
from backbones.voxels.positions import sincos_positions_3d

__all__ = ["MaskedDecoder", "PixelHead"]


class MaskedDecoder(nn.Module):
    """Predicts one vector per masked patch.

    Attention does not see order, only positions, so the tokens run as [class token, visible, masked] with each
    token's own position added: nothing is un-shuffled, and the masked tokens are the last M.
    """

    positions: Tensor

    def __init__(
        self, encoder_dim: int, grid: tuple[int, ...], output_dim: int, *, dim: int, depth: int, num_heads: int
    ) -> None:
        """Builds `depth` blocks of width `dim`; `output_dim` numbers are predicted per patch of the `grid`, which has
        two axes or three.

        Raises:
            BackboneError: `dim` is not divisible by `num_heads`, or has no sin-cos positions (of an image: not by 4).
        """
        super().__init__()
        if dim % num_heads:
            raise BackboneError(f"decoder_dim {dim} is not a multiple of decoder_heads {num_heads}")
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, dim))
        # timm's LayerNorm has the paper's eps, 1e-6; torch's has 1e-5.
        blocks = [Block(dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(dim)
        self.predict = nn.Linear(dim, output_dim)
        make_norms_exact(self)
        # A buffer stays float32 where an engine casts parameters; derived from the grid, so not in the state dict.
        self.register_buffer("positions", _positions(dim, grid), persistent=False)  # (N, E)

    def forward(self, visible: Features, keep_idx: Tensor, drop_idx: Tensor) -> Tensor:
        """Predictions for the masked patches.

        Args:
            visible: encoder output for the patches at `keep_idx`; registers are not used.
            keep_idx, drop_idx: (B, K) and (B, M) row-major indices of visible and masked patches.

        Returns:
            (B, M, output_dim) in the order of `drop_idx`.
        """
        dtype = self.embed.weight.dtype
        encoded = self.embed(visible.patches) + self.positions[keep_idx]  # (B, K, E)
        masked = self.mask_token + self.positions[drop_idx]  # (B, M, E)
        tokens = [encoded, masked]
        if visible.cls is not None:
            tokens.insert(0, self.embed(visible.cls).unsqueeze(1))  # its position is zero
        x = torch.cat([token.to(dtype) for token in tokens], dim=1)  # (B, 1 + N, E)
        for block in self.blocks:
            x = block(x)
        return self.predict(self.norm(x[:, -drop_idx.shape[1] :]))  # (B, M, output_dim)


def _positions(dim: int, grid: tuple[int, ...]) -> Tensor:
    """(N, E) of an image or a volume."""
    if len(grid) == 2:
        return sincos_positions(dim, (grid[0], grid[1]))
    return sincos_positions_3d(dim, (grid[0], grid[1], grid[2]))


class PixelHead(nn.Module):
    """Covers parts of an image with a learned token, and predicts all pixels from the features of what is left.

    The token lies in the space of normalized pixels, so that any encoder can be used, with any stem. The head is one
    linear layer per output token and a pixel shuffle. A class token is added to each patch token, so that it learns as
    well: in some models (VOLO, CrossViT) patch tokens do not depend on it.
    """

    def __init__(self, backbone: ImageEncoder, mask_size: int) -> None:
        """For the tokens of `backbone` and covers of `mask_size` pixels a side, which divides its image size."""
        super().__init__()
        self.patch_size = backbone.patch_size
        self.mask_token = nn.Parameter(torch.zeros(backbone.in_chans, mask_size, mask_size))
        nn.init.normal_(self.mask_token, std=0.02)
        self.embed_cls = nn.Linear(backbone.embed_dim, backbone.embed_dim, bias=False) if backbone.has_cls else None
        self.predict = nn.Linear(backbone.embed_dim, backbone.in_chans * backbone.patch_size**2)

    def cover(self, x: Tensor, is_masked: Tensor) -> Tensor:
        """Images (B, C, H, W) with the token wherever `is_masked` (B, rows, columns) bool; never below float32."""
        size = self.mask_token.shape[-1]
        hidden = is_masked.repeat_interleave(size, 1).repeat_interleave(size, 2)  # (B, H, W)
        token = self.mask_token.repeat(1, is_masked.shape[1], is_masked.shape[2])  # (C, H, W)
        return torch.where(hidden[:, None], token.to(x), x)

    def forward(self, features: ImageFeatures) -> Tensor:
        """Predicted pixels (B, C, H, W), in the type of the features."""
        tokens = features.patches  # (B, N, D)
        if self.embed_cls is not None:
            assert features.cls is not None  # `has_cls` says so
            tokens = tokens + self.embed_cls(features.cls).unsqueeze(1)
        pixels = self.predict(tokens).mT.unflatten(2, features.grid)  # (B, C * p * p, rows, columns)
        return functional.pixel_shuffle(pixels, self.patch_size)
