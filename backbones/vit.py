"""timm's plain vision transformers behind one interface: `preprocess`, `features`, masking as an argument.

A plain ViT embeds each image patch alone and keeps one token per patch through every block, so that patches can be
left out before the first block (MAE, He et al. 2021, arXiv:2111.06377). timm's `VisionTransformer` (with or without
class token and registers) and `Eva` (absolute and/or rotary positions: EVA-02, DINOv3, ViT
with RoPE) are such models. NOT here: windowed and hierarchical models; lookup by name (`backbones.registry`).

Legend: B batch, C channels, N patch tokens, K kept patch tokens, P prefix tokens (class token, registers), D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import PatchEmbed, apply_keep_indices_nlc, resample_abs_pos_embed
from timm.models import group_parameters
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.positions import sincos_positions

__all__ = ["ViTBackbone"]


class ViTBackbone(nn.Module):
    """A timm ViT (as `.vit`) with pixel normalisation and `Features` as output.

    Attributes:
        vit: the timm model, built with `num_classes=0, global_pool="", dynamic_img_size=True`.
        spec: plain JSON-able dict from which `backbones.registry.from_spec` builds the same architecture.
        image_size, patch_size: pixels per side. grid: (rows, columns) of patches at `image_size`.
        embed_dim, in_chans, num_prefix_tokens: D, C and P.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        vit: nn.Module,
        *,
        library: str,
        name: str,
        options: Mapping[str, Any],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """Wraps `vit`; `library`, `name` and `options` say how it was built and only go into `spec`.

        Raises:
            BackboneError: the model is not a plain ViT on square images, or there is not one mean and one positive
                standard deviation per channel.
        """
        super().__init__()
        self.vit = _require_plain_vit(vit, name)
        embed = cast(PatchEmbed, self.vit.patch_embed)
        self.image_size = _square(embed.img_size, name, "image_size")
        self.patch_size = _square(embed.patch_size, name, "patch_size")
        if self.image_size % self.patch_size:
            raise BackboneError(
                f"backbone {name!r}: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}"
            )
        self.grid = (self.image_size // self.patch_size,) * 2
        self.embed_dim = int(self.vit.embed_dim)
        self.in_chans = int(embed.proj.in_channels)
        self.num_prefix_tokens = int(self.vit.num_prefix_tokens)
        # Buffers, not parameters: bf16 engines cast parameters, and 8 bits of mantissa would quantise the pixels.
        for key, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != self.in_chans or (key == "pixel_std" and min(values) <= 0):
                raise BackboneError(
                    f"backbone {name!r}: {key} {list(values)} must hold {self.in_chans} "
                    f"{'positive ' if key == 'pixel_std' else ''}numbers, one for each of in_chans={self.in_chans}"
                )
            table = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)  # (C, 1, 1)
            self.register_buffer(key, table, persistent=False)
        self.spec: dict[str, Any] = {
            "library": library,
            "name": name,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "in_chans": self.in_chans,
            "options": dict(options),
            "pixel_mean": [float(value) for value in pixel_mean],
            "pixel_std": [float(value) for value in pixel_std],
        }

    @property
    def num_patches(self) -> int:
        """N at `image_size`."""
        return self.grid[0] * self.grid[1]

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the token stream and of the output."""
        return self.vit.patch_embed.proj.weight.dtype

    def preprocess(self, images: Tensor) -> Tensor:
        """Pixels to network input: (image - mean) / std in float32.

        Args:
            images: (B, C, H, W), uint8 in 0 .. 255 or floating point in [0, 1].

        Returns:
            (B, C, H, W) float32, or float64 when `images` is float64.
        """
        if images.dtype == torch.uint8:
            images = images.float() / 255
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        return (images - self.pixel_mean) / self.pixel_std

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

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the final norm, (B, P + N, D), as timm's method of the same name."""
        return self._encode(x, None)[0]

    def forward(self, x: Tensor) -> Tensor:
        """Same as `forward_features`."""
        return self.forward_features(x)

    def _encode(self, x: Tensor, keep_idx: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
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
        return vit.norm(self._blocks(tokens, self._rotations(tokens, grid, keep_idx))), grid

    def _positions(self, grid: tuple[int, int]) -> tuple[Tensor | None, Tensor | None]:
        """Absolute positions of the prefix (1, P, D) and of the patches (1, N, D); None where there are none."""
        if self.vit.pos_embed is None:
            return None, None
        num_prefix = 0 if self.vit.no_embed_class else self.num_prefix_tokens
        table = resample_abs_pos_embed(
            self.vit.pos_embed, new_size=list(grid), old_size=list(self.grid), num_prefix_tokens=num_prefix
        )
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

    def _blocks(self, tokens: Tensor, rotations: Tensor | None) -> Tensor:
        recompute = self.vit.grad_checkpointing and torch.is_grad_enabled()
        for depth, block in enumerate(self.vit.blocks):
            extra: dict[str, Any] = {}
            if rotations is not None:
                extra["rope"] = rotations[depth] if self.vit.rope_mixed else rotations
            tokens = checkpoint(block, tokens, use_reentrant=False, **extra) if recompute else block(tokens, **extra)
        return tokens

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

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter of `.vit` as timm counts it: 0 stem, then one per block, final norm with the last."""
        return group_parameters(self.vit, self.vit.group_matcher(coarse=False), reverse=True)

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Weights under timm's own names: `timm.create_model(...).load_state_dict(...)` takes them strictly."""
        return dict(self.vit.state_dict())


def _require_plain_vit(vit: nn.Module, name: str) -> Any:
    """`vit` itself, typed loosely because timm's two ViT classes share attributes but no base class."""
    if not isinstance(vit, VisionTransformer | Eva) or type(vit.patch_embed) is not PatchEmbed:
        stem = f" with a {type(vit.patch_embed).__name__} stem" if hasattr(vit, "patch_embed") else ""
        raise BackboneError(
            f"backbone {name!r} is not a plain ViT ({type(vit).__name__}{stem}): masked patches can only be left out "
            "when each patch is embedded alone and keeps its own token; use for example vit_tiny_patch16_224"
        )
    return vit


def _square(size: tuple[int, int], name: str, key: str) -> int:
    height, width = size
    if height != width:
        raise BackboneError(f"backbone {name!r}: {key} {height} x {width} is not square; give {key} as one number")
    return int(height)
