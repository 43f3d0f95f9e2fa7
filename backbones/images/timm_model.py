"""Any timm model that yields patch tokens or a feature map, behind the interface of `backbones.images.base`.

What `forward_features` returns differs from model to model; what is made of it here:

    a map, (B, D, rows, columns) or (B, rows, columns, D)   its cells are the tokens (Swin, FastViT, ConvNeXt, ...)
    tokens (B, P + N, D)     P prefix tokens, the first of which is the class token if there is one (ConViT, VOLO, ...)
    two branches (CrossViT)  fine tokens beside the coarse ones, brought to the fine grid bilinearly; the class token
                             is that of both branches side by side, which is what the model's own classifier sees

A norm that the model keeps in its classification head is applied to each token. Parameters that `features` does not
use (`unused`) are frozen: no gradient would ever reach them. NOT here: plain ViTs (`backbones.images.vit`).

Legend: B batch, C channels, N patch tokens, P prefix tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers import LayerNorm2d
from timm.models.hiera import Hiera
from torch import Tensor, nn
from torch.nn import functional

from backbones.errors import BackboneError
from backbones.features import ImageFeatures
from backbones.images.base import ImageEncoder
from backbones.norms import make_norms_exact

__all__ = ["TimmBackbone", "token_size"]


class TimmBackbone(ImageEncoder):
    """A timm model (as `.model`) of any architecture; patches cannot be left out.

    Attributes:
        model: the timm model, built with `num_classes=0`.
        unused: names of the parameters that do not enter `features`, which are frozen.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        library: str,
        name: str,
        image_size: int,
        options: Mapping[str, Any],
        in_chans: int,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        """Wraps `model` after a dry run at `image_size`; `library`, `name` and `options` only go into `spec`.

        Raises:
            BackboneError: the model does not run at `image_size`, or what it returns is neither tokens nor a map.
        """
        make_norms_exact(model)
        model.eval()  # the dry run must neither draw random numbers nor move the statistics of batch norms
        with torch.enable_grad():
            features = _dry_run(model, (image_size, image_size), in_chans, name)
            unused = _freeze_unused(model, features)
        super().__init__(
            library=library,
            name=name,
            image_size=image_size,
            patch_size=image_size // features.grid[0],
            embed_dim=features.patches.shape[-1],
            in_chans=in_chans,
            options=options,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.has_cls = features.cls is not None
        self.model, self.unused = model.train(), unused
        self._grids = {(image_size, image_size): features.grid}

    @property
    def network(self) -> nn.Module:
        """The timm model."""
        return self.model

    def features(self, x: Tensor, keep_idx: Tensor | None = None, *, layers: Sequence[int] = ()) -> ImageFeatures:
        """Encodes images, see `ImageEncoder.features`; all patches run, and no layer is read."""
        if keep_idx is not None:
            raise BackboneError(f"backbone {self.spec['name']!r} cannot leave patches out; it is not a plain ViT")
        if layers:
            raise BackboneError(f"backbone {self.spec['name']!r} is not a plain ViT, so its layers cannot be read")
        self.grid_at(int(x.shape[-2]), int(x.shape[-1]))  # tensors while a graph is recorded
        x = x.to(self.dtype)
        if self.dtype != torch.bfloat16:
            return _features(self.model, x)
        # Only parameters are bf16: many models mix them with tables of their own in float32.
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return _features(self.model, x).to(self.dtype)

    def grid_at(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of output tokens for images of this size in pixels; runs the model once per new size."""
        if (height, width) not in self._grids:
            was_training = self.model.training
            with torch.no_grad():
                features = _dry_run(self.model.eval(), (height, width), self.in_chans, self.spec["name"])
            self.model.train(was_training)
            self._grids[height, width] = features.grid
        return self._grids[height, width]

    def forward_features(self, x: Tensor) -> Any:
        """What timm's method of the same name returns."""
        return self.model.forward_features(x.to(self.dtype))  # type: ignore[operator]


def _dry_run(model: nn.Module, size: tuple[int, int], in_chans: int, name: str) -> ImageFeatures:
    """Features of one black image, for their shapes.

    Raises:
        BackboneError: the model does not take this size, or its output is not understood.
    """
    weight = next(model.parameters())
    image = torch.zeros(1, in_chans, *size, dtype=weight.dtype, device=weight.device)
    height, width = size
    try:
        features = _features(model, image)
    except BackboneError as error:
        raise BackboneError(f"backbone {name!r} at {height} x {width} px: {error}") from error
    except (AssertionError, RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BackboneError(f"backbone {name!r} does not take images of {height} x {width} px: {reason}") from error
    rows, columns = features.grid
    patch_size = token_size(model) or height // rows
    if (rows * patch_size, columns * patch_size) != size:
        raise BackboneError(
            f"backbone {name!r} makes {rows} x {columns} tokens of {height} x {width} px; give the image a side "
            f"that is a multiple of {patch_size}"
        )
    return features


def token_size(model: nn.Module) -> int | None:
    """Pixels per side of an output token as the model states it; None if it does not."""
    stages = list(getattr(model, "feature_info", []))
    return int(stages[0 if _has_branches(model) else -1]["reduction"]) if stages else None


def _freeze_unused(model: nn.Module, features: ImageFeatures) -> tuple[str, ...]:
    """Freezes and names the parameters that the features do not depend on; leaves no gradients behind."""
    outputs = [tensor for tensor in (features.patches, features.cls, features.registers) if tensor is not None]
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(
        torch.stack([output.sum() for output in outputs]).sum(), [p for _, p in trainable], allow_unused=True
    )
    unused = [pair for pair, gradient in zip(trainable, gradients, strict=True) if gradient is None]
    for _, parameter in unused:
        parameter.requires_grad_(False)
    return tuple(name for name, _ in unused)


def _features(model: nn.Module, x: Tensor) -> ImageFeatures:
    """Runs the model and sorts what it returns into `Features`."""
    if isinstance(model, Hiera):  # its last tokens are not in row-major order for every variant, its stage outputs are
        output = model.forward_features(x, return_intermediates=True)[1][-1]  # (B, rows, columns, D)
    else:
        output = model.forward_features(x)  # type: ignore[operator]
    if isinstance(output, list | tuple) and _has_branches(model):
        return _of_two_branches(*output)
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise BackboneError(f"its forward_features returns {shape}; tokens (B, N, D) or one feature map is needed")
    if output.ndim == 4:
        is_channel_last = isinstance(model, Hiera) or getattr(model, "output_fmt", "NCHW") == "NHWC"
        cells = output if is_channel_last else output.permute(0, 2, 3, 1)  # (B, rows, columns, D)
        return ImageFeatures(_normed(model, cells.flatten(1, 2)), None, None, (cells.shape[1], cells.shape[2]))
    tokens = _normed(model, output)  # (B, P + N, D)
    num_prefix, grid = _prefix_and_grid(model, tokens.shape[1], (x.shape[-2], x.shape[-1]))
    has_cls = num_prefix > 0 and getattr(model, "cls_token", None) is not None
    return ImageFeatures(
        tokens=tokens[:, num_prefix:],
        cls=tokens[:, 0] if has_cls else None,
        registers=tokens[:, int(has_cls) : num_prefix] if num_prefix > has_cls else None,
        grid=grid,
    )


def _prefix_and_grid(model: nn.Module, num_tokens: int, size: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """P and (rows, columns) of a token sequence for an image of `size` pixels.

    Raises:
        BackboneError: so many tokens are no prefix and a grid.
    """
    stated = getattr(model, "num_prefix_tokens", None)
    reduction = token_size(model)
    if reduction is not None:
        grid = (size[0] // reduction, size[1] // reduction)
    else:
        grid = (math.isqrt(num_tokens - (stated or 0)),) * 2
    num_prefix = num_tokens - grid[0] * grid[1]
    if num_prefix < 0 or (stated is not None and num_prefix != stated) or num_prefix > 8:
        raise BackboneError(f"its {num_tokens} tokens are not a grid of {grid[0]} x {grid[1]} patches")
    return num_prefix, grid


def _has_branches(model: nn.Module) -> bool:
    return getattr(model, "num_branches", 1) == 2


def _of_two_branches(fine: Tensor, coarse: Tensor) -> ImageFeatures:
    """CrossViT: tokens of both branches, (B, 1 + N, D) and (B, 1 + n, d) with square grids, as one grid of N."""
    rows, coarse_rows = math.isqrt(fine.shape[1] - 1), math.isqrt(coarse.shape[1] - 1)
    coarse_map = coarse[:, 1:].mT.unflatten(2, (coarse_rows, coarse_rows))  # (B, d, coarse_rows, coarse_rows)
    resized = functional.interpolate(coarse_map.float(), size=(rows, rows), mode="bilinear").to(coarse.dtype)
    return ImageFeatures(
        tokens=torch.cat([fine[:, 1:], resized.flatten(2).mT], dim=-1),  # (B, N, D + d)
        cls=torch.cat([fine[:, 0], coarse[:, 0]], dim=-1),  # (B, D + d)
        registers=None,
        grid=(rows, rows),
    )


def _normed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Tokens (B, N, D) after the norm that the model would apply to their mean in its head, if it has one."""
    head_norm = getattr(getattr(model, "head", None), "norm", None)
    for norm in (getattr(model, "fc_norm", None), head_norm):
        if isinstance(norm, nn.LayerNorm) and tuple(norm.normalized_shape) == (tokens.shape[-1],):
            if isinstance(norm, LayerNorm2d):
                return norm(tokens.mT.unsqueeze(-1)).squeeze(-1).mT  # (B, D, N, 1) inside
            return cast(Tensor, norm(tokens))
    return tokens
