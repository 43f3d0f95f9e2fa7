"""Masked autoencoder: hide most patches, encode the rest, predict the hidden pixels.

K. He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv:2111.06377. Written from the formulas; the
values of the authors' code are in tests/golden/mae.json. Encoders that cannot leave patches out (windows, convolutions)
take the form of Z. Xie et al., "SimMIM", 2021, arXiv:2111.09886: hidden patches are covered by a learned token, all of
the image is encoded, and a linear head predicts the pixels. Target and loss are the same in both forms.
NOT here: fine-tuning and probes (`evaluation`).

Legend: B batch, C channels, p pixels per side of a maskable patch, N patches, K kept, M masked, L = p * p * C numbers
per patch.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from backbones.decoder import MaskedDecoder, PixelHead
from backbones.features import Features, take_tokens
from backbones.images.base import ImageEncoder
from backbones.images.initialization import draw_patch_projection
from backbones.images.vit import ViTBackbone
from backbones.initialization import TOKEN_STD, draw_matrices
from objectives.base import ImageObjective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.mae.config import MAEConfig
from objectives.masking import RandomMask, random_mask, random_noise
from objectives.parts.reconstruction_health import feature_metrics, reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, as_pixels, evaluating
from objectives.requirements import require, require_mask_ratio

__all__ = ["MAE", "patchify", "unpatchify"]

_MIN_COVERS = 4  # a side, where masking=token chooses the size of what it covers


class _Reconstruction(NamedTuple):
    """Predictions and what they are compared with."""

    prediction: Tensor  # (B, M, L) normalised like the target
    target: Tensor  # (B, M, L)
    center: Tensor  # (B, M, 1) with norm_pix_loss, else a 0: target = (pixels - center) / spread
    spread: Tensor  # (B, M, 1) with norm_pix_loss, else a 1
    mask: RandomMask
    features: Features  # of the visible patches, or of the covered images


class MAE(ImageObjective):
    """Mean squared error of the masked patches' pixels.

    Every sample masks equally many patches, so means over micro-batches and ranks equal the mean over the global batch.
    Where patches are dropped, the encoder runs on visible ones only, and the decoder's head on masked ones only.

    Attributes:
        drops: hidden patches are left out; else they are covered.
        patch_size, grid: pixels per side of a maskable patch, and (rows, columns) of them. Those of the backbone where
            patches are dropped.
    """

    Config: ClassVar[type] = MAEConfig
    decoder: MaskedDecoder | PixelHead

    def __init__(self, backbone: ImageEncoder, config: MAEConfig) -> None:
        """With dropped patches, re-initialises `backbone` as the paper does and fixes its positions to sin-cos.

        Raises:
            ObjectiveError: the backbone cannot leave patches out, masking leaves nothing to see or to predict, or
                masking=token comes with settings of a decoder.
            BackboneError: the decoder's width does not fit its heads or its positions.
        """
        super().__init__(backbone, config.name)
        if config.masking == "drop":
            require(backbone, "mae with masking=drop", "can_drop_patches")
        self.config = config
        self.drops = config.masking != "token" and backbone.can_drop_patches
        self.patch_size = _patch_size(backbone, config, self.drops)
        self.grid = (backbone.image_size // self.patch_size,) * 2
        self.num_patches = self.grid[0] * self.grid[1]
        require_mask_ratio(config.mask_ratio, self.num_patches)
        if not self.drops:
            _refuse_decoder(config)
            self.decoder = PixelHead(backbone, self.patch_size)
            return
        vit = cast(ViTBackbone, backbone)
        vit.fix_sincos_positions()
        self.decoder = MaskedDecoder(
            vit.embed_dim,
            vit.grid,
            vit.patch_size**2 * vit.in_chans,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )
        _initialize(self, vit)

    def views(self) -> list[dict[str, Any]]:
        """One crop, "image": random resized crop and flip."""
        return [
            {
                "name": "image",
                "size": self.backbone.image_size,
                "scale": tuple(self.config.crop_scale),
                "hflip": self.config.hflip,
            }
        ]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "image" (B, C, H, W) uint8 or float in [0, 1], and "seed" (B,) int64, from which masks are drawn;
                "noise" (B, N), if present, is used in place of the seed: the smallest values stay visible.
            progress: not used but for whether the step is logged.
        """
        result = self._reconstruct(self.backbone.normalized(batch["image"]), batch)
        with torch.autocast(result.prediction.device.type, enabled=False):
            squared_error = (result.prediction - result.target).square()  # (B, M, L)
            loss = squared_error.mean()
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= self._metrics(squared_error.detach(), result) | feature_metrics(result.features)
        return Output(loss, metrics)

    def _reconstruct(self, x: Tensor, batch: dict[str, Tensor]) -> _Reconstruction:
        """Masks, encodes and decodes normalised images (B, C, H, W); everything returned is at least float32."""
        noise = batch["noise"] if "noise" in batch else random_noise(batch["seed"], self.num_patches)
        mask = random_mask(noise, self.config.mask_ratio)
        features, prediction = self._predict(x, mask)  # (B, M, L)
        target = take_tokens(patchify(x, self.patch_size), mask.drop_idx)  # (B, M, L), never below float32
        center, spread = target.new_zeros(()), target.new_ones(())
        if self.config.norm_pix_loss:
            # Unbiased variance and eps inside the root are the paper's code; flat patches stay finite.
            variance, center = torch.var_mean(target, dim=-1, keepdim=True)
            spread = (variance + 1e-6).sqrt()
            target = (target - center) / spread
        return _Reconstruction(prediction.to(target.dtype), target, center, spread, mask, features)

    def _predict(self, x: Tensor, mask: RandomMask) -> tuple[Features, Tensor]:
        """Features of what is not masked of the images (B, C, H, W), and from these what is, (B, M, L)."""
        if isinstance(self.decoder, MaskedDecoder):
            visible = self.backbone.features(x, mask.keep_idx)
            return visible, self.decoder(visible, mask.keep_idx, mask.drop_idx)
        covered = self.decoder.cover(x, mask.is_masked.unflatten(1, self.grid))  # (B, C, H, W)
        features = self.backbone.features(covered)
        pixels = self.decoder(features)  # (B, C, H, W)
        return features, take_tokens(patchify(pixels, self.patch_size), mask.drop_idx)

    @torch.no_grad()
    def _metrics(self, squared_error: Tensor, result: _Reconstruction) -> dict[str, Tensor]:
        """Two readings of the loss that compare across settings; both stay on the device.

        "explained": 1 - loss / loss of predicting zero (the patch mean with norm_pix_loss, else the mean colour);
        0 = nothing learned. "masked_psnr_db": of masked pixels on the [0, 1] scale.
        """
        pixel_std = self.backbone.pixel_std.flatten().repeat(self.patch_size**2)  # (L,) channel last
        pixel_error = (squared_error * (result.spread * pixel_std).square()).mean()
        return {
            "explained": 1 - squared_error.mean() / result.target.square().mean(),
            "masked_psnr_db": -10 * pixel_error.clamp_min(1e-10).log10(),
        }

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Reconstructions no better than the mean of a patch, or features that are all alike."""
        return reconstruction_finding(metrics, progress)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "masked", "reconstruction" (hidden patches predicted, others kept) and "original"."""
        batch = {name: tensor[:MAX_PICTURES] for name, tensor in batch.items()}
        x = self.backbone.normalized(batch["image"])
        with evaluating(self):
            result = self._reconstruct(x, batch)

        patches = patchify(x, self.patch_size)  # (n, N, L)
        drop_idx = result.mask.drop_idx.unsqueeze(-1).expand_as(result.prediction)  # (n, M, L)
        filled = patches.scatter(1, drop_idx, result.prediction * result.spread + result.center)
        grey = (0.5 - self.backbone.pixel_mean) / self.backbone.pixel_std  # (C, 1, 1)
        hidden = result.mask.is_masked.unsqueeze(-1)  # (n, N, 1)
        masked = torch.where(hidden, patchify(grey.expand_as(x).to(x), self.patch_size), patches)
        shown = {"masked": masked, "reconstruction": filled, "original": patches}
        return {
            caption: as_pixels(self.backbone, unpatchify(tokens, self.grid, self.patch_size))
            for caption, tokens in shown.items()
        }


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images to patch vectors, pixel by pixel with the channel last: (B, C, H, W) -> (B, N, p * p * C)."""
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    split = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return split.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)  # (B, rows * columns, p * p * C)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Inverse of `patchify`: (B, N, p * p * C) -> (B, C, H, W)."""
    rows, columns = grid
    split = patches.reshape(len(patches), rows, columns, patch_size, patch_size, -1)
    return split.permute(0, 5, 1, 3, 2, 4).reshape(len(patches), -1, rows * patch_size, columns * patch_size)


