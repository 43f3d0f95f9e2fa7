"""timm's plain vision transformers behind one interface: `preprocess`, `features`, masking as an argument.

A plain ViT embeds each image patch alone and keeps one token per patch through every block, so that patches can be
left out before the first block (MAE, He et al. 2021, arXiv:2111.06377). timm's `VisionTransformer` (with or without
class token and registers) and `Eva` (absolute and/or rotary positions: EVA-02, DINOv3, ViT
with RoPE) are such models. NOT here: windowed and hierarchical models; lookup by name (`backbones.registry`).

Legend: B batch, C channels, N patch tokens, K kept patch tokens, P prefix tokens (class token, registers), D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, apply_keep_indices_nlc
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.images.base import Backbone
from backbones.images.positions import RESAMPLINGS, resample_positions, sincos_positions

__all__ = ["ViTBackbone", "is_plain_vit"]


class ViTBackbone(Backbone):
    """A timm ViT (as `.vit`), whose patches can be left out and whose blocks can be looked into.

    Attributes:
        vit: the timm model, built with `num_classes=0, global_pool="", dynamic_img_size=True`.
        num_prefix_tokens: P.
    """

    can_drop_patches = True
    has_plain_blocks = True

    def __init__(
        self,
        vit: Any,  # timm's two ViT classes share attributes but no base class
        *,
        library: str,
        name: str,
        options: Mapping[str, Any],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        position_resampling: str = "timm",
    ) -> None:
        """Wraps `vit`; `library`, `name` and `options` say how it was built and only go into `spec`.

        Raises:
            BackboneError: the model is not a plain ViT on square images, or as `Backbone` says.
        """
        if not is_plain_vit(vit):
            raise BackboneError(f"backbone {name!r} is not a plain ViT but a {type(vit).__name__}")
        embed = cast(PatchEmbed, vit.patch_embed)
        super().__init__(
            library=library,
            name=name,
            image_size=_square(embed.img_size, name, "image_size"),
            patch_size=_square(embed.patch_size, name, "patch_size"),
            embed_dim=int(vit.embed_dim),
            in_chans=int(embed.proj.in_channels),
            options=options,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.vit = vit
        self.num_prefix_tokens = int(vit.num_prefix_tokens)
        self.has_cls = vit.cls_token is not None
        self.resample_positions_as(position_resampling)

    @property
    def network(self) -> nn.Module:
        """The timm model."""
        return self.vit

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the token stream and of the output."""
        return self.vit.patch_embed.proj.weight.dtype

    def features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Encodes images, or only some patches of them.

        Args:
            x: (B, C, H, W) normalised pixels, H and W multiples of the patch size; sizes other than `image_size` get
                interpolated positions.
            keep_idx: (B, K) int64 row-major patch indices. Only these patches enter the blocks, in this order.

        Returns:
            Tokens after the final norm, in the type of the weights.
        """
        tokens, grid = self._encode(x, keep_idx)
        num_prefix = self.num_prefix_tokens
        has_cls = self.vit.cls_token is not None
        return Features(
            patches=tokens[:, num_prefix:],
            cls=tokens[:, 0] if has_cls else None,
            registers=tokens[:, int(has_cls) : num_prefix] if num_prefix > has_cls else None,
            grid=grid,
        )

    def features_of_blocks(self, x: Tensor, blocks: Sequence[int]) -> list[Tensor]:
        """Token streams within the encoder, before the final norm (`vit.norm`).

        Args:
            x: as for `features`.
            blocks: after which blocks, counted from 1 and ascending.

        Returns:
            Per block (B, P + N, D), prefix tokens first.
        """
        tokens, _, rotations = self._embed(x, None)
        return [stream for depth, stream in enumerate(self._blocks(tokens, rotations), start=1) if depth in blocks]

    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches for images of this size in pixels: any multiple of the patch size.

        Raises:
            BackboneError: it is not one.
        """
        if height % self.patch_size or width % self.patch_size or not height or not width:
            raise BackboneError(
                f"backbone {self.spec['name']!r}: {height} x {width} px is not a multiple of patch_size "
                f"{self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the final norm, (B, P + N, D), as timm's method of the same name."""
        return self._encode(x, None)[0]

    def _encode(self, x: Tensor, keep_idx: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
        tokens, grid, rotations = self._embed(x, keep_idx)
        for stream in self._blocks(tokens, rotations):  # one at a time, so that no other is kept in memory
            tokens = stream
        return self.vit.norm(tokens), grid

    def _embed(self, x: Tensor, keep_idx: Tensor | None) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """What enters the first block: tokens (B, P + K, D), the grid, and the rotary table if there is one."""
        vit = self.vit
        patches = vit.patch_embed(x.to(self.dtype))  # (B, rows, columns, D)
        batch, grid = patches.shape[0], (int(patches.shape[1]), int(patches.shape[2]))
        patches = patches.flatten(1, 2)  # (B, N, D)
        prefix_positions, patch_positions = self._positions(grid)
        if patch_positions is not None:
            patches = patches + patch_positions
        if keep_idx is not None:
            patches = take_tokens(patches, keep_idx)  # (B, K, D)
        tokens = torch.cat([*self._prefix(batch, prefix_positions), patches], dim=1)  # (B, P + K, D)
        # Float32 position buffers promote a bf16 sum: back to the weights' type before the first block.
        tokens = vit.norm_pre(vit.pos_drop(tokens.to(self.dtype)))
        return tokens, grid, self._rotations(tokens, grid, keep_idx)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Absolute positions of the prefix (1, P, D) and of the patches (1, N, D); None where there are none."""
        if self.vit.pos_embed is None:
            return None, None
        num_prefix = 0 if self.vit.no_embed_class else self.num_prefix_tokens
        table = resample_positions(self.vit.pos_embed, self.grid, grid, num_prefix, self.position_resampling)
        return (table[:, :num_prefix] if num_prefix else None), table[:, num_prefix:]

    def _prefix(self, batch: int, positions: Tensor | None) -> list[Tensor]:
        """Class token and registers with their positions, (B, P, D) as a list of one; empty when there are none."""
        tokens = [token for token in (self.vit.cls_token, self.vit.reg_token) if token is not None]
        if not tokens:
            return []
        prefix = torch.cat(tokens, dim=1)  # (1, P, D)
        if positions is not None:
            prefix = prefix + positions
        return [prefix.expand(batch, -1, -1)]

    def _rotations(self, tokens: Tensor, grid: tuple[int, int], keep_idx: Tensor | None) -> Tensor | None:
        """Rotary table for the patches that run, with a depth axis in front for models with one table per block."""
        rope = getattr(self.vit, "rope", None)
        if rope is None:
            return None
        table = rope.get_embed(shape=list(grid))  # (N, F), or (depth, heads, N, F)
        if keep_idx is None:
            return table
        kept = apply_keep_indices_nlc(tokens, table, keep_idx)  # batch axis in front
        return kept.transpose(0, 1) if self.vit.rope_mixed else kept.unsqueeze(1)

    def _blocks(self, tokens: Tensor, rotations: Tensor | None) -> Iterator[Tensor]:
        """The token stream (B, P + K, D) after each block."""
        recompute = self.vit.grad_checkpointing and torch.is_grad_enabled()
        for depth, block in enumerate(self.vit.blocks):
            extra: dict[str, Any] = {}
            if rotations is not None:
                extra["rope"] = rotations[depth] if self.vit.rope_mixed else rotations
            tokens = checkpoint(block, tokens, use_reentrant=False, **extra) if recompute else block(tokens, **extra)
            yield tokens

    def fix_sincos_positions(self) -> None:
        """Replaces learned absolute positions by MAE's fixed sin-cos table; prefix tokens get zeros.

        The table is a float32 buffer of the parameter's name and shape: state-dict keys stay timm's, and engines that
        cast parameters to bf16 leave it alone. A model that only rotates (RoPE) has no table and stays as it is.
        """
        if self.vit.pos_embed is None:
            return
        table = sincos_positions(self.embed_dim, self.grid)  # (N, D)
        if not self.vit.no_embed_class:
            table = torch.cat([table.new_zeros(self.num_prefix_tokens, self.embed_dim), table])  # (P + N, D)
        device = self.vit.pos_embed.device
        del self.vit.pos_embed
        self.vit.register_buffer("pos_embed", table[None].to(device))

    def resample_positions_as(self, method: str) -> None:
        """Chooses how absolute positions follow an image of another size, see `backbones.images.positions`; it is
        exported.

        Raises:
            BackboneError: no such method.
        """
        if method not in RESAMPLINGS:
            raise BackboneError(f"position_resampling {method!r} is not known; it is one of {', '.join(RESAMPLINGS)}")
        self.position_resampling = method
        # Only when it is not timm's, so that the digests of older files stay.
        self.spec.pop("position_resampling", None)
        if method != "timm":
            self.spec["position_resampling"] = method


def is_plain_vit(model: nn.Module) -> bool:
    """Whether each patch is embedded alone and keeps its own token, in one of the two classes that are known here.

    Subclasses that embed or run tokens in their own way (distillation tokens, for example) are not.
    """
    if not isinstance(model, VisionTransformer | Eva) or type(model.patch_embed) is not PatchEmbed:
        return False
    base = VisionTransformer if isinstance(model, VisionTransformer) else Eva
    return all(getattr(type(model), name) is getattr(base, name) for name in ("_pos_embed", "forward_features"))


def _square(size: tuple[int, int], name: str, key: str) -> int:
    height, width = size
    if height != width:
        raise BackboneError(f"backbone {name!r}: {key} {height} x {width} is not square; give {key} as one number")
    return int(height)
