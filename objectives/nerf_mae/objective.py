"""Masked autoencoder of radiance grids: cover blocks of a grid, predict color and opacity of all its voxels.

M. Z. Irshad et al., "NeRF-MAE: Masked AutoEncoders for Self-Supervised 3D Representation Learning for Neural Radiance
Fields", ECCV 2024, arXiv:2404.01300. Written from the formulas; the values of the authors' code are in
tests/golden/nerf_mae.json. Windows need all tokens, so covered ones are replaced by a learned token, after the
positions, and nothing is left out. NOT here: the encoder (`backbones.voxels.swin`), how grids come from photos
(`pretrain data radiance`).

Legend: B batch, (X, Y, Z) voxels, (A, B', C') tokens of the first stage, n blocks of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from backbones.features import Features
from backbones.precision import at_least_float32
from backbones.voxels.base import Cover, StagedVoxelEncoder, VoxelEncoder
from backbones.voxels.decoder import VoxelDecoder
from backbones.voxels.padding import inside
from backbones.voxels.reconstruction import COVERED
from objectives.base import Heads, Objective, Output, Progress
from objectives.distributed import mean_over_ranks, num_ranks
from objectives.errors import ObjectiveError
from objectives.masking import uniform
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.parts.reconstruction_health import feature_metrics, reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating
from objectives.parts.volume_view import volume_view
from objectives.parts.voxel_pictures import front_views, grid_slices
from objectives.requirements import require_kind

__all__ = ["NeRFMAE", "VoxelLoss", "covered_tokens", "voxel_loss"]

_MASKS, _DROPS = 0, 1  # streams of random numbers
_STD = 0.02


class VoxelLoss(NamedTuple):
    """Numerators and denominators of both terms for each grid, (B,) each, at least float32."""

    rgb_error: Tensor  # squared, over the three channels and all occupied voxels
    num_occupied: Tensor
    alpha_error: Tensor  # squared, over all covered voxels inside the grid
    num_scored: Tensor


class _Reconstruction(NamedTuple):
    prediction: Tensor  # (B, 4, X, Y, Z) colors and the logit of alpha
    target: Tensor  # (B, 4, X, Y, Z) colors and alpha in [0, 1], zeros outside the grid
    is_covered: Tensor  # (B, X, Y, Z) bool
    is_inside: Tensor  # (B, X, Y, Z) bool: no padding
    features: Features

    @property
    def is_scored(self) -> Tensor:
        """(B, X, Y, Z) bool: voxels whose alpha is to be predicted."""
        return self.is_covered & self.is_inside


class NeRFMAE(Objective):
    """Squared error of colors where something is, plus squared error of alpha where it was covered.

    Which blocks of a grid are covered follows from the seed of its sample (with mask_per=sample), so losses do not
    depend on how samples are spread over workers. How many are covered, and how many voxels are occupied, differs from
    grid to grid: with reduction=voxel each term is one quotient over the micro-batches of all ranks, exactly that of
    one process, but accumulated micro-batches have a quotient each. With reduction=sample each grid has its own
    quotients, and their mean is the same however samples are spread.

    Attributes:
        mask_grid: blocks along each axis; tokens beyond the last whole block are never covered.
    """

    Config: ClassVar[type] = NeRFMAEConfig
    backbone: StagedVoxelEncoder

    def __init__(self, backbone: Encoder, config: NeRFMAEConfig) -> None:
        """Around a hierarchical encoder of grids with color and alpha.

        Raises:
            ObjectiveError: the backbone is another one, or a block is larger than a grid.
        """
        super().__init__()
        self.backbone = _hierarchical(backbone, config.name)
        self.config = config
        self.compares_images = config.reduction == "voxel" or config.mask_per == "batch"
        self.first_grid = tuple(side // self.backbone.patch_size for side in self.backbone.size)
        self.mask_grid = tuple(side // config.mask_block for side in self.first_grid)
        if 0 in self.mask_grid:
            raise ObjectiveError(
                f"objective.mask_block {config.mask_block} is more than the {min(self.first_grid)} tokens along an "
                f"axis of backbone.size {list(self.backbone.size)}; lower it"
            )
        self.mask_token = nn.Parameter(torch.zeros(self.backbone.stage_dims[0]))
        nn.init.normal_(self.mask_token, std=_STD)
        self.decoder = VoxelDecoder(self.backbone.stage_dims, self.backbone.patch_size, 4)

    def views(self) -> list[dict[str, Any]]:
        """One grid, "grid", turned and mirrored about the vertical axis, cut or padded to the backbone's size."""
        return [volume_view("grid", self.backbone, self.config) | {"unit_channels": self.backbone.unit_channels}]

    def exported_heads(self) -> Heads:
        """The decoder and the learned token, by which `masked_reconstruction` judges a checkpoint."""
        tensors = {f"decoder.{name}": tensor for name, tensor in self.decoder.state_dict(keep_vars=True).items()}
        return Heads({"decoder": {"form": COVERED}}, {"mask_token": self.mask_token, **tensors}, from_start=True)

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch. A collective with reduction=voxel.

        Args:
            batch: "grid" (B, 4, X, Y, Z) bytes or floats; "grid.size" (B, 3) int64, voxels along each axis that are no
                padding; "seed" (B,) int64, from which masks and stochastic depth are drawn. "noise" (B, blocks) in
                [0, 1), if present, is used for masks in place of the seed: blocks below mask_ratio are covered.
            progress: not used but for whether the step is logged.
        """
        result = self._reconstruct(batch)
        with torch.autocast(result.target.device.type, enabled=False):
            parts = voxel_loss(result.prediction, result.target, result.is_scored, self.config.occupied_alpha)
            rgb_loss, alpha_loss = self._quotients(parts)
            loss = self.config.rgb_weight * rgb_loss + self.config.alpha_weight * alpha_loss
        metrics = {"loss": loss.detach(), "rgb_loss": rgb_loss.detach(), "alpha_loss": alpha_loss.detach()}
        if progress.is_logged:
            metrics |= self._metrics(result, parts) | feature_metrics(result.features)
        return Output(loss, metrics)

    def _reconstruct(self, batch: dict[str, Tensor]) -> _Reconstruction:
        target = self.backbone.scaled(batch["grid"], batch["grid.size"])  # (B, 4, X, Y, Z), never below float32
        is_inside = inside(batch["grid.size"], target.shape[2:])  # (B, X, Y, Z)
        is_masked = self._mask(batch)  # (B, A, B', C')
        levels = self.backbone.stages(
            self.backbone.standardized(target), Cover(is_masked, self.mask_token), self._branch_noise(batch["seed"])
        )
        prediction = at_least_float32(self.decoder(levels)).to(target.dtype)
        is_covered = _repeated(is_masked, self.backbone.patch_size)  # (B, X, Y, Z)
        tokens = levels[-1].flatten(1, 3)  # (B, N, D)
        features = Features(tokens, cls=None, registers=None, grid=self.backbone.grid)
        return _Reconstruction(prediction, target, is_covered, is_inside, features)

    def _mask(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, A, B', C') bool."""
        x, y, z = self.mask_grid
        noise = batch["noise"] if "noise" in batch else uniform(batch["seed"], x * y * z, _MASKS)  # (B, blocks)
        if self.config.mask_per == "batch":
            noise = noise[:1].expand_as(noise)
        is_masked = (noise < self.config.mask_ratio).unflatten(1, self.mask_grid)
        return covered_tokens(is_masked, self.config.mask_block, self.first_grid)

    def _branch_noise(self, seed: Tensor) -> Tensor | None:
        if not self.training:
            return None
        num_blocks = self.backbone.num_blocks
        return uniform(seed, 2 * num_blocks, _DROPS).float().unflatten(1, (num_blocks, 2))  # (B, n, 2)

    def _quotients(self, parts: VoxelLoss) -> tuple[Tensor, Tensor]:
        """Mean errors of colors and of alpha, whose means over ranks are those of one process; scalars."""
        errors = torch.stack([parts.rgb_error, parts.alpha_error])  # (2, B)
        counts = torch.stack([parts.num_occupied, parts.num_scored])
        if self.config.reduction == "sample":
            means = (errors / counts.clamp_min(1)).mean(1)
        else:
            # An engine takes the mean over ranks, so that each rank divides by the mean count of all, not by its own.
            means = errors.sum(1) / mean_over_ranks(counts.sum(1)).clamp_min(1 / num_ranks())
        return means[0], means[1]

    @torch.no_grad()
    def _metrics(self, result: _Reconstruction, parts: VoxelLoss) -> dict[str, Tensor]:
        """How good colors and alpha are, and of how much.

        "explained": 1 - error of alpha / error of the best constant, over covered voxels inside the grids; 0 = nothing
        learned. "occupied_psnr_db": of colors over all occupied voxels (the authors' score), "masked_psnr_db": over
        those that were covered. "occupied_share": of the voxels inside the grids.
        """
        target, alpha, is_scored = result.target, result.target[:, 3], result.is_scored
        mean = (alpha * is_scored).sum() / is_scored.sum().clamp_min(1)
        constant = ((alpha - mean).square() * is_scored).sum()
        hidden = is_scored & (alpha > self.config.occupied_alpha)  # (B, X, Y, Z)
        squared = (result.prediction[:, :3] - target[:, :3]).square().mean(1)  # (B, X, Y, Z)
        hidden_error = (squared * hidden).sum() / hidden.sum().clamp_min(1)
        num_occupied = parts.num_occupied.sum()
        return {
            "explained": 1 - parts.alpha_error.sum() / constant.clamp_min(1e-12),
            "occupied_psnr_db": _decibels(parts.rgb_error.sum() / (3 * num_occupied.clamp_min(1))),
            "masked_psnr_db": _decibels(hidden_error),
            "occupied_share": num_occupied / result.is_inside.sum(),
        }

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Alpha no better than a constant, or features that are all alike."""
        return reconstruction_finding(metrics, progress, "covered voxels", "their mean opacity")

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """As the authors, all parameters decay: norms, biases and the mask token too. Otherwise as `Objective`."""
        groups = super().param_groups(weight_decay, layer_decay)
        names = (group["group_name"].replace("no_decay", "vectors") for group in groups)
        return [
            {**group, "weight_decay": weight_decay, "wd_scale": 1.0, "group_name": name}
            for group, name in zip(groups, names, strict=True)
        ]

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "masked", "reconstruction" (covered voxels predicted, others kept) and "original": the
        horizontal slice in which most is, on white, and all of it seen from the front.
        """
        batch = {name: tensor[:MAX_PICTURES] for name, tensor in batch.items()}
        with evaluating(self):
            result = self._reconstruct(batch)
        target, covered = result.target, result.is_covered.unsqueeze(1)
        predicted = torch.cat([result.prediction[:, :3].clamp(0, 1), result.prediction[:, 3:].sigmoid()], dim=1)
        filled = torch.where(result.is_scored.unsqueeze(1), predicted, target)
        grey = torch.tensor([0.5, 0.5, 0.5, 1.0]).to(target).view(1, 4, 1, 1, 1)
        height = target[:, 3].sum((1, 2)).argmax(1)  # (n,)
        return {
            "masked": grid_slices(torch.where(covered, grey, target), height),
            "reconstruction": grid_slices(filled, height),
            "original": grid_slices(target, height),
            "masked, from the front": front_views(target * ~covered),
            "reconstruction, from the front": front_views(filled),
            "original, from the front": front_views(target),
        }