def _patch_size(backbone: ImageEncoder, config: MAEConfig, drops: bool) -> int:
    """Pixels per side of a maskable patch: a token of the backbone; smaller where images have few of them.

    Raises:
        ObjectiveError: `mask_size` is given where patches are dropped, or does not divide the image, or a patch is one
            number, which cannot be normalised.
    """
    size = backbone.patch_size
    if not drops:
        divisors = [size for size in range(1, backbone.patch_size + 1) if backbone.patch_size % size == 0]
        size = max(size for size in divisors if size == 1 or backbone.image_size // size >= _MIN_COVERS)
        size = config.mask_size or size
    elif config.mask_size is not None:
        raise ObjectiveError(
            f"objective.mask_size {config.mask_size} is for masking=token; where patches are dropped they are the "
            f"backbone's ({size} px)"
        )
    if backbone.image_size % size:
        raise ObjectiveError(f"objective.mask_size {size} does not divide the image size {backbone.image_size}")
    if size**2 * backbone.in_chans == 1 and config.norm_pix_loss:
        raise ObjectiveError("objective.norm_pix_loss needs more than one number per patch; set it to false")
    return size


def _refuse_decoder(config: MAEConfig) -> None:
    """Hidden patches are covered, so there is no decoder: settings of one would be ignored.

    With masking=auto the backbone decides, and a recipe may serve both kinds: that is a warning.

    Raises:
        ObjectiveError: masking=token is asked for and a setting of the decoder is not its default.
    """
    names = ("decoder_dim", "decoder_depth", "decoder_heads")
    changed = [name for name in names if getattr(config, name) != getattr(MAEConfig, name)]
    given = [f"objective.{name}={getattr(config, name)}" for name in changed]
    if not given:
        return
    text = f"{', '.join(given)}: masking=token has no decoder, so that this changes nothing; leave it out"
    if config.masking == "token":
        raise ObjectiveError(text)
    warnings.warn(text, stacklevel=3)


def _initialize(objective: MAE, backbone: ViTBackbone) -> None:
    """The paper's initialisation: Xavier-uniform matrices, N(0, 0.02^2) tokens, plain norms.

    The patch projection keeps torch's default bias.
    """
    draw_matrices(objective.modules())
    draw_patch_projection(backbone)
    backbone.reset_tokens(TOKEN_STD)
    nn.init.normal_(objective.decoder.mask_token, std=TOKEN_STD)
