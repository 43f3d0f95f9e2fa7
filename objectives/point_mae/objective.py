"""Masked autoencoder of point clouds: hide most groups of points, encode the rest, predict the shape of what is hidden.

Y. Pang et al., "Masked Autoencoders for Point Cloud Self-supervised Learning", 2022, arXiv:2203.06604. The decoder
knows where a hidden group is, its center, and predicts its points relative to that; it is light, so that the encoder
has to say what is there. NOT here: the encoder and how points are grouped (`backbones.points`), the loss
(`parts.chamfer`).

Legend: B batch, N points, G groups, M = int(mask_ratio * G) hidden ones, K = G - M visible, S points of a group, D
width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from backbones.features import Features, take_tokens
from backbones.norms import make_norms_exact
from backbones.points.base import PointEncoder
from backbones.points.grouping import Groups
from backbones.points.transformer import position_mlp, run_blocks, transformer_blocks
from backbones.precision import at_least_float32
from objectives.base import Objective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.masking import RandomMask, random_noise
from objectives.parts.chamfer import chamfer_distance
from objectives.parts.point_pictures import cloud_pictures
from objectives.parts.reconstruction_health import feature_metrics, reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating
from objectives.point_mae.config import PointMAEConfig
from objectives.requirements import require_kind

__all__ = ["PointMAE"]

_STD = 0.02
_VISIBLE, _PREDICTED = (0.55, 0.75, 1.0), (1.0, 0.6, 0.15)


class _Reconstruction(NamedTuple):
    prediction: Tensor  # (B, M, S, 3) relative to the centers, as `target`
    target: Tensor  # (B, M, S, 3)
    mask: RandomMask
    groups: Groups
    features: Features


class PointMAE(Objective):
    """Chamfer distance between predicted and true points of hidden groups.

    The tokenizer's batch norms relate the clouds of a micro-batch (of all ranks), also hidden groups.
    """

    Config: ClassVar[type] = PointMAEConfig
    compares_images = True
    backbone: PointEncoder

    def __init__(self, backbone: Encoder, config: PointMAEConfig) -> None:
        """Raises ObjectiveError for a backbone of another kind, or when nothing would be hidden or seen."""
        super().__init__()
        self.backbone = require_kind(backbone, PointEncoder, config.name)
        self.config = config
        self.num_masked = int(config.mask_ratio * self.backbone.num_groups)
        dim = self.backbone.embed_dim
        if not 0 < self.num_masked < self.backbone.num_groups:
            raise ObjectiveError(
                f"objective.mask_ratio {config.mask_ratio} leaves nothing to see or to predict of "
                f"{self.backbone.num_groups} groups; choose another ratio or more groups"
            )
        if dim % config.decoder_heads:
            raise ObjectiveError(
                f"objective.decoder_heads {config.decoder_heads} does not divide the width {dim} of the backbone, "
                "which is the decoder's"
            )
        self.mask_token = nn.Parameter(torch.zeros(dim))  # a vector, so that it does not decay
        self.decoder_position = position_mlp(dim)
        self.blocks = transformer_blocks(dim, config.decoder_depth, config.decoder_heads, config.decoder_drop_path)
        self.norm = nn.LayerNorm(dim)
        self.predict = nn.Linear(dim, self.backbone.group_size * 3)
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.trunc_normal_(self.mask_token, std=_STD)
        make_norms_exact(self.blocks)
        make_norms_exact(self.norm)

    def views(self) -> list[dict[str, Any]]:
        """One cloud, "points": points drawn at random, brought into the unit sphere, then stretched and moved."""
        config = self.config
        return [
            {
                "name": "points",
                "kind": "points",
                "num_points": self.backbone.num_points,
                "min_points": max(self.backbone.num_groups, self.backbone.group_size),
                "normalize": "unit_sphere",
                "rotate": config.rotate,
                "scale": tuple(config.scale),
                "translate": config.translate,
            }
        ]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch. A collective: see `backbones.rank_batch_norm`.

        Args:
            batch: "points" (B, N, 3) float32, and "seed" (B,) int64, from which masks are drawn; "is_masked" (B, G)
                bool with as many in each row, if present, is used in place of the seed.
            progress: not used but for whether the step is logged.
        """
        result = self._reconstruct(batch)
        with torch.autocast(result.target.device.type, enabled=False):
            prediction, target = result.prediction.flatten(0, 1), result.target.flatten(0, 1)  # (B * M, S, 3)
            loss = chamfer_distance(prediction, target, self.config.chamfer)
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= {"explained": self._explained(loss.detach(), target)} | feature_metrics(result.features)
        return Output(loss, metrics)

    def _reconstruct(self, batch: dict[str, Tensor]) -> _Reconstruction:
        groups = self.backbone.group(batch["points"])
        mask = self._mask(batch, groups.centers)
        visible = self.backbone.features(groups, mask.keep_idx)
        order = torch.cat([mask.keep_idx, mask.drop_idx], dim=1)  # (B, G)
        positions = self.decoder_position(take_tokens(groups.centers, order).to(visible.tokens.dtype))
        hidden = self.mask_token.to(visible.tokens.dtype).expand(len(order), self.num_masked, -1)
        tokens = run_blocks(self.blocks, torch.cat([visible.tokens, hidden], dim=1), positions)  # (B, G, D)
        points = self.predict(self.norm(tokens[:, -self.num_masked :])).unflatten(2, (-1, 3))  # (B, M, S, 3)
        target = take_tokens(groups.neighborhoods.flatten(2), mask.drop_idx).unflatten(2, (-1, 3))
        return _Reconstruction(at_least_float32(points).to(target.dtype), target, mask, groups, visible)

    def _mask(self, batch: dict[str, Tensor], centers: Tensor) -> RandomMask:
        """The first M groups of an order are hidden: a random one, or by distance from a random group."""
        if "is_masked" in batch:
            order = batch["is_masked"].argsort(dim=1, descending=True, stable=True)
        else:
            noise = random_noise(batch["seed"], self.backbone.num_groups)  # (B, G)
            order = noise.argsort(dim=1, stable=True)
            if self.config.masking == "block":
                order = _by_distance(centers, order[:, :1])
        return RandomMask(keep_idx=order[:, self.num_masked :], drop_idx=order[:, : self.num_masked])

    @torch.no_grad()
    def _explained(self, loss: Tensor, target: Tensor) -> Tensor:
        """1 - loss / loss of predicting the centers alone; 0 = nothing learned of shapes."""
        return 1 - loss / chamfer_distance(
            target.new_zeros(1, 1, 3).expand(len(target), -1, -1), target, self.config.chamfer
        )

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Reconstructions no better than the centers, or features that are all alike."""
        return reconstruction_finding(metrics, progress, "hidden points", "the centers of their groups")

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "masked", "reconstruction" (predicted points orange) and "original", from two sides."""
        batch = {name: tensor[:MAX_PICTURES] for name, tensor in batch.items()}
        with evaluating(self):
            result = self._reconstruct(batch)
        groups, mask = result.groups, result.mask
        everything = (groups.neighborhoods + groups.centers.unsqueeze(2)).flatten(2)  # (n, G, S * 3)
        visible = take_tokens(everything, mask.keep_idx).flatten(1).unflatten(1, (-1, 3))  # (n, K * S, 3)
        there = take_tokens(groups.centers, mask.drop_idx).unsqueeze(2)  # (n, M, 1, 3)
        predicted = (result.prediction + there).flatten(1, 2)  # (n, M * S, 3)
        original = batch["points"][..., :3]
        radius = original.float().norm(dim=-1).amax(1)  # (n,)
        blue, orange = (original.new_tensor(color).float() for color in (_VISIBLE, _PREDICTED))
        both = torch.cat([blue.expand_as(visible), orange.expand_as(predicted)], dim=1)
        return {
            "masked": cloud_pictures(visible, blue.expand_as(visible), radius),
            "reconstruction": cloud_pictures(torch.cat([visible, predicted], dim=1), both, radius),
            "original": cloud_pictures(original, blue.expand_as(original), radius),
        }


def _by_distance(centers: Tensor, chosen: Tensor) -> Tensor:
    """Groups in the order of their distance from the chosen one, itself first: (B, G, 3), (B, 1) -> (B, G)."""
    away = centers - take_tokens(centers, chosen)
    return away.square().sum(-1).argsort(dim=1, stable=True)
