"""SiT: reconstruct corrupted images and tell them apart, by momentum contrast of two views.

S. Atito et al., "SiT: Self-supervised vIsion Transformer", arXiv:2104.03602, in the form that the authors' code has had
since 2022: without rotation prediction. Written from the formulas; the values of that code are in
tests/golden/sit.json. NOT here: how images are corrupted (`objectives.parts.block_corruption`), the head
(`objectives.parts.pixel_head`) and its error (`objectives.parts.masked_l1`), the moving average (`objectives.teacher`).

Legend: B batch, W ranks, C channels, S side in pixels, N patches, D width, E projected width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.features import Features
from backbones.images.base import ImageEncoder
from objectives.base import ImageObjective, Output, Progress
from objectives.distributed import gather_rows, rank
from objectives.health import projection_std
from objectives.parts.batch_norm import BatchNorm
from objectives.parts.block_corruption import Corruption, block_corruption
from objectives.parts.image_token import image_token
from objectives.parts.initialization import initialize_linear
from objectives.parts.masked_l1 import masked_l1, reconstruction_metrics
from objectives.parts.photometric import FIRST, SECOND, photometric, require_colors
from objectives.parts.pixel_head import ReconstructionHead
from objectives.parts.reconstruction_health import reconstruction_finding
from objectives.parts.visuals import MAX_PICTURES, evaluating, reconstructions
from objectives.sit.config import SiTConfig
from objectives.teacher import ReadWeights, Teacher, cosine_momentum

__all__ = ["Projector", "SiT", "contrast"]

_VIEWS = ("view_1", "view_2")
_PHOTOMETRIC = {"view_1": FIRST, "view_2": SECOND}


class Projector(nn.Module):
    """Summary of an image to the space in which images are told apart: (n, D) -> (n, E), float32 at least."""

    def __init__(self, dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            BatchNorm(hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            BatchNorm(hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, output_dim),
            BatchNorm(output_dim, affine=False),
        )
        initialize_linear(self)

    def forward(self, x: Tensor) -> Tensor:
        """Collective: batch norms are over the rows of all ranks."""
        return self.mlp(x)


class _Reconstruction(NamedTuple):
    target: Tensor  # (2 B, C, S, S) clean, normalised
    corruption: Corruption
    features: Features  # of the corrupted images
    prediction: Tensor  # (2 B, C, S, S)


class SiT(ImageObjective):
    """Two losses on corrupted views: the error of the masked pixels, and the contrast to the teacher's clean views.

    The contrast compares with all images of the step's micro-batches on all ranks, so accumulation changes it.
    """

    Config: ClassVar[type] = SiTConfig
    compares_images = True
    teacher: Teacher

    def __init__(self, backbone: ImageEncoder, config: SiTConfig) -> None:
        """Re-initialises the class token as the authors do.

        Raises:
            ObjectiveError: blocks do not fit the image, or photometric augmentation is on and the input is not RGB.
        """
        super().__init__(backbone, config.name)
        require_colors(config, backbone)
        self.config = config
        self.corruption = block_corruption(config, backbone)
        backbone.reset_tokens(0.02)  # as the authors; timm draws class tokens with a deviation of 1e-6
        self.projector = Projector(backbone.embed_dim, config.projector_hidden_dim, config.projector_dim)
        self.head = ReconstructionHead(backbone)
        self.teacher = Teacher(backbone=self.backbone, projector=self.projector)

    def views(self) -> list[dict[str, Any]]:
        """Two crops, "view_1" and "view_2", each in its own colours."""
        return [
            {
                "name": name,
                "size": self.backbone.image_size,
                "scale": tuple(self.config.crop_scale),
                "hflip": self.config.hflip,
                **photometric(self.config, _PHOTOMETRIC[name]),
            }
            for name in _VIEWS
        ]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "view_1" and "view_2" (B, C, S, S) uint8 or float in [0, 1]; "seed" (B,) int64. The corruption that
                follows from the seed can be given, see `BlockCorruption.of_batch`.
            progress: not used.
        """
        target, corruption, features, prediction = self._reconstruct(torch.cat([batch[name] for name in _VIEWS]), batch)
        queries = self.projector(image_token(features))  # (2 B, E)
        with torch.no_grad(), self.teacher.precision(self.backbone.dtype, target.device):
            keys = self.teacher.projector(image_token(self.exported.features(target)))  # (2 B, E)

        contrastive, metrics = contrast(queries, keys, self.config.temperature)
        counted = corruption.is_masked if self.config.masked_only else torch.ones_like(corruption.is_masked)
        reconstruction = masked_l1(prediction, target, counted)
        loss = contrastive + self.config.reconstruction_weight * reconstruction
        metrics |= {"loss": loss.detach(), "reconstruction": reconstruction.detach()}
        if progress.is_logged:
            metrics |= reconstruction_metrics(prediction, target, corruption, features)
        return Output(loss, metrics)

    def _reconstruct(self, images: Tensor, batch: dict[str, Tensor]) -> _Reconstruction:
        target = self.backbone.normalized(images)
        corruption = self.corruption.of_batch(batch, target)
        features = self.backbone.features(corruption.apply(target))
        return _Reconstruction(target, corruption, features, self.head(features.patches, features.grid))

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Moves the teacher; its momentum rises from `teacher_momentum` to 1 by half a cosine."""
        momentum = cosine_momentum(self.config.teacher_momentum, progress.step, progress.total_steps)
        self.teacher.update(momentum, read)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """A contrast that tells nothing apart, projections without spread, or what ails the reconstruction."""
        if not progress.is_young:
            if metrics["contrast_explained"] < 0.01:
                return (
                    f"images are not told apart: the contrastive loss {metrics['contrastive']:.2f} is that of a guess "
                    f"(contrast_explained {metrics['contrast_explained']:.3f}); lower optimizer.lr"
                )
            if metrics["projection_std"] * math.sqrt(self.config.projector_dim) < 0.05:
                return (
                    f"projections have collapsed: their deviation {metrics['projection_std']:.5f} should be near "
                    f"{self.config.projector_dim**-0.5:.3f}; lower optimizer.lr"
                )
        return reconstruction_finding(metrics, progress)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of "clean", "corrupted" and "reconstruction" (masked pixels predicted, others kept)."""
        with evaluating(self):
            shown = self._reconstruct(batch[_VIEWS[0]][:MAX_PICTURES], {"seed": batch["seed"][:MAX_PICTURES]})
        return reconstructions(self.backbone, shown.target, shown.corruption, shown.prediction)