def voxel_loss(prediction: Tensor, target: Tensor, is_scored: Tensor, occupied_alpha: float = 0.01) -> VoxelLoss:
    """The two terms of the loss, grid by grid.

    Args:
        prediction: (B, 4, X, Y, Z): colors, and a logit of alpha.
        target: (B, 4, X, Y, Z): colors and alpha in [0, 1].
        is_scored: (B, X, Y, Z) bool: voxels whose alpha counts. Colors count wherever alpha is above `occupied_alpha`.
    """
    prediction, target = at_least_float32(prediction), at_least_float32(target)
    is_occupied = target[:, 3] > occupied_alpha  # (B, X, Y, Z)
    rgb_error = (prediction[:, :3] - target[:, :3]).square().sum(1) * is_occupied
    alpha_error = (prediction[:, 3].sigmoid() - target[:, 3]).square() * is_scored
    voxels = (1, 2, 3)
    dtype = prediction.dtype
    return VoxelLoss(
        rgb_error.sum(voxels),
        is_occupied.sum(voxels).to(dtype),
        alpha_error.sum(voxels),
        is_scored.sum(voxels).to(dtype),
    )


def covered_tokens(is_masked: Tensor, block: int, grid: tuple[int, ...]) -> Tensor:
    """Masks of blocks as masks of tokens: (B, blocks along each axis) -> (B, *grid), False beyond the last block."""
    tokens = _repeated(is_masked, block)
    missing = [want - have for want, have in zip(grid, tokens.shape[1:], strict=True)]
    return nn.functional.pad(tokens, [0, missing[2], 0, missing[1], 0, missing[0]])


