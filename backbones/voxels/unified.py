"""A plain vision transformer of volumes and of images: one encoder with a patch embedding for each.

L. Cai et al., "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer for
Ophthalmic Image Classification", 2022, arXiv:2203.04614, section 2.1. The number of axes of a batch says which it is.
Everything behind the embedding is shared; positions are fixed sin-cos tables, of two and of three axes. There is no
class token.

Legend: B batch, C channels, N tokens, K kept tokens, D width, p pixels per side of an image's patch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from backbones.encoder import Normalization
from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.images.positions import sincos_positions
from backbones.initialization import draw_matrices
from backbones.voxels.config import UnifiedVitConfig
from backbones.voxels.vit import VoxelVit

__all__ = ["UnifiedVit", "image_patches"]


class UnifiedVit(VoxelVit):
    """A `VoxelVit` that also encodes images.

    Attributes:
        image_size, image_patch_size, image_chans: of the images that it is trained on.
        image_grid: (rows, columns) of patches of such an image.
    """

    Config = UnifiedVitConfig
    pixel_mean: Tensor
    pixel_std: Tensor
    image_positions: Tensor

    def __init__(self, config: UnifiedVitConfig) -> None:
        """A randomly initialized encoder; draws from torch's global generator.

        Raises:
            BackboneError: patches do not tile images, the width is no multiple of 4, there is not one mean and one
                deviation per channel, or as `VoxelVit` says.
        """
        super().__init__(config)
        self.image_size, self.image_patch_size = config.image_size, config.image_patch_size
        self.image_chans = config.image_chans
        rows, columns = self.image_grid_at(config.image_size, config.image_size)
        self.image_grid = (rows, columns)
        for key, values in (("pixel_mean", config.pixel_mean), ("pixel_std", config.pixel_std)):
            if len(values) != config.image_chans or (key == "pixel_std" and min(values) <= 0):
                raise BackboneError(
                    f"backbone {config.name!r}: {key} {list(values)} must hold {config.image_chans} "
                    f"{'positive ' if key == 'pixel_std' else ''}numbers, one for each of image_chans"
                )
            self.register_buffer(key, torch.tensor(values).view(-1, 1, 1), persistent=False)  # (C, 1, 1)
        self.image_embed = nn.Linear(config.image_chans * config.image_patch_size**2, config.embed_dim)
        positions = sincos_positions(config.embed_dim, self.image_grid)  # (N, D)
        self.register_buffer("image_positions", positions, persistent=False)
        draw_matrices([self.image_embed])

    def tokens(self, batch: Tensor | Mapping[str, Tensor]) -> Features:
        """Features of volumes, see `VoxelEncoder`, or of images (B, C, H, W) as bytes or floats in [0, 1].

        Raises:
            BackboneError: another shape or number of channels.
        """
        if isinstance(batch, Tensor) and batch.ndim == 4:
            return self.image_features(self.normalized_images(batch))
        return super().tokens(batch)

    def image_features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Encodes images, or only some patches of them.

        Args:
            x: (B, C, H, W) normalized pixels, sides multiples of the patch size.
            keep_idx: (B, K) int64 row-major patch indices: only these run, in this order.

        Raises:
            BackboneError: patches do not tile images of this size.
        """
        grid = self.image_grid_at(*x.shape[2:])
        table = self.image_positions if grid == self.image_grid else self._table(grid)
        patches, positions = image_patches(x, self.image_patch_size), table.expand(len(x), -1, -1)
        if keep_idx is not None:
            patches, positions = take_tokens(patches, keep_idx), take_tokens(positions, keep_idx)  # (B, K, ...)
        return self.encoded(self.image_embed(patches.to(self.dtype)) + positions, grid)

    def image_grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of patches of images of this size.

        Raises:
            BackboneError: patches do not tile them.
        """
        size = self.image_patch_size
        if height % size or width % size:
            raise BackboneError(
                f"backbone {self.spec['name']!r}: images of {height} x {width} pixels are not tiled by patches of "
                f"{size}; change image_size or image_patch_size"
            )
        return height // size, width // size

    def normalized_images(self, images: Tensor) -> Tensor:
        """(images - mean) / deviation of bytes, or of floats in [0, 1]: (B, C, H, W), in float32 at least.

        Raises:
            BackboneError: another shape or number of channels.
        """
        if images.ndim != 4 or images.shape[1] != self.image_chans:
            raise BackboneError(
                f"backbone {self.spec['name']!r} takes images (B, {self.image_chans}, H, W), not "
                f"{tuple(images.shape)}; set backbone.image_chans to the channels of the data"
            )
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        values = values / 255 if images.dtype == torch.uint8 else values
        return (values - self.pixel_mean.to(values.dtype)) / self.pixel_std.to(values.dtype)

    def normalization(self, kind: str) -> Normalization | None:
        """Of images and of volumes; see `Encoder`."""
        if kind == "image":
            return Normalization(self.normalized_images, ("pixel_mean", "pixel_std"))
        return super().normalization(kind)

    def channels_of(self, kind: str) -> int:
        """Of images and of volumes; see `Encoder`."""
        return self.image_chans if kind == "image" else self.in_chans

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Tokens along each axis of an image (C, H, W) or a volume (C, X, Y, Z); see `Encoder`."""
        return self.image_grid_at(shape[1], shape[2]) if len(shape) == 3 else super().grid_of(shape)

    def _table(self, grid: tuple[int, int]) -> Tensor:
        return sincos_positions(self.embed_dim, grid).to(self.image_positions)


def image_patches(images: Tensor, patch_size: int) -> Tensor:
    """Images (B, C, H, W), whose sides are multiples of p, as row-major patches (B, N, C p p), the channel first."""
    rows, columns = images.shape[2] // patch_size, images.shape[3] // patch_size
    split = images.reshape(*images.shape[:2], rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 1, 3, 5).reshape(len(images), rows * columns, -1)
