"""The encoder of Point-MAE: a small PointNet makes a token of each group, a plain transformer relates the tokens.

Y. Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", 2022, arXiv:2203.06604, section 3; the
tokenizer is that of C. R. Qi et al. (PointNet, 2017, arXiv:1612.00593). Tokens have no order, so that each block is
given the position of each token anew: an embedding of its center is added to the input of every block. There is no
class token.

Legend: B batch, G groups, K groups that run, S points of a group, D width.
"""

from __future__ import annotations

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.norms import make_norms_exact
from backbones.points.base import PointEncoder
from backbones.points.config import PointTransformerConfig
from backbones.points.grouping import Groups
from backbones.rank_batch_norm import RankBatchNorm

__all__ = ["GroupTokenizer", "PointTransformer", "position_mlp", "run_blocks", "transformer_blocks"]

_STD = 0.02


class PointTransformer(PointEncoder):
    """Point-MAE's encoder; with the defaults of its settings 21.8 million parameters."""

    Config = PointTransformerConfig

    def __init__(self, config: PointTransformerConfig) -> None:
        """Raises BackboneError for widths that heads do not divide, and as `PointEncoder`."""
        super().__init__(config)
        if config.embed_dim % config.num_heads:
            raise BackboneError(
                f"backbone {config.name!r}: embed_dim {config.embed_dim} is not a multiple of num_heads "
                f"{config.num_heads}"
            )
        self.embed_dim = config.embed_dim
        self.tokenizer = GroupTokenizer(config.tokenizer_dim, config.embed_dim)
        self.position = position_mlp(config.embed_dim)
        self.blocks = transformer_blocks(config.embed_dim, config.depth, config.num_heads, config.drop_path)
        self.norm = nn.LayerNorm(config.embed_dim)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        make_norms_exact(self)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the output."""
        return self.tokenizer.project.weight.dtype

    def features(self, groups: Groups, keep_idx: Tensor | None = None) -> Features:
        """Encodes groups, or only some of them, see `PointEncoder`.

        All groups are tokenized, so that the tokenizer's batch norms see the same rows whatever is masked.
        """
        tokens = self.tokenizer(groups.neighborhoods.to(self.dtype))  # (B, G, D)
        centers = groups.centers
        if keep_idx is not None:
            tokens, centers = take_tokens(tokens, keep_idx), take_tokens(centers, keep_idx)
        tokens = run_blocks(self.blocks, tokens, self.position(centers.to(self.dtype)))
        return Features(self.norm(tokens), None, None, None, coords=groups.centers)

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter: 0 for tokenizer and positions, then by block, the final norm with the last."""
        depth = len(self.blocks)

        def layer(name: str) -> int:
            if name.startswith("blocks."):
                return int(name.split(".")[1]) + 1
            return depth if name.startswith("norm.") else 0

        return {name: layer(name) for name, _ in self.named_parameters()}


class GroupTokenizer(nn.Module):
    """One token per group: two point-wise layers, the greatest of each feature over the group, two layers, once more.

    The second pair of layers is given each point's features beside those of its group. A matrix for either, summed, is
    one matrix for both side by side; the group's is then multiplied once and not for each of its points.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.lift = nn.Linear(3, width)
        self.norm1 = RankBatchNorm(width)
        self.widen = nn.Linear(width, 2 * width)
        self.of_group = nn.Linear(2 * width, 4 * width)
        self.of_point = nn.Linear(2 * width, 4 * width, bias=False)
        self.norm2 = RankBatchNorm(4 * width)
        self.project = nn.Linear(4 * width, dim)

    def forward(self, neighborhoods: Tensor) -> Tensor:
        """(B, G, S, 3) -> (B, G, D). In training a collective: batch norms are over the rows of all ranks."""
        x = self.widen(self.norm1(self.lift(neighborhoods)).relu())  # (B, G, S, 2 W)
        x = self.of_group(x.amax(2, keepdim=True)) + self.of_point(x)  # (B, G, S, 4 W)
        x = self.project(self.norm2(x).relu())  # (B, G, S, D)
        return x.amax(2)


def transformer_blocks(dim: int, depth: int, num_heads: int, drop_path: float) -> nn.ModuleList:
    """Blocks for `run_blocks`; `drop_path` is the rate of the last one, to which those before rise from 0."""
    rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
    return nn.ModuleList(
        Block(dim, num_heads, qkv_bias=False, drop_path=rate, norm_layer=nn.LayerNorm) for rate in rates
    )


def run_blocks(blocks: nn.ModuleList, tokens: Tensor, positions: Tensor) -> Tensor:
    """Through blocks to each of which the positions are added: both (B, K, D) -> (B, K, D)."""
    for block in blocks:
        tokens = block(tokens + positions)
    return tokens


def position_mlp(dim: int) -> nn.Sequential:
    """From the center of a group to the embedding of its position: (..., 3) -> (..., D)."""
    return nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, dim))
