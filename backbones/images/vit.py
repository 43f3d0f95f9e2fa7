"""timm's plain vision transformers behind one interface: `preprocess`, `features`, masking as an argument.

A plain ViT embeds each image patch alone and keeps one token per patch through every block, so that patches can be
left out before the first block (MAE, He et al. 2021, arXiv:2111.06377). timm's `VisionTransformer` (with or without
class token and registers) and `Eva` (absolute and/or rotary positions: EVA-02, DINOv3, ViT
with RoPE) are such models. NOT here: what is read of timm's modules (`backbones.images.timm_internals`); windowed and
hierarchical models; lookup by name (`backbones.registry`).

Legend: B batch, C channels, N patch tokens, K kept patch tokens, P prefix tokens (class token, registers), D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import ImageFeatures, take_tokens
from backbones.images import timm_internals
from backbones.images.base import ImageEncoder
from backbones.images.class_block import prepare_class_token
from backbones.images.packed_blocks import BlockDraw, Crops, pack_blocks
from backbones.images.positions import RESAMPLINGS, moved_positions, resample_positions, sincos_positions
from backbones.norms import make_norms_exact

__all__ = ["ViTBackbone"]


class ViTBackbone(ImageEncoder):
    """A timm ViT (as `.vit`), whose patches can be left out and whose blocks can be looked into.

    Attributes:
        vit: the timm model, built with `num_classes=0, global_pool="", dynamic_img_size=True`.
    """

    can_drop_patches = True
    has_plain_blocks = True

    def __init__(
        self,
        vit: nn.Module,
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
            BackboneError: the model is not a plain ViT on square images, or as `ImageEncoder` says.
        """
        if not timm_internals.is_plain_vit(vit):
            raise BackboneError(f"backbone {name!r} is not a plain ViT but a {type(vit).__name__}")
        sizes = timm_internals.vit_sizes(vit)
        super().__init__(
            library=library,
            name=name,
            image_size=_square(sizes.image, name, "image_size"),
            patch_size=_square(sizes.patch, name, "patch_size"),
            embed_dim=sizes.width,
            in_chans=sizes.in_chans,
            options=options,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        make_norms_exact(vit)
        timm_internals.let_key_biases_follow(vit)
        self.vit: Any = vit  # timm's two ViT classes share attributes but no base class
        self.num_prefix_tokens = sizes.num_prefix
        self.num_layers = sizes.num_blocks
        self.has_cls = sizes.has_cls
        self.has_movable_positions = timm_internals.has_movable_positions(vit)
        self._num_prefix_positions = sizes.num_prefix if sizes.positions_on_prefix else 0
        self._pools_in_last_block = False
        self.resample_positions_as(position_resampling)

    @property
    def network(self) -> nn.Module:
        """The timm model."""
        network: nn.Module = self.vit
        return network

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the token stream and of the output."""
        return timm_internals.patch_projection(self.vit).dtype

    @property
    def patch_projection(self) -> Tensor:
        """The weight that embeds patches as one matrix, (D, C * p * p); a view of the parameter."""
        return timm_internals.patch_projection(self.vit).flatten(1)

    def features(self, x: Tensor, keep_idx: Tensor | None = None, *, layers: Sequence[int] = ()) -> ImageFeatures:
        """Encodes images, or only some patches of them.

        Args:
            x: (B, C, H, W) normalized pixels, H and W multiples of the patch size; sizes other than `image_size` get
                interpolated positions.
            keep_idx: (B, K) int64 row-major patch indices. Only these patches enter the blocks, in this order.
            layers: after which blocks the token stream is read as well, counted from 1 and ascending.

        Returns:
            Tokens after the final norm, in the type of the weights; `levels` of `layers`, before that norm.

        Raises:
            BackboneError: there is no such layer, or patches do not tile images of this size.
        """
        if layers and not 1 <= min(layers) <= max(layers) <= self.num_layers:
            raise BackboneError(
                f"backbone {self.spec['name']!r} has layers 1 to {self.num_layers}, not {', '.join(map(str, layers))}"
            )
        tokens, grid, rotary = self._embed(x, keep_idx)
        levels = []
        for depth, stream in enumerate(timm_internals.block_outputs(self.vit, tokens, rotary), start=1):
            tokens = stream  # one at a time, so that no other is kept in memory
            if depth in layers:
                levels.append(stream)
        return self._sorted(timm_internals.final_norm(self.vit, tokens), grid, tuple(levels))

    def pooled(self, x: Tensor) -> Tensor:
        """One vector per image, see `ImageEncoder.pooled`."""
        if not self._pools_in_last_block:
            return super().pooled(x)
        tokens, _, rotary = self._embed(x, None)
        for stream in timm_internals.block_outputs(self.vit, tokens, rotary, class_only=True):
            tokens = stream
        return timm_internals.final_norm(self.vit, tokens)[:, 0]

    def prepare_pooled(self) -> None:
        """Let the last block compute the class token alone, where it is of a kind that can."""
        self._pools_in_last_block = prepare_class_token(self.vit)

    def copy_of_final_norm(self) -> nn.Module:
        """A norm of the same kind, with the same weights."""
        norm: nn.Module = copy.deepcopy(self.vit.norm)
        return norm

    def pack_blocks(self) -> None:
        """Prepare the blocks for `streams`, before anything else (an engine, a compiler) has changed their `forward`.

        Raises:
            BackboneError: they are of a kind that cannot take several sizes.
        """
        pack_blocks(self.vit)

    def streams(self, crops: Sequence[Crops], draws: Sequence[Sequence[BlockDraw]] = ()) -> list[Tensor]:
        """Token streams (B, P + N, D) of crops of several sizes, before the final norm, in one pass through the blocks.

        `read_out` makes features of them. What is random in the pass is drawn by the caller. Needs `pack_blocks`.

        Args:
            crops: the images of each size.
            draws: for each block, one per size; empty: nothing is random.

        Raises:
            BackboneError: patches do not tile images of a size.
        """
        embedded = [self._embed(crop.images, None, crop.is_masked, crop.mask_token) for crop in crops]
        streams = [tokens for tokens, _, _ in embedded]
        tables = [rotary for _, _, rotary in embedded]
        for depth, block in enumerate(timm_internals.blocks(self.vit)):
            here = draws[depth] if draws else [BlockDraw()] * len(crops)
            rotary = [
                timm_internals.rotary_at(self.vit, table, depth)
                if draw.coords is None
                else timm_internals.moved_rotation(self.vit, grid, *draw.coords)
                for (_, grid, _), table, draw in zip(embedded, tables, here, strict=True)
            ]
            streams = block(streams, rotary, here)
        return streams

    def read_out(self, stream: Tensor, grid: tuple[int, int]) -> ImageFeatures:
        """Features of a token stream (B, P + N, D) of this encoder: the final norm of it, see `ImageEncoder`."""
        return self._sorted(timm_internals.final_norm(self.vit, stream), grid, ())

    def _sorted(self, tokens: Tensor, grid: tuple[int, int], levels: tuple[Tensor, ...]) -> ImageFeatures:
        """Tokens (B, P + N, D) by what they are."""
        num_prefix, has_cls = self.num_prefix_tokens, self.has_cls
        return ImageFeatures(
            tokens=tokens[:, num_prefix:],
            cls=tokens[:, 0] if has_cls else None,
            registers=tokens[:, int(has_cls) : num_prefix] if num_prefix > has_cls else None,
            grid=grid,
            levels=levels,
        )

    def attention(self, x: Tensor) -> Tensor | None:
        """How much the class token attends to each patch in the last block, see `ImageEncoder`."""
        tokens, _, rotary = self._embed(x, None)
        attention = timm_internals.class_attention(self.vit, tokens, rotary)  # (B, heads, P + N)
        return None if attention is None else attention[..., self.num_prefix_tokens :]

    def last_keys(self, x: Tensor) -> Tensor | None:
        """Keys of the patches in the last block, see `ImageEncoder`."""
        tokens, _, rotary = self._embed(x, None)
        keys = timm_internals.last_keys(self.vit, tokens, rotary)  # (B, P + N, D)
        return None if keys is None else keys[:, self.num_prefix_tokens :]

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
        tokens, _, rotary = self._embed(x, None)
        for stream in timm_internals.block_outputs(self.vit, tokens, rotary):
            tokens = stream
        return timm_internals.final_norm(self.vit, tokens)

    def _embed(
        self,
        x: Tensor,
        keep_idx: Tensor | None,
        is_masked: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> tuple[Tensor, tuple[int, int], Tensor | None]:
        """What enters the first block: tokens (B, P + K, D), the grid, and the rotary table if there is one.

        Where `is_masked` (B, N) says so, `mask_token` (1, D) takes the place of the patch before it gets its position;
        all patches run then.
        """
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise BackboneError(
                f"images of {height} x {width} pixels are not tiled by patches of {self.patch_size}; resize them, this "
                f"backbone was trained at {self.image_size}"
            )
        patches, grid = timm_internals.embedded_patches(self.vit, x.to(self.dtype), keep_idx)  # (B, K, D)
        if is_masked is not None and mask_token is not None:
            patches = torch.where(is_masked[..., None], mask_token.to(patches.dtype), patches)
        prefix_positions, patch_positions = self._positions(grid)
        if patch_positions is not None:
            if keep_idx is not None:
                patch_positions = take_tokens(patch_positions.expand(len(patches), -1, -1), keep_idx)
            patches = patches + patch_positions
        tokens = torch.cat([*self._prefix(patches.shape[0], prefix_positions), patches], dim=1)  # (B, P + K, D)
        # Float32 position buffers promote a bf16 sum: back to the weights' type before the first block.
        tokens = timm_internals.enter_blocks(self.vit, tokens.to(self.dtype))
        return tokens, grid, timm_internals.rotations(self.vit, tokens, grid, keep_idx)

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Absolute positions of the prefix (1, P, D) and of the patches (1, N, D); None where there are none."""
        if self.vit.pos_embed is None:
            return None, None
        num_prefix = self._num_prefix_positions
        table = resample_positions(self.vit.pos_embed, self.grid, grid, num_prefix, self.position_resampling)
        return (table[:, :num_prefix] if num_prefix else None), table[:, num_prefix:]

    def _prefix(self, batch: int, positions: Tensor | None) -> list[Tensor]:
        """Class token and registers with their positions, (B, P, D) as a list of one; empty when there are none."""
        tokens = timm_internals.prefix(self.vit)  # (1, P, D)
        if tokens is None:
            return []
        if positions is not None:
            tokens = tokens + positions
        return [tokens.expand(batch, -1, -1)]

    def fitted(self, name: str, tensor: Tensor) -> Tensor | None:
        """Absolute positions of another square grid, resampled to this one's; sin-cos tables are computed anew."""
        own = self.vit.pos_embed
        num_prefix = self._num_prefix_positions
        if name != "pos_embed" or own is None or tensor.ndim != 3 or tensor.shape[-1] != own.shape[-1]:
            return None
        side = math.isqrt(max(0, tensor.shape[1] - num_prefix))
        if side == 0 or side**2 + num_prefix != tensor.shape[1]:
            return None
        return moved_positions(tensor, (side, side), self.grid, num_prefix)

    def fix_sincos_positions(self) -> None:
        """Replaces learned absolute positions by MAE's fixed sin-cos table; prefix tokens get zeros.

        The table is a float32 buffer of the parameter's name and shape: state-dict keys stay timm's, and engines that
        cast parameters to bf16 leave it alone. A model that only rotates (RoPE) has no table and stays as it is.
        """
        if self.vit.pos_embed is None:
            return
        table = sincos_positions(self.embed_dim, self.grid)  # (N, D)
        if self._num_prefix_positions:
            table = torch.cat([table.new_zeros(self.num_prefix_tokens, self.embed_dim), table])  # (P + N, D)
        device = self.vit.pos_embed.device
        del self.vit.pos_embed
        self.vit.register_buffer("pos_embed", table[None].to(device))

    def learned_positions(self) -> Tensor | None:
        """Absolute positions of the patches, (N, D), a view of the parameter; None where none are learned."""
        table = self.vit.pos_embed
        return table[0, self._num_prefix_positions :] if isinstance(table, nn.Parameter) else None

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


def _square(size: tuple[int, int], name: str, key: str) -> int:
    height, width = size
    if height != width:
        raise BackboneError(f"backbone {name!r}: {key} {height} x {width} is not square; give {key} as one number")
    return int(height)
