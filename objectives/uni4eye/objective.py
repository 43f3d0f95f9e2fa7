"""Masked autoencoder of images and volumes in one encoder: hidden patches are predicted, and the edges in them.

L. Cai et al., "Uni4Eye: Unified 2D and 3D Self-supervised Pre-training via Masked Image Modeling Transformer for
Ophthalmic Image Classification", 2022, arXiv:2203.04614. The authors alternate between the two kinds of data by epochs;
here every step has both, an image and a volume per sample, so that no part of the model ever waits for its data.
NOT here: the encoder (`backbones.voxels.unified`), the data side by side (`data.mixture_by=join`).

Legend: B batch, C channels, N patches, K kept, M masked, L numbers per patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from backbones.encoder import Encoder
from backbones.features import Features, take_tokens
from backbones.voxels.padding import inside
from backbones.voxels.patches import from_patches, to_patches
from backbones.voxels.unified import UnifiedVit, image_patches
from objectives.base import Objective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.masking import RandomMask, random_mask, random_noise
from objectives.parts.padded_patches import center_and_spread, mean_over_samples
from objectives.parts.reconstruction_health import feature_metrics, reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating, to_rgb
from objectives.parts.volume_view import volume_view
from objectives.parts.voxel_pictures import volume_slices
from objectives.requirements import require_mask_ratio
from objectives.uni4eye.config import Uni4EyeConfig
from objectives.uni4eye.decoder import DualDecoder
from objectives.uni4eye.gradient_map import gradient_map

__all__ = ["Uni4Eye", "masked_error"]

_KINDS = ("image", "volume")


class _Reconstruction(NamedTuple):
    """Predictions of one kind of data and what they are compared with, all at least float32."""

    whole: dict[str, Tensor]  # by branch (B, C or 1, ...): normalized values, and their gradient map
    prediction: dict[str, Tensor]  # by branch (B, M, L)
    target: dict[str, Tensor]  # by branch (B, M, L)
    is_scored: dict[str, Tensor]  # by branch (B, M, L): 1 where there is data, 0 in padding
    mask: RandomMask
    features: Features  # of the visible patches


class Uni4Eye(Objective):
    """Mean squared error of hidden patches, of images and volumes and of their gradient maps.

    Of volumes padding is not scored: each has a mean of its own over what is, and the loss is the mean over volumes, so
    that it is the same however these are spread over micro-batches and ranks.
    """

    Config: ClassVar[type] = Uni4EyeConfig
    backbone: UnifiedVit

    def __init__(self, backbone: Encoder, config: Uni4EyeConfig) -> None:
        """Around an encoder of both kinds.

        Raises:
            ObjectiveError: the backbone is another one, or masking leaves nothing to see or to predict.
            BackboneError: the decoders' width does not fit their heads or their positions.
        """
        super().__init__()
        if not isinstance(backbone, UnifiedVit):
            raise ObjectiveError(
                f"objective {config.name!r} needs a backbone of images and volumes; backbone "
                f"{backbone.spec['name']!r} is none: use backbone.kind=voxels backbone.name=unified_vit"
            )
        self.backbone, self.config = backbone, config
        grids = {"image": backbone.image_grid, "volume": backbone.grid}
        for grid in grids.values():
            require_mask_ratio(config.mask_ratio, torch.Size(grid).numel())
        pixels, voxels = backbone.image_patch_size**2, backbone.token_size**3
        contents = {"image": backbone.image_chans * pixels, "volume": backbone.in_chans * voxels}
        outputs = {"content": contents, "gradient": {"image": pixels, "volume": voxels}}
        if config.gradient_weight == 0:
            del outputs["gradient"]  # a decoder that nothing asks for would not be trained
        self.decoder = DualDecoder(
            backbone.embed_dim,
            grids,
            outputs,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )

    def views(self) -> list[dict[str, Any]]:
        """ "image": a random resized crop; "volume": turned and mirrored, cut or padded to the backbone's size."""
        config = self.config
        return [
            {
                "name": "image",
                "size": self.backbone.image_size,
                "field": config.image_field,
                "scale": tuple(config.crop_scale),
                "hflip": config.hflip,
            },
            volume_view("volume", self.backbone, config),
        ]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "image" (B, C, H, W) and "volume" (B, C, X, Y, Z), bytes or floats; "volume.size" (B, 3) int64,
                voxels along each axis that are no padding; "seed" (B,) int64, from which masks are drawn.
            progress: not used but for whether the step is logged.
        """
        found = {kind: self._reconstruct(kind, batch, number) for number, kind in enumerate(_KINDS)}
        weights = {"image": 1 - self.config.volume_weight, "volume": self.config.volume_weight}
        errors: dict[tuple[str, str], Tensor] = {}
        with torch.autocast(batch["image"].device.type, enabled=False):
            for kind, result in found.items():
                for branch, prediction in result.prediction.items():
                    target, is_scored = result.target[branch], result.is_scored[branch]
                    errors[kind, branch] = masked_error(prediction, target, is_scored)
            loss = sum(
                weights[kind] * error * (self.config.gradient_weight if branch == "gradient" else 1)
                for (kind, branch), error in errors.items()
            )
        assert isinstance(loss, Tensor)
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= {f"{kind}_{branch}": error.detach() for (kind, branch), error in errors.items()}
            metrics |= {f"{kind}_explained": _explained(result) for kind, result in found.items()}
            metrics |= {"explained": torch.stack([metrics[f"{kind}_explained"] for kind in _KINDS]).mean()}
            metrics |= feature_metrics(found["volume"].features)
        return Output(loss, metrics)

    def _reconstruct(self, kind: str, batch: dict[str, Tensor], stream: int) -> _Reconstruction:
        """Masks, encodes and decodes one kind of data; the image and the volume of a sample have masks of their own."""
        encode = self.backbone.image_features if kind == "image" else self.backbone.features
        whole, is_inside = self._whole(kind, batch)
        noise = random_noise(batch["seed"], torch.Size(self._grid(kind)).numel(), stream)
        mask = random_mask(noise, self.config.mask_ratio)
        visible = encode(whole["content"], mask.keep_idx)
        prediction = self.decoder(kind, visible, mask.keep_idx, mask.drop_idx)

        target = {branch: take_tokens(self._patches(kind, whole[branch]), mask.drop_idx) for branch in prediction}
        is_scored = {
            branch: take_tokens(self._patches(kind, is_inside.expand_as(whole[branch])), mask.drop_idx)
            for branch in prediction
        }
        if self.config.norm_pix_loss:
            center, spread = center_and_spread(target["content"], is_scored["content"])
            target["content"] = (target["content"] - center) / spread
        prediction = {branch: values.to(target[branch].dtype) for branch, values in prediction.items()}
        return _Reconstruction(whole, prediction, target, is_scored, mask, visible)

    def _whole(self, kind: str, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What is to be predicted, by branch, and (B, 1, ...) where it is data: 1, and 0 in padding."""
        backbone = self.backbone
        if kind == "image":
            x = backbone.normalized_images(batch["image"])
            values = x * backbone.pixel_std + backbone.pixel_mean  # in [0, 1]
            return {"content": x, "gradient": gradient_map(values)}, torch.ones_like(x[:, :1])
        values = backbone.scaled(batch["volume"], batch["volume.size"])
        x = backbone.standardized(values)
        is_inside = inside(batch["volume.size"], x.shape[2:]).unsqueeze(1).to(x.dtype)
        return {"content": x, "gradient": gradient_map(values)}, is_inside

    def _grid(self, kind: str) -> tuple[int, ...]:
        return self.backbone.image_grid if kind == "image" else self.backbone.grid

    def _patches(self, kind: str, values: Tensor) -> Tensor:
        """Images or volumes as patches (B, N, L)."""
        if kind == "image":
            return image_patches(values, self.backbone.image_patch_size)
        return to_patches(values, self.backbone.token_size)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Reconstructions no better than the mean, or features that are all alike."""
        return reconstruction_finding(metrics, progress, "masked patches", "their mean")

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 images, slices in the middle of volumes, and gradient maps of either, as they are and predicted.

        Patches that were visible are as they are; with norm_pix_loss only gradient maps are shown predicted.
        """
        batch = {name: tensor[:MAX_PICTURES] for name, tensor in batch.items()}
        shown = {}
        for number, kind in enumerate(_KINDS):
            with evaluating(self):
                result = self._reconstruct(kind, batch, number)
            for branch, prediction in result.prediction.items():
                name = kind if branch == "content" else f"{kind} {branch}"
                shown[name] = result.whole[branch]
                if branch == "gradient" or not self.config.norm_pix_loss:
                    patches = self._patches(kind, result.whole[branch])  # (n, N, L)
                    drop_idx = result.mask.drop_idx.unsqueeze(-1).expand_as(prediction)  # (n, M, L)
                    shown[f"{name}, predicted"] = self._joined(kind, patches.scatter(1, drop_idx, prediction))
        middle = batch["volume.size"][:, 2] // 2
        return {
            name: to_rgb(_spread(values)) if values.ndim == 4 else volume_slices(_spread(values), middle)
            for name, values in shown.items()
        }

    def _joined(self, kind: str, patches: Tensor) -> Tensor:
        """Inverse of `_patches`."""
        if kind == "volume":
            return from_patches(patches, self.backbone.grid, self.backbone.token_size)
        (rows, columns), size = self.backbone.image_grid, self.backbone.image_patch_size
        split = patches.reshape(len(patches), rows, columns, -1, size, size).permute(0, 3, 1, 4, 2, 5)
        return split.reshape(len(patches), -1, rows * size, columns * size)


def masked_error(prediction: Tensor, target: Tensor, is_scored: Tensor) -> Tensor:
    """Mean over samples of the mean squared error over what is scored of each; one of which nothing is counts as 0.

    Args:
        prediction, target: (B, M, L).
        is_scored: (B, M, L), 1 or 0.
    """
    return mean_over_samples((prediction - target).square() * is_scored, is_scored)


@torch.no_grad()
def _explained(result: _Reconstruction) -> Tensor:
    """1 - error / error of predicting the mean of all hidden patches; 0 = nothing learned."""
    target, is_scored = result.target["content"], result.is_scored["content"]
    mean = (target * is_scored).sum() / is_scored.sum().clamp_min(1)
    constant = ((target - mean).square() * is_scored).sum().clamp_min(1e-12)
    return 1 - ((result.prediction["content"] - target).square() * is_scored).sum() / constant


def _spread(values: Tensor) -> Tensor:
    """The range of each sample's values to [0, 1]."""
    flat = values.float().flatten(1)
    low, high = flat.amin(1), flat.amax(1)
    shape = (-1, *[1] * (values.ndim - 1))
    return ((values.float() - low.view(shape)) / (high - low).clamp_min(1e-6).view(shape)).clamp(0, 1)