def contrast(queries: Tensor, keys: Tensor, temperature: float) -> tuple[Tensor, dict[str, Tensor]]:
    """MoCo v3's symmetric loss (Chen et al. 2021, arXiv:2104.02057): each view finds the other one of its image.

    2 T [CE(q1 k2' / T) + CE(q2 k1' / T)] with unit rows and the keys of all ranks. Guessing costs 4 T ln(W B).

    Args:
        queries: (2 B, E), all first views first, with gradient.
        keys: (2 B, E) in the same order. Collective: they are gathered over ranks.
        temperature: T.

    Returns:
        The loss, and metrics: "contrastive"; "contrast_explained", 1 - loss / that of guessing; mean cosine with the
        right key and with the others; "projection_std".
    """
    with torch.autocast(queries.device.type, enabled=False):
        unit_queries = functional.normalize(queries, dim=-1).chunk(2)  # 2 x (B, E)
        unit_keys = [gather_rows(half) for half in functional.normalize(keys, dim=-1).chunk(2)]  # 2 x (W B, E)
        num_own, num_keys = len(unit_queries[0]), len(unit_keys[0])
        right = rank() * num_own + torch.arange(num_own, device=queries.device)  # (B,)
        cosines = torch.stack([unit_queries[0] @ unit_keys[1].T, unit_queries[1] @ unit_keys[0].T])  # (2, B, W B)
        crossed = functional.cross_entropy(cosines.flatten(0, 1) / temperature, right.repeat(2))  # mean of both
        loss = 2 * temperature * 2 * crossed
    with torch.no_grad():
        positive = cosines[:, torch.arange(num_own, device=queries.device), right].sum()
        others = (cosines.sum() - positive) / max(1, 2 * num_own * (num_keys - 1))
        metrics = {
            "contrastive": loss.detach(),
            "contrast_explained": 1 - loss.detach() / (4 * temperature * math.log(max(2, num_keys))),
            "positive_cosine": positive / (2 * num_own),
            "negative_cosine": others,
            "projection_std": projection_std(queries),
        }
    return loss, metrics