def _repeated(volumes: Tensor, factor: int) -> Tensor:
    """(B, X, Y, Z) with each value `factor` times along each axis."""
    for axis in (1, 2, 3):
        volumes = volumes.repeat_interleave(factor, axis)
    return volumes


def _decibels(squared_error: Tensor) -> Tensor:
    return -10 * squared_error.clamp_min(1e-10).log10()


def _hierarchical(backbone: Encoder, name: str) -> StagedVoxelEncoder:
    """The backbone, if it has stages and takes colors and alpha.

    Raises:
        ObjectiveError: it has not, or does not.
    """
    encoder = require_kind(backbone, VoxelEncoder, name)
    if not isinstance(encoder, StagedVoxelEncoder):
        raise ObjectiveError(
            f"objective {name!r} needs stages of several resolutions; backbone {encoder.spec['name']!r} has one: use "
            "backbone.name=voxel_swin"
        )
    if encoder.in_chans != 4:
        raise ObjectiveError(
            f"objective {name!r} needs grids of color and alpha; backbone.in_chans is {encoder.in_chans}: set it to 4"
        )
    if window := encoder.spec["settings"]["voxel_window"]:
        raise ObjectiveError(
            f"objective {name!r} needs colors and alpha as they are stored; backbone.voxel_window is {list(window)}: "
            "set it to []"
        )
    return encoder
