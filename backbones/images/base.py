"""What every image encoder is to objectives and evaluation: `preprocess`, `features`, and what it can do.

Two classes implement it: `backbones.images.vit.ViTBackbone` (plain ViTs, which can leave patches out) and
`backbones.images.timm_model.TimmBackbone` (any other timm model). An objective takes a `Backbone` and states what else
it needs with `objectives.requirements`:

    require(backbone, objective, "can_drop_patches")   `features(x, keep_idx)` runs on some patches only: plain ViTs
    require(backbone, objective, "has_cls")            `features(x).cls` is a token: most ViTs, CrossViT, VOLO, ConViT
    require(backbone, objective, "has_plain_blocks")   `features_of_blocks(x, blocks)` and `.vit`: plain ViTs
    require_sizes(backbone, objective, 96, 224)        `features` takes images of these sizes: plain ViTs, Swin,
                                                       ViTamin, convolutional models; `grid_at` counts the tokens

NOT here: lookup by name (`backbones.registry`), files (`backbones.io`).

Legend: B batch, C channels, N patch tokens, K kept patch tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from backbones.errors import BackboneError
from backbones.features import Features

__all__ = ["Backbone"]


class Backbone(nn.Module, ABC):
    """An image encoder around a timm model (`network`), with pixel normalisation and `Features` as output.

    Attributes:
        spec: plain JSON-able dict from which `backbones.registry.from_spec` builds the same architecture.
        image_size: pixels per side it is built for.
        patch_size: pixels per side of one token of the output (for Swin 32, though its stem has patches of 4).
        grid: (rows, columns) of output tokens at `image_size`.
        embed_dim, in_chans: D and C.
        can_drop_patches, has_cls, has_plain_blocks: see the top of this file.
    """

    can_drop_patches: ClassVar[bool] = False
    has_plain_blocks: ClassVar[bool] = False
    has_cls: bool
    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        *,
        library: str,
        name: str,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        in_chans: int,
        options: Mapping[str, Any],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """`library`, `name` and `options` say how the network was built and only go into `spec`.

        Raises:
            BackboneError: there is not one mean and one positive standard deviation per channel, or the image is not
                a whole number of patches wide.
        """
        super().__init__()
        if image_size % patch_size:
            raise BackboneError(
                f"backbone {name!r}: image_size {image_size} is not a multiple of patch_size {patch_size}"
            )
        self.image_size, self.patch_size = image_size, patch_size
        self.grid = (image_size // patch_size,) * 2
        self.embed_dim, self.in_chans = embed_dim, in_chans
        # Buffers, not parameters: bf16 engines cast parameters, and 8 bits of mantissa would quantise the pixels.
        for key, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != in_chans or (key == "pixel_std" and min(values) <= 0):
                raise BackboneError(
                    f"backbone {name!r}: {key} {list(values)} must hold {in_chans} "
                    f"{'positive ' if key == 'pixel_std' else ''}numbers, one for each of in_chans={in_chans}"
                )
            table = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)  # (C, 1, 1)
            self.register_buffer(key, table, persistent=False)
        self.spec: dict[str, Any] = {
            "library": library,
            "name": name,
            "image_size": image_size,
            "patch_size": patch_size,
            "in_chans": in_chans,
            "options": dict(options),
            "pixel_mean": [float(value) for value in pixel_mean],
            "pixel_std": [float(value) for value in pixel_std],
        }

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """The timm model, whose state dict is what is exported."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Type of the weights, hence of the output."""

    @abstractmethod
    def features(self, x: Tensor, keep_idx: Tensor | None = None) -> Features:
        """Encodes images, or only some patches of them.

        Args:
            x: (B, C, H, W) normalised pixels, of a size that `grid_at` allows.
            keep_idx: (B, K) int64 row-major patch indices: only these run, in this order. Needs `can_drop_patches`.

        Returns:
            Tokens after the final norm, in the type of the weights.

        Raises:
            BackboneError: the model does not take images of this size, or cannot leave patches out.
        """

    @abstractmethod
    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of output tokens for images of this size in pixels.

        Raises:
            BackboneError: the model does not take images of this size.
        """

    @abstractmethod
    def forward_features(self, x: Tensor) -> Any:
        """As timm's method of the same name."""

    @property
    def num_patches(self) -> int:
        """N at `image_size`."""
        return self.grid[0] * self.grid[1]

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

    def forward(self, x: Tensor) -> Any:
        """Same as `forward_features`."""
        return self.forward_features(x)

    def layer_ids(self) -> dict[str, int]:
        """Depth of each parameter of `network` as timm counts it: 0 stem, then by block, final norm with the last.

        Raises:
            BackboneError: timm does not count the layers of this model.
        """
        if not hasattr(self.network, "group_matcher"):
            raise BackboneError(
                f"timm does not say which layers backbone {self.spec['name']!r} has; set optimizer.layer_decay=1"
            )
        return group_parameters(self.network, self.network.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]

    def timm_state_dict(self) -> dict[str, Tensor]:
        """Weights under timm's own names: `timm.create_model(...).load_state_dict(...)` takes them strictly."""
        return dict(self.network.state_dict())
