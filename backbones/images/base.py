"""What every image encoder is to objectives and evaluation: `preprocess`, `features`, and what it can do.

Two classes implement it: `backbones.images.vit.ViTBackbone` (plain ViTs, which can leave patches out) and
`backbones.images.timm_model.TimmBackbone` (any other timm model). An objective takes an `ImageEncoder` and states what
else it needs with `objectives.requirements`:

    require(backbone, objective, "can_drop_patches")   `features(x, keep_idx)` runs on some patches only: plain ViTs
    require(backbone, objective, "has_cls")            `features(x).cls` is a token: most ViTs, CrossViT, VOLO, ConViT
    require(backbone, objective, "has_plain_blocks")   `features(x, layers=...)` reads inner layers: plain ViTs
    require_sizes(backbone, objective, 96, 224)        `features` takes images of these sizes: plain ViTs, Swin,
                                                       ViTamin, convolutional models; `grid_at` counts the tokens

NOT here: lookup by name (`backbones.registry`), files (`backbones.io`).

Legend: B batch, C channels, N patch tokens, K kept patch tokens, D width.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.models import group_parameters
from torch import Tensor, nn

from backbones.encoder import Encoder, Normalization
from backbones.errors import BackboneError
from backbones.features import ImageFeatures
from backbones.images.config import ImageConfig
from backbones.images.pixels import as_batch, require_unit_range

__all__ = ["ImageEncoder"]


class ImageEncoder(Encoder):
    """An image encoder around a timm model (`network`), with pixel normalization and `Features` as output.

    Attributes:
        spec: plain JSON-able dict from which `backbones.registry.from_spec` builds the same architecture.
        image_size: pixels per side it is built for.
        patch_size: pixels per side of one token of the output (for Swin 32, though its stem has patches of 4).
        grid: (rows, columns) of output tokens at `image_size`.
        embed_dim, in_chans: D and C.
        init: name of the weights that were drawn at first (`backbones.images.initialization`).
        can_drop_patches, has_cls, has_plain_blocks: see the top of this file.
        has_movable_positions: the coordinates of its rotary positions can be moved, see `packed_blocks.BlockDraw`.
        num_layers: how many layers `features` can read; 0 where it cannot.
        num_prefix_tokens: tokens before the patches in what `features` reads of a layer.
    """

    kind = "image"
    Config = ImageConfig
    can_drop_patches: ClassVar[bool] = False
    has_plain_blocks: ClassVar[bool] = False
    has_movable_positions: bool = False
    init: str = "timm"
    num_layers: int = 0
    num_prefix_tokens: int = 0
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
        # Buffers, not parameters: bf16 engines cast parameters, and 8 bits of mantissa would quantize the pixels.
        for key, values in (("pixel_mean", pixel_mean), ("pixel_std", pixel_std)):
            if len(values) != in_chans or (key == "pixel_std" and min(values) <= 0):
                raise BackboneError(
                    f"backbone {name!r}: {key} {list(values)} must hold {in_chans} "
                    f"{'positive ' if key == 'pixel_std' else ''}numbers, one for each of in_chans={in_chans}"
                )
            table = torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)  # (C, 1, 1)
            self.register_buffer(key, table, persistent=False)
        self._has_unit_range = all(0 <= value <= 1 for value in (*pixel_mean, *pixel_std))
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

    @abstractmethod
    def features(self, x: Tensor, keep_idx: Tensor | None = None, *, layers: Sequence[int] = ()) -> ImageFeatures:
        """Encodes images, or only some patches of them.

        Args:
            x: (B, C, H, W) normalized pixels, of a size that `grid_at` allows.
            keep_idx: (B, K) int64 row-major patch indices: only these run, in this order. Needs `can_drop_patches`.
            layers: after which layers the token stream is read as well, counted from 1 to `num_layers` and ascending.
                Needs `has_plain_blocks`.

        Returns:
            Tokens after the final norm, in the type of the weights.

        Raises:
            BackboneError: the model does not take images of this size, cannot leave patches out, or has no such layers.
        """

    def tokens(self, batch: Tensor) -> ImageFeatures:
        """Features of images (B, C, H, W), uint8 in 0 .. 255 or floating point in [0, 1]."""
        return self.features(self.preprocess(batch))

    def pooled(self, x: Tensor) -> Tensor:
        """One vector per image, (B, D): `features(x).pooled`; costs less after `prepare_pooled`.

        Args:
            x: (B, C, H, W) as for `features`.
        """
        return self.features(x).pooled

    def prepare_pooled(self) -> None:
        """Prepare for `pooled`, before anything else (an engine, a compiler) has changed the layers.

        Plain ViTs then compute no more of their last layer than the class token needs; others do nothing.
        """

    def read_out(self, stream: Tensor, grid: tuple[int, int]) -> ImageFeatures:
        """Features of a token stream of the encoder's own, such as a mean of `Features.levels`: after the final norm.

        Args:
            stream: (B, P + N, D) before the final norm, prefix tokens first.
            grid: of the images that it comes from.

        Raises:
            BackboneError: the model has no token streams that can be read.
        """
        raise BackboneError(f"backbone {self.spec['name']!r} is not a plain ViT, so its layers cannot be read")

    def attention(self, x: Tensor) -> Tensor | None:
        """How much the class token attends to each patch in the last layer.

        Args:
            x: as for `features`.

        Returns:
            (B, heads, N), each at most 1 in sum; None where there is no class token or no plain attention.
        """
        return None

    def last_keys(self, x: Tensor) -> Tensor | None:
        """What patches are compared by in the last layer: keys of its attention, the heads side by side.

        Args:
            x: as for `features`.

        Returns:
            (B, N, D); None where attention is of another kind than timm's plain one.
        """
        return None

    def reset_tokens(self, std: float) -> None:
        """Draws class token and registers anew from N(0, std^2); nothing where there are none."""
        for name in ("cls_token", "reg_token"):
            token = getattr(self.network, name, None)
            if isinstance(token, nn.Parameter):
                nn.init.normal_(token, std=std)

    def fix_sincos_positions(self) -> None:
        """Replaces learned positions by MAE's fixed sin-cos table.

        Raises:
            BackboneError: the positions of the model are not a table for its patches.
        """
        raise BackboneError(f"backbone {self.spec['name']!r} is not a plain ViT, so its positions stay its own")

    def resample_positions_as(self, method: str) -> None:
        """Chooses how absolute positions follow images of another size, see `backbones.images.positions`.

        Nothing happens for models that bring their own way, which are all but plain ViTs.
        """

    @abstractmethod
    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of output tokens for images of this size in pixels.

        Raises:
            BackboneError: the model does not take images of this size.
        """

    def grid_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """(rows, columns) of an image (C, H, W); see `Encoder`."""
        return self.grid_at(shape[1], shape[2])

    @abstractmethod
    def forward_features(self, x: Tensor) -> Any:
        """As timm's method of the same name."""

    @property
    def num_patches(self) -> int:
        """N at `image_size`."""
        return self.grid[0] * self.grid[1]

    def preprocess(self, images: Any) -> Tensor:
        """Pictures to network input: (image - mean) / std in float32. Nothing is resized.

        Args:
            images: tensor or array, uint8 in 0 .. 255 or floating point in [0, 1], (B, C, H, W), (C, H, W) or with
                channels last; a PIL image; or a sequence of these, all of one size. See `backbones.images.pixels`.
                A backbone whose `pixel_mean` lies outside [0, 1] was trained on other units and takes floats of any
                range.

        Returns:
            (B, C, H, W) float32, or float64 when `images` is float64; B is 1 for one picture.

        Raises:
            BackboneError: another type, range or number of channels.
        """
        batch = as_batch(images, self.in_chans, self.pixel_mean.device)
        # A compiled step is not cut in two for it.
        if batch.is_floating_point() and self._has_unit_range and not torch.compiler.is_compiling():
            require_unit_range(batch)
        return self.normalized(batch)

    def normalized(self, images: Tensor) -> Tensor:
        """`preprocess` of a batch that a stream has made; its values are not looked at, which a GPU would wait for.

        Args:
            images: (..., C, H, W), uint8 in 0 .. 255 or floating point in [0, 1].

        Returns:
            The same shape in float32, or float64 when `images` is float64.
        """
        dtype = torch.promote_types(images.dtype, torch.float32)
        mean, scale = self.pixel_mean.to(dtype), self.pixel_std.to(dtype).reciprocal()
        # Few passes, and in place: each over new memory takes twice as long, and a division twice a multiplication.
        if images.dtype == torch.uint8:
            return images.to(dtype).sub_(255 * mean).mul_(scale / 255)
        return (images.to(dtype) - mean).mul_(scale)

    def normalization(self, kind: str) -> Normalization | None:
        """Of images; see `Encoder`."""
        return Normalization(self.normalized, ("pixel_mean", "pixel_std")) if kind == "image" else None

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
        """`weights`, whose names are timm's: `timm.create_model(...).load_state_dict(...)` takes them strictly."""
        return self.weights()
