"""Masked autoencoder of volumes: hide most cubes, encode the rest, predict the hidden voxels.

K. He et al., "Masked Autoencoders Are Scalable Vision Learners", 2021, arXiv:2111.06377, with cubes for patches: masks,
decoder and target are those of `objectives.mae`. Volumes are shorter than the input along some axes, more often than
not; what is padding is never scored. NOT here: the encoder (`backbones.voxels.vit`), probes (`evaluation`).

Legend: B batch, C channels, (X, Y, Z) voxels, p voxels along the edge of a cube, N cubes, K kept, M masked,
L = C * p^3 numbers per cube.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.decoder import MaskedDecoder
from backbones.encoder import Encoder
from backbones.features import Features, take_tokens
from backbones.initialization import TOKEN_STD, draw_matrices
from backbones.voxels.base import VoxelEncoder
from backbones.voxels.padding import inside
from backbones.voxels.patches import from_patches, to_patches
from backbones.voxels.reconstruction import LEFT_OUT
from objectives.base import Heads, Objective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.masking import RandomMask, random_mask, random_noise
from objectives.parts.padded_patches import center_and_spread, mean_over_samples
from objectives.parts.reconstruction_health import feature_metrics, reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating
from objectives.parts.volume_view import volume_view
from objectives.parts.voxel_pictures import volume_slices
from objectives.requirements import require_kind, require_mask_ratio
from objectives.volume_mae.config import VolumeMAEConfig

__all__ = ["VolumeMAE"]


class _Reconstruction(NamedTuple):
    """Predictions and what they are compared with, all at least float32."""

    prediction: Tensor  # (B, M, L) normalised like the target
    target: Tensor  # (B, M, L)
    is_scored: Tensor  # (B, M, L) 1 where there is data, 0 in padding
    center: Tensor  # (B, M, 1) with norm_pix_loss, else a 0: target = (voxels - center) / spread
    spread: Tensor  # (B, M, 1) with norm_pix_loss, else a 1
    mask: RandomMask
    features: Features  # of the visible cubes


class VolumeMAE(Objective):
    """Mean squared error of the hidden voxels that are no padding.

    How many these are differs from volume to volume. Each volume has a mean of its own, and the loss is the mean over
    volumes, so that it is the same however these are spread over micro-batches and ranks; without padding it is the
    mean over all hidden voxels. A volume whose hidden cubes are all padding counts as 0.
    """

    Config: ClassVar[type] = VolumeMAEConfig
    backbone: VoxelEncoder

    def __init__(self, backbone: Encoder, config: VolumeMAEConfig) -> None:
        """Around an encoder that can leave cubes out.

        Raises:
            ObjectiveError: the backbone is another one, or masking leaves nothing to see or to predict.
            BackboneError: the decoder's width does not fit its heads or its positions.
        """
        super().__init__()
        self.backbone = require_kind(backbone, VoxelEncoder, config.name)
        self.config = config
        if not self.backbone.can_drop_patches:
            raise ObjectiveError(
                f"objective {config.name!r} needs a backbone that can leave patches out; backbone "
                f"{backbone.spec['name']!r} cannot: use backbone.name=voxel_vit"
            )
        require_mask_ratio(config.mask_ratio, self.backbone.num_patches)
        self.edge = self.backbone.token_size
        num_outputs = self.backbone.in_chans * self.edge**3
        if num_outputs == 1 and config.norm_pix_loss:
            raise ObjectiveError("objective.norm_pix_loss needs more than one number per cube; set it to false")
        self.decoder = MaskedDecoder(
            self.backbone.embed_dim,
            self.backbone.grid,
            num_outputs,
            dim=config.decoder_dim,
            depth=config.decoder_depth,
            num_heads=config.decoder_heads,
        )
        draw_matrices(self.decoder.modules())
        nn.init.normal_(self.decoder.mask_token, std=TOKEN_STD)

    def views(self) -> list[dict[str, Any]]:
        """One volume, "volume", turned and mirrored, cut or padded to the backbone's size."""
        return [volume_view("volume", self.backbone, self.config)]

    def exported_heads(self) -> Heads | None:
        """The decoder, by which `masked_reconstruction` judges a checkpoint.

        None with norm_pix_loss: it predicts voxels of a cube whose own mean and deviation nobody knows who does not see
        it.
        """
        config = self.config
        if config.norm_pix_loss:
            return None
        sizes = {"dim": config.decoder_dim, "depth": config.decoder_depth, "num_heads": config.decoder_heads}
        tensors = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict(keep_vars=True).items()}
        return Heads({"decoder": {"form": LEFT_OUT, **sizes}}, tensors, from_start=True)

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "volume" (B, C, X, Y, Z) bytes or floats; "volume.size" (B, 3) int64, voxels along each axis that are
                no padding; "seed" (B,) int64, from which masks are drawn; "noise" (B, N), if present, is used in place
                of the seed: the smallest values stay visible.
            progress: not used but for whether the step is logged.
        """
        result = self._reconstruct(batch)
        with torch.autocast(result.target.device.type, enabled=False):
            squared_error = (result.prediction - result.target).square() * result.is_scored  # (B, M, L)
            loss = mean_over_samples(squared_error, result.is_scored)
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= self._metrics(squared_error.detach(), result) | feature_metrics(result.features)
        return Output(loss, metrics)

    def _reconstruct(self, batch: dict[str, Tensor]) -> _Reconstruction:
        x = self.backbone.normalized(batch["volume"], batch["volume.size"])  # (B, C, X, Y, Z)
        noise = batch["noise"] if "noise" in batch else random_noise(batch["seed"], self.backbone.num_patches)
        mask = random_mask(noise, self.config.mask_ratio)
        visible = self.backbone.features(x, mask.keep_idx)
        prediction = self.decoder(visible, mask.keep_idx, mask.drop_idx)  # (B, M, L)
        target = take_tokens(to_patches(x, self.edge), mask.drop_idx)  # (B, M, L)
        is_inside = inside(batch["volume.size"], x.shape[2:]).unsqueeze(1).expand_as(x).to(x.dtype)
        is_scored = take_tokens(to_patches(is_inside, self.edge), mask.drop_idx)  # (B, M, L)
        center, spread = target.new_zeros(()), target.new_ones(())
        if self.config.norm_pix_loss:
            center, spread = center_and_spread(target, is_scored)
            target = (target - center) / spread
        return _Reconstruction(prediction.to(target.dtype), target, is_scored, center, spread, mask, visible)

    @torch.no_grad()
    def _metrics(self, squared_error: Tensor, result: _Reconstruction) -> dict[str, Tensor]:
        """Two readings of the loss that compare across settings; both stay on the device.

        "explained": 1 - error / error of predicting the mean (of each cube with norm_pix_loss); 0 = nothing learned.
        "masked_psnr_db": of hidden voxels, where bytes span [0, 1], and so does a window.
        """
        target, is_scored, count = result.target, result.is_scored, result.is_scored.sum().clamp_min(1)
        mean = (target * is_scored).sum() / count
        constant = ((target - mean).square() * is_scored).sum().clamp_min(1e-12)
        std = self.backbone.voxel_std.flatten().repeat_interleave(self.edge**3)  # (L,), the channel first
        voxel_error = (squared_error * (result.spread * std).square()).sum() / count
        return {
            "explained": 1 - squared_error.sum() / constant,
            "masked_psnr_db": -10 * voxel_error.clamp_min(1e-10).log10(),
        }

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Reconstructions no better than the mean of a cube, or features that are all alike."""
        return reconstruction_finding(metrics, progress, "masked voxels", "their mean")

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "masked", "reconstruction" (hidden cubes predicted, others kept) and "original": the slice
        in the middle of the last axis, the values of a volume spread over grey.
        """
        batch = {name: tensor[:MAX_PICTURES] for name, tensor in batch.items()}
        with evaluating(self):
            result = self._reconstruct(batch)
        size = batch["volume.size"]
        x = self.backbone.normalized(batch["volume"], size)
        patches = to_patches(x, self.edge)  # (n, N, L)
        low, high = (getattr(patches, f"a{end}")((1, 2), keepdim=True) for end in ("min", "max"))  # (n, 1, 1)
        voxels = (result.prediction * result.spread + result.center) * result.is_scored  # (n, M, L)
        drop_idx = result.mask.drop_idx.unsqueeze(-1).expand_as(voxels)  # (n, M, L)
        filled = patches.scatter(1, drop_idx, voxels)
        masked = torch.where(result.mask.is_masked.unsqueeze(-1), (low + high) / 2, patches)
        return {
            caption: volume_slices(
                from_patches((shown - low) / (high - low).clamp_min(1e-6), self.backbone.grid, self.edge).clamp(0, 1),
                size[:, 2] // 2,
            )
            for caption, shown in (("masked", masked), ("reconstruction", filled), ("original", patches))
        }
