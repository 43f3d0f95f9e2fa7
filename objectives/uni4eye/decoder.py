"""The two decoders of Uni4Eye: one predicts images and volumes, the other their gradient maps, from the same features.

L. Cai et al., 2022, arXiv:2203.04614, section 2.2. Either has an embedding, a mask token and blocks of its own; the
final norm is shared, as in the authors' code, and each kind of data has a last layer of its own in each decoder.

Legend: B batch, N patches, K visible, M masked, D encoder width, E decoder width, L numbers per patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import Features
from backbones.images.positions import sincos_positions
from backbones.initialization import TOKEN_STD, draw_matrices
from backbones.norms import make_norms_exact
from backbones.voxels.positions import sincos_positions_3d

__all__ = ["DualDecoder"]


class DualDecoder(nn.Module):
    """Vectors per masked patch, by branch.

    Tokens run as [visible, masked] with each token's own position added: nothing is un-shuffled.
    """

    def __init__(
        self,
        encoder_dim: int,
        grids: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, Mapping[str, int]],
        *,
        dim: int,
        depth: int,
        num_heads: int,
    ) -> None:
        """A decoder for each branch.

        Args:
            encoder_dim: D.
            grids: patches along each axis, of two or three, by the name of a kind of data.
            outputs: L by branch and kind.
            dim, depth, num_heads: of each decoder.

        Raises:
            BackboneError: `dim` is not divisible by `num_heads`, or not by 4.
        """
        super().__init__()
        if dim % num_heads:
            raise BackboneError(f"decoder_dim {dim} is not a multiple of decoder_heads {num_heads}")
        self.branches = nn.ModuleDict(
            {branch: _Branch(encoder_dim, sizes, dim, depth, num_heads) for branch, sizes in outputs.items()}
        )
        self.norm = LayerNorm(dim)
        make_norms_exact(self)
        for kind, grid in grids.items():
            table = sincos_positions(dim, grid) if len(grid) == 2 else sincos_positions_3d(dim, grid)  # type: ignore[arg-type]
            self.register_buffer(f"{kind}_positions", table, persistent=False)  # (N, E)
        draw_matrices(self.modules())

    def forward(self, kind: str, visible: Features, keep_idx: Tensor, drop_idx: Tensor) -> dict[str, Tensor]:
        """Predictions for the masked patches by branch, (B, M, L) each, in the order of `drop_idx`.

        Args:
            kind: of the data.
            visible: of the patches at `keep_idx`.
            keep_idx, drop_idx: (B, K) and (B, M) row-major indices of visible and masked patches.
        """
        positions = self.get_buffer(f"{kind}_positions")
        found = {}
        for name, branch in self.branches.items():
            tokens = branch(visible.tokens, positions[keep_idx], positions[drop_idx])  # (B, N, E)
            last: Any = branch.get_submodule(f"predict.{kind}")
            found[name] = last(self.norm(tokens[:, -drop_idx.shape[1] :]))
        return found


class _Branch(nn.Module):
    """One decoder, without its final norm."""

    def __init__(self, encoder_dim: int, outputs: Mapping[str, int], dim: int, depth: int, num_heads: int) -> None:
        super().__init__()
        self.embed = nn.Linear(encoder_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        nn.init.normal_(self.mask_token, std=TOKEN_STD)
        # timm's LayerNorm has the paper's eps, 1e-6; torch's has 1e-5.
        self.blocks = nn.ModuleList(Block(dim, num_heads, qkv_bias=True, norm_layer=LayerNorm) for _ in range(depth))
        self.predict = nn.ModuleDict({kind: nn.Linear(dim, size) for kind, size in outputs.items()})

    def forward(self, visible: Tensor, visible_positions: Tensor, masked_positions: Tensor) -> Tensor:
        """(B, K, D) and positions (B, K, E), (B, M, E) -> (B, K + M, E)."""
        dtype = self.embed.weight.dtype
        x = torch.cat([self.embed(visible) + visible_positions, self.mask_token + masked_positions], dim=1).to(dtype)
        for block in self.blocks:
            x = block(x)
        return x
