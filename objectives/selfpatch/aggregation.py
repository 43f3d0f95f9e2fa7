"""SelfPatch's parts: which neighbours of a patch are its positives, and class attention that sums a set of tokens up.

S. Yun et al., "Patch-level Representation Learning for Self-supervised Vision Transformers", CVPR 2022,
arXiv:2206.07990. Class attention without layer scale is that of CaiT (arXiv:2103.17239).

Legend: B batch, N patches of a grid, k positives, n tokens of a set, D width, H heads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn
from torch.nn import functional

from backbones.norms import make_norms_exact
from objectives.parts.initialization import initialize_linear

__all__ = ["Aggregation", "Neighbors", "Positives", "find_positives", "neighbors_of"]

_INIT_STD = 0.02


class Neighbors(NamedTuple):
    """The eight patches around each patch of a grid."""

    idx: Tensor  # (N, 8) int64, sorted
    is_inside: Tensor  # (N, 8) bool, False where the way there crosses the border of the image


class Positives(NamedTuple):
    """The most similar neighbours of each patch."""

    idx: Tensor  # (B, N, k) int64
    similarity: Tensor  # (B, N, k) cosines
    is_inside: Tensor  # (B, N, k) bool, False where the border lies between


@lru_cache(maxsize=16)
def neighbors_of(grid: tuple[int, int], device: torch.device) -> Neighbors:
    """Neighbors on a torus: beyond a border lies the opposite one. Grids have at least 3 x 3 patches."""
    rows, columns = grid
    here = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))  # (N, 2)
    around = torch.tensor([(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)])  # (8, 2)
    near_row, near_column = (here[:, None] + around).unbind(-1)  # (N, 8) each
    is_inside = (near_row >= 0) & (near_row < rows) & (near_column >= 0) & (near_column < columns)
    idx, order = (near_row % rows * columns + near_column % columns).sort(1)
    return Neighbors(idx.to(device), is_inside.gather(1, order).to(device))


def find_positives(tokens: Tensor, grid: tuple[int, int], num_positives: int, *, wraps: bool) -> Positives:
    """The `num_positives` neighbours with the highest cosine similarity to each patch.

    Args:
        tokens: (B, N, D) patches of a grid, float32 or wider: in bf16 one choice in 400 differs.
        grid: (rows, columns), at least 3 x 3.
        num_positives: k, 1 to 8.
        wraps: whether patches beyond a border count; without, those that are not `is_inside` are no positives, and a
            corner has 3 at most.
    """
    neighbours = neighbors_of(grid, tokens.device)
    unit = functional.normalize(tokens, dim=-1)
    # One neighbour at a time, because all at once would hold eight copies of the tokens.
    similarity = torch.stack([(unit * unit[:, idx]).sum(-1) for idx in neighbours.idx.T], dim=-1)  # (B, N, 8)
    if not wraps:
        similarity = similarity.masked_fill(~neighbours.is_inside, -torch.inf)
    best, choice = similarity.topk(num_positives, dim=-1)  # (B, N, k)
    idx, is_inside = (table.expand_as(similarity).gather(-1, choice) for table in neighbours)
    return Positives(idx, best, is_inside)


class Aggregation(nn.Module):
    """A learned class token that attends over a set of tokens: (B, n, D) -> (B, D), after the norm.

    Used alike for all patches of an image and for the positives of one patch. Attributes: `norm`, applied to what it
    gives and, by the objective, to patch tokens that stay as they are.
    """

    def __init__(self, dim: int, num_heads: int, depth: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.blocks = nn.ModuleList([_ClassAttentionBlock(dim, num_heads) for _ in range(depth)])
        self.norm = LayerNorm(dim)
        make_norms_exact(self)
        nn.init.normal_(self.cls_token, std=_INIT_STD)
        initialize_linear(self)

    def forward(self, tokens: Tensor, is_valid: Tensor | None = None) -> Tensor:
        """Sums up the tokens, or those of them that `is_valid` (B, n) marks."""
        summary = self.cls_token.expand(len(tokens), -1, -1)  # (B, 1, D)
        for block in self.blocks:
            summary = block(summary, tokens, is_valid)
        return self.norm(summary.squeeze(1))


class _ClassAttentionBlock(nn.Module):
    """Pre-norm attention of the summary over itself and the tokens, then a perceptron; the tokens stay as they are."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim)
        self.attn = _ClassAttention(dim, num_heads)
        self.norm2 = LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, summary: Tensor, tokens: Tensor, is_valid: Tensor | None) -> Tensor:
        summary = summary + self.attn(self.norm1(torch.cat([summary, tokens], dim=1)), is_valid)
        return summary + self.mlp(self.norm2(summary))


class _ClassAttention(nn.Module):
    """Multi-head attention whose only query is the first token, which is among the keys as well."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, tokens: Tensor, is_valid: Tensor | None) -> Tensor:
        query, keys, values = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, 1 or 1 + n, D / H)
            for part in (self.q(tokens[:, :1]), self.k(tokens), self.v(tokens))
        )
        # Not torch's fused attention: its kernels take at most 65535 sets, and there is one for each patch of a batch.
        scores = query @ keys.mT * query.shape[-1] ** -0.5  # (B, H, 1, 1 + n)
        if is_valid is not None:
            hidden = ~functional.pad(is_valid, (1, 0), value=True)[:, None, None]
            scores = scores.masked_fill(hidden, -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        return self.proj((weights.to(values.dtype) @ values).transpose(1, 2).flatten(2))  # (B, 1, D)
