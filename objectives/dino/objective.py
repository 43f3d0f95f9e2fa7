"""Self-distillation with no labels: a student predicts from one crop what its own moving average says of another.

M. Caron et al., "Emerging Properties in Self-Supervised Vision Transformers", 2021, arXiv:2104.14294. The teacher sees
the two global crops, the student all crops; of an encoder without a class token the mean of the patches is taken.

Beside the authors' code: schedules go in steps where theirs go in epochs, and the last layer's gain is fixed at 1
(their `norm_last_layer`). NOT here: clipping per parameter tensor, which theirs does (`optimizer.clip_grad` is global).

Legend: B batch, V = 2 + L views, C channels, D width, K prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from backbones.images.base import ImageEncoder
from objectives.base import ImageObjective, Output, Progress
from objectives.dino.config import DINOConfig
from objectives.health import effective_rank
from objectives.parts import cross_view, teacher_schedules
from objectives.parts.centering import Center
from objectives.parts.multicrop import GLOBAL_VIEWS, crops_of, multi_crop_views, require_crops
from objectives.parts.prototypes import DINOHead
from objectives.parts.visuals import crops_and_features
from objectives.teacher import ReadWeights, Teacher

__all__ = ["DINO"]

_NUM_GLOBAL = len(GLOBAL_VIEWS)
_TOKEN_STD = 0.02  # of the paper; timm draws class tokens with a deviation of 1e-6


class DINO(ImageObjective):
    """Cross-entropy between the teacher's and the student's prototypes, over all pairs of different views.

    Statistics for the center are means over images, so micro-batches and ranks give what one large batch gives.
    """

    Config: ClassVar[type] = DINOConfig

    def __init__(self, backbone: ImageEncoder, config: DINOConfig) -> None:
        """Gives class token and registers the paper's initial spread, and positions DINO's resampling.

        Raises:
            ObjectiveError: the crops do not fit the backbone.
        """
        super().__init__(backbone, config.name)
        require_crops(backbone, config)
        self.config = config
        backbone.resample_positions_as("dino")
        backbone.reset_tokens(_TOKEN_STD)
        backbone.prepare_pooled()
        self.head = DINOHead(
            backbone.embed_dim,
            config.num_prototypes,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
        )
        self.center = Center(config.num_prototypes, config.center_momentum)
        self.teacher: Teacher = Teacher(backbone=backbone, head=self.head)

    def views(self) -> list[dict[str, Any]]:
        """Two "global" crops and `num_local` of "local"."""
        return multi_crop_views(self.backbone, self.config)

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "global_1", "global_2" (B, C, H, W) and "local" (L, B, C, h, w), uint8 or float in [0, 1].
            progress: sets the teacher's temperature and whether prototypes are frozen.
        """
        crops = [self.backbone.normalized(images) for images in crops_of(batch)]  # (2 B, C, H, W), (L B, C, h, w)
        with torch.no_grad(), self.teacher.precision(self.backbone.dtype, crops[0].device):
            taught = self.exported.pooled(crops[0])  # (2 B, D)
            teacher_logits = self.teacher.head(taught)  # (2 B, K)
        tokens = torch.cat([self.backbone.pooled(images) for images in crops])  # (V B, D)
        logits = self.head(tokens, teacher_schedules.freezes_prototypes(self.config, progress))  # (V B, K)

        batch_size = len(taught) // _NUM_GLOBAL
        with torch.autocast(logits.device.type, enabled=False):
            temperature = teacher_schedules.teacher_temperature(self.config, progress)
            targets = self.center.targets(teacher_logits, temperature).unflatten(0, (-1, batch_size))  # (2, B, K)
            scores = (logits.to(targets.dtype) / self.config.student_temp).unflatten(0, (-1, batch_size))  # (V, B, K)
            loss = cross_view.cross_view_loss(targets, scores)
        self.center.observe(teacher_logits, progress.step)
        metrics = {"loss": loss.detach()}
        if progress.is_logged:
            metrics |= cross_view.head_metrics("", loss, [targets], [1.0])
            metrics |= {"center_norm": self.center.value.norm(), "effective_rank": effective_rank(taught)}
        return Output(loss, metrics)

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Moves the center, then the teacher."""
        self.center.update()
        self.teacher.update(teacher_schedules.teacher_momentum(self.config, progress), read)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Uniform outputs, outputs on a few prototypes, or one feature for all images."""
        return cross_view.collapse(metrics, progress, self.config.num_prototypes) or cross_view.constant_features(
            metrics, progress
        )

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of the crops and of what the teacher makes of the first: features as colours, attention."""
        return crops_and_features(self.exported, batch)
