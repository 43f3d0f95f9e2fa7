"""A plain vision transformer of volumes: each cube of voxels is a token, and tokens can be left out.

The blocks are timm's (pre-norm, biases of queries, keys and values, norms with eps 1e-6), positions a fixed sin-cos
table, initial weights those of MAE (He et al. 2021, arXiv:2111.06377). There is no class token.

Legend: B batch, C channels, N tokens, K kept tokens, D width, p voxels along the edge of a patch.
"""

from __future__ import annotations

from timm.layers import LayerNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.initialization import draw_matrices
from backbones.norms import make_norms_exact
from backbones.voxels.base import VoxelEncoder
from backbones.voxels.config import VoxelVitConfig
from backbones.voxels.patches import padded_to, to_patches
from backbones.voxels.positions import sincos_positions_3d

__all__ = ["VoxelVit"]


class VoxelVit(VoxelEncoder):
    """Tokens of cubes of `patch_size` voxels, embedded as one matrix (D, C * p^3)."""

    Config = VoxelVitConfig
    can_drop_patches = True
    positions: Tensor

    def __init__(self, config: VoxelVitConfig) -> None:
        """A randomly initialized encoder; draws from torch's global generator.

        Raises:
            BackboneError: heads do not divide the width, or as `VoxelEncoder` says.
        """
        super().__init__(config, token_size=config.patch_size)
        if config.embed_dim % config.num_heads:
            raise BackboneError(
                f"backbone {config.name!r}: embed_dim {config.embed_dim} is no multiple of num_heads "
                f"{config.num_heads}; change one of them"
            )
        self.embed_dim, self.patch_size = config.embed_dim, config.patch_size
        self.patch_embed = nn.Linear(config.in_chans * config.patch_size**3, config.embed_dim)
        blocks = [
            Block(config.embed_dim, config.num_heads, config.mlp_ratio, qkv_bias=True, norm_layer=LayerNorm)
            for _ in range(config.depth)
        ]
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(config.embed_dim)
        make_norms_exact(self)
        # A buffer stays float32 where an engine casts parameters; derived from the grid, so not in the state dict.
        self.register_buffer("positions", sincos_positions_3d(config.embed_dim, self.grid), persistent=False)  # (N, D)
        draw_matrices(self.modules())

    def features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Encodes volumes, or only the tokens at `keep_idx`, see `VoxelEncoder`."""
        grid = self.grid_at(x.shape[2:])
        patches = to_patches(padded_to(x, [side * self.patch_size for side in grid]), self.patch_size)  # (B, N, C p^3)
        positions = self._positions_at(grid).expand(len(x), -1, -1)  # (B, N, D)
        if keep_idx is not None:
            patches, positions = take_tokens(patches, keep_idx), take_tokens(positions, keep_idx)  # (B, K, ...)
        return self.encoded(self.patch_embed(patches.to(self.dtype)) + positions, grid)

    def encoded(self, tokens: Tensor, grid: tuple[int, ...]) -> Features:
        """What the blocks and the final norm make of embedded tokens (B, K, D) with their positions."""
        tokens = tokens.to(self.dtype)
        for block in self.blocks:
            tokens = block(tokens)
        return Features(self.norm(tokens), cls=None, registers=None, grid=grid)

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter: 0 the patch embedding, then by block, the final norm with the last."""
        last = {"norm": len(self.blocks)}
        return {
            name: 1 + int(name.split(".")[1]) if (top := name.split(".")[0]) == "blocks" else last.get(top, 0)
            for name, _ in self.named_parameters()
        }

    def _positions_at(self, grid: tuple[int, int, int]) -> Tensor:
        """(N, D) float32."""
        return self.positions if grid == self.grid else sincos_positions_3d(self.embed_dim, grid).to(self.positions)
