"""NeRF-MAE's 3D Swin transformer: stages of window attention, of which each halves the resolution of the one before.

M. Z. Irshad et al., "NeRF-MAE: Masked AutoEncoders for Self-Supervised 3D Representation Learning for Neural Radiance
Fields", ECCV 2024, arXiv:2404.01300. Written from the formulas; the values of the authors' code are in
tests/golden/nerf_mae.json. The attention is torchvision's, whose numbers are the same wherever each axis has a window
of tokens. Below that torchvision shrinks the window, and the authors pad the tokens with zeros, after the norm; so do
we. There is no norm after a stage, and no class token.

Legend: B batch, C channels, (X, Y, Z) tokens of a stage, D its width, N tokens of the last stage, n blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from backbones.errors import BackboneError
from backbones.features import Features
from backbones.norms import make_norms_exact
from backbones.voxels.base import Cover, StagedVoxelEncoder
from backbones.voxels.config import VoxelSwinConfig
from backbones.voxels.patches import padded_to
from backbones.voxels.positions import sincos_positions_3d

__all__ = ["VoxelSwin"]

_STD = 0.02
# Which of the eight cells of a 2 x 2 x 2 cube comes when, the first axis fastest.
_CELLS = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1))


class VoxelSwin(StagedVoxelEncoder):
    """A hierarchical encoder: `stages` gives the tokens of each resolution, `features` those of the last."""

    Config = VoxelSwinConfig
    positions: Tensor
    kept_shares: Tensor

    def __init__(self, config: VoxelSwinConfig) -> None:
        """A randomly initialized encoder; draws from torch's global generator.

        Raises:
            BackboneError: there is not one number of heads per stage that divides its width, the window is odd, or as
                `VoxelEncoder` says: sides of `size` are multiples of patch_size * 2^(stages - 1).
        """
        num_stages = len(config.depths)
        super().__init__(config, token_size=config.patch_size * 2 ** max(0, num_stages - 1))
        dims = tuple(config.embed_dim * 2**stage for stage in range(num_stages))
        heads = list(config.num_heads)
        if not dims or len(heads) != num_stages or any(dim % num for dim, num in zip(dims, heads, strict=True)):
            raise BackboneError(
                f"backbone {config.name!r}: depths {list(config.depths)} need as many num_heads, not {heads}, each a "
                f"divisor of the width of its stage: {list(dims)}"
            )
        if config.window % 2:
            raise BackboneError(
                f"backbone {config.name!r}: window {config.window} is odd, but every other block shifts it by a half; "
                f"use {config.window + 1}"
            )
        self.stage_dims, self.embed_dim = dims, dims[-1]
        self.patch_size, self.num_blocks = config.patch_size, sum(config.depths)
        self.patch_embed = nn.Conv3d(config.in_chans, config.embed_dim, config.patch_size, stride=config.patch_size)
        self.patch_norm = nn.LayerNorm(config.embed_dim)
        self.layers: Any = nn.ModuleList(
            _Stage(dims[stage], config.depths[stage], heads[stage], config, merges=stage > 0)
            for stage in range(num_stages)
        )
        make_norms_exact(self)
        # The share of samples that do not skip a branch falls from 1 in the first block to 1 - `drop_path` in the last.
        last = max(1, self.num_blocks - 1)
        kept = [1 - config.drop_path * number / last for number in range(self.num_blocks)]
        self.register_buffer("kept_shares", torch.tensor(kept).view(-1, 1), persistent=False)  # (n, 1)
        # A buffer stays float32 where an engine casts parameters; derived from the grid, so not in the state dict.
        table = sincos_positions_3d(config.embed_dim, self._first_grid(self.size))  # (X Y Z, D)
        self.register_buffer("positions", table, persistent=False)
        self._initialize()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the output."""
        return self.patch_embed.weight.dtype

    def stages(self, x: Tensor, cover: Cover | None = None, branch_noise: Tensor | None = None) -> list[Tensor]:
        """Tokens of each stage, see `StagedVoxelEncoder`.

        A learned token takes the place of a covered one after the positions, so it has none, as in the paper. The
        branches of a block are its attention and its MLP.
        """
        x = padded_to(x, [side * self.token_size for side in self.grid_at(x.shape[2:])])
        tokens = self.patch_norm(self.patch_embed(x.to(self.dtype)).permute(0, 2, 3, 4, 1))  # (B, X, Y, Z, D)
        tokens = (tokens + self._positions_at(x.shape[2:])).to(self.dtype)
        if cover is not None:
            tokens = torch.where(cover.is_masked.unsqueeze(-1), cover.token.to(tokens.dtype), tokens)
        scales = None if branch_noise is None else self._branch_scales(branch_noise).to(tokens.dtype)  # (n, 2, B)
        levels, depth = [], 0
        for layer in self.layers:
            end = depth + len(layer.blocks)
            tokens = layer(tokens, None if scales is None else scales[depth:end])
            levels.append(tokens)
            depth = end
        return levels

    def features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Tokens of the last stage, see `VoxelEncoder`; `levels` are those of all stages, row-major (B, X Y Z, D).

        Raises:
            BackboneError: with `keep_idx`: windows need all tokens.
        """
        if keep_idx is not None:
            raise BackboneError(f"backbone {self.spec['name']!r} has windows, so that it cannot leave tokens out")
        levels = self.stages(x)
        rows = tuple(level.flatten(1, 3) for level in levels)
        return Features(rows[-1], cls=None, registers=None, grid=self.grid_at(x.shape[2:]), levels=rows)

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter: 0 the patch embedding, then by block; a merging belongs to the block behind it."""
        first, depth = {}, 1
        for stage, layer in enumerate(self.layers):
            first[stage] = depth
            depth += len(layer.blocks)
        ids = {}
        for name, _ in self.named_parameters():
            parts = name.split(".")
            if parts[0] != "layers":
                ids[name] = 0
            else:
                ids[name] = first[int(parts[1])] + (int(parts[3]) if parts[2] == "blocks" else 0)
        return ids

    def _branch_scales(self, noise: Tensor) -> Tensor:
        """What the branches of a sample are multiplied by, (n, 2, B): 0, or the inverse of the share that stays."""
        return ((noise < self.kept_shares) / self.kept_shares).permute(1, 2, 0)

    def _first_grid(self, size: torch.Size | tuple[int, ...]) -> tuple[int, int, int]:
        x, y, z = (side // self.patch_size for side in size)
        return x, y, z

    def _positions_at(self, size: torch.Size) -> Tensor:
        """(X, Y, Z, D) float32 of the first stage."""
        grid = self._first_grid(size)
        is_own = grid == self._first_grid(self.size)
        table = self.positions if is_own else sincos_positions_3d(self.stage_dims[0], grid).to(self.positions)
        return table.unflatten(0, grid)

    def _initialize(self) -> None:
        """The authors': truncated normal matrices of deviation 0.02, no biases; convolutions are torch's."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)


class _Stage(nn.Module):
    """Patch merging, but in the first stage, and blocks of which every other one has shifted windows."""

    def __init__(self, dim: int, depth: int, heads: int, config: VoxelSwinConfig, *, merges: bool) -> None:
        super().__init__()
        self.merge = _Merging(dim // 2) if merges else None
        shifts = (0 if number % 2 == 0 else config.window // 2 for number in range(depth))
        self.blocks = nn.ModuleList(_Block(dim, heads, config.window, shift, config.mlp_ratio) for shift in shifts)

    def forward(self, x: Tensor, scales: Tensor | None) -> Tensor:
        """(B, X, Y, Z, D), of half the resolution and twice the width where it merges; `scales` (depth, 2, B)."""
        if self.merge is not None:
            x = self.merge(x)
        for number, block in enumerate(self.blocks):
            x = block(x, None if scales is None else scales[number])
        return x


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int, window: int, shift: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = _WindowAttention(dim, [window] * 3, [shift] * 3, heads)
        self.mlp = nn.Sequential(nn.Linear(dim, int(mlp_ratio * dim)), nn.GELU(), nn.Linear(int(mlp_ratio * dim), dim))

    def forward(self, x: Tensor, scales: Tensor | None) -> Tensor:
        """(B, X, Y, Z, D); `scales` (2, B) of the two branches."""
        attended = self.attn(self.norm1(x))
        x = x + (attended if scales is None else attended * scales[0].view(-1, 1, 1, 1, 1))
        mixed = self.mlp(self.norm2(x))
        return x + (mixed if scales is None else mixed * scales[1].view(-1, 1, 1, 1, 1))


class _WindowAttention(ShiftedWindowAttention3d):
    """torchvision's, of whole windows only: axes of fewer tokens are padded with zeros, which take part."""

    def define_relative_position_index(self) -> None:
        """The index follows from the window, so it is not in the state dict."""
        super().define_relative_position_index()
        index = self.relative_position_index
        del self.relative_position_index
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, X, Y, Z, D)."""
        sides = x.shape[1:4]
        missing = [max(0, window - side) for window, side in zip(self.window_size, sides, strict=True)]
        if any(missing):
            x = functional.pad(x, [0, 0, 0, missing[2], 0, missing[1], 0, missing[0]])
        whole: Tensor = super().forward(x)
        return whole[:, : sides[0], : sides[1], : sides[2]]


class _Merging(nn.Module):
    """Joins the tokens of each 2 x 2 x 2 cube: (B, X, Y, Z, D) -> (B, X / 2, Y / 2, Z / 2, 2 D)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8 * dim)
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        cells = [x[:, i::2, j::2, k::2] for i, j, k in _CELLS]  # eight of (B, X / 2, Y / 2, Z / 2, D)
        joined: Tensor = self.reduction(self.norm(torch.cat(cells, dim=-1)))
        return joined
