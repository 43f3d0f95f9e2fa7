"""Distillation of features: a student's tokens predict those of a frozen teacher, of whatever architecture.

For teachers of which there is nothing but a backbone, such as timm's pretrained models; of one with the heads that it
learned with, `objectives.dinov3` distills what those say. The loss is that of M. Ranzinger et al., "AM-RADIO", 2024,
arXiv:2312.06709, for one teacher: cosine distance of the image's token, and of patches 0.9 cosine distance and 0.1
smooth L1, which minds their lengths. Both networks see the same crop in the same colors, as in L. Beyer et al., "A good
teacher is patient and consistent", 2022, arXiv:2106.05237. What is exported is the moving average of the student.

NOT here: several teachers.

Legend: B batch, N patches of the student, D its width, D' that of the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.features import ImageFeatures
from backbones.images.base import ImageEncoder
from backbones.images.pictures import principal_colors
from backbones.precision import at_least_float32
from objectives.base import ImageObjective, Output, Progress
from objectives.companions import Companion
from objectives.distillation.config import FeatureDistillationConfig
from objectives.errors import ObjectiveError
from objectives.health import effective_rank, patch_cosine
from objectives.parts.cross_view import constant_features
from objectives.parts.frozen_teacher import FrozenBackbone
from objectives.parts.image_token import image_token
from objectives.parts.initialization import initialize_linear
from objectives.parts.photometric import FURTHER, photometric, require_colors
from objectives.parts.token_grid import on_grid
from objectives.parts.visuals import MAX_PICTURES, evaluating, to_rgb
from objectives.teacher import ReadWeights, Teacher, cosine_momentum

__all__ = ["FeatureDistillation"]


class _Frozen(FrozenBackbone):
    """An encoder of any kind, patch size and image size, with tokens of the width that heads were made for."""

    def __init__(self, student: ImageEncoder, dim: int) -> None:
        super().__init__(student, [student.image_size])
        self._dim = dim

    def outline(self, spec: Mapping[str, Any]) -> None:
        """Raises ObjectiveError: tokens have another width."""
        super().outline(spec)
        if (found := self.backbone.embed_dim) != self._dim:
            raise ObjectiveError(f"the teacher's tokens have {found} numbers; set objective.teacher_dim={found}")


class FeatureDistillation(ImageObjective):
    """Tokens of images and of their patches, each through a head of its own."""

    Config: ClassVar[type] = FeatureDistillationConfig
    teacher: Teacher

    def __init__(self, backbone: ImageEncoder, config: FeatureDistillationConfig) -> None:
        """Leaves the backbone's weights as they are.

        Raises:
            ObjectiveError: colors are to be changed and the images have none.
        """
        super().__init__(backbone, config.name)
        require_colors(config, backbone)
        self.config = config
        self.head, self.patch_head = self._head(), self._head()
        self.teacher = Teacher(backbone=backbone)
        self.frozen = _Frozen(backbone, config.teacher_dim)

    def _head(self) -> nn.Module:
        """(..., D) -> (..., D')."""
        config = self.config
        head = nn.Sequential(
            nn.Linear(self.backbone.embed_dim, config.head_hidden_dim),
            nn.LayerNorm(config.head_hidden_dim),
            nn.GELU(),
            nn.Linear(config.head_hidden_dim, config.teacher_dim),
        )
        initialize_linear(head)
        return head

    def views(self) -> list[dict[str, Any]]:
        """One crop, "image"."""
        config = self.config
        crop = {"name": "image", "size": self.backbone.image_size, "scale": tuple(config.crop_scale)}
        return [{**crop, "hflip": config.hflip, **photometric(config, FURTHER)}]

    def companions(self) -> dict[str, Companion]:
        """The moving average, and the teacher that does not move."""
        return super().companions() | {"frozen_backbone": self.frozen}

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "image" (B, C, H, W), uint8 or float in [0, 1].
            progress: says whether metrics are read.
        """
        config, pixels = self.config, batch["image"]
        taught = self._teach(pixels)
        student = self.backbone.features(self.backbone.normalized(pixels))
        found, found_patches = self.head(image_token(student)), self.patch_head(student.patches)  # (B, D'), (B, N, D')
        patches = on_grid(taught.patches, taught.grid, student.grid, "bilinear", antialias=True)  # (B, N, D')
        with torch.autocast(pixels.device.type, enabled=False):
            image_distance = _distance(found, image_token(taught))
            patch_distance, patch_smooth_l1 = _distance(found_patches, patches), _smooth_l1(found_patches, patches)
            of_patches = (1 - config.length_share) * patch_distance + config.length_share * patch_smooth_l1
            loss = config.image_weight * image_distance + config.patch_weight * of_patches
        metrics = {
            "loss": loss.detach(),
            "image_distance": image_distance.detach(),
            "patch_distance": patch_distance.detach(),
            "patch_smooth_l1": patch_smooth_l1.detach(),
        }
        if progress.is_logged:
            metrics["effective_rank"] = effective_rank(image_token(student))
            metrics["patch_cosine"] = patch_cosine(student.patches)
        return Output(loss, metrics)

    @torch.no_grad()
    def _teach(self, pixels: Tensor) -> ImageFeatures:
        """What the frozen teacher makes of images (B, C, H, W)."""
        encoder = self.frozen.backbone
        with self.teacher.precision(self.backbone.dtype, pixels.device):
            return encoder.features(encoder.normalized(pixels))

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Moves the average; its momentum rises from `teacher_momentum` to 1 by half a cosine."""
        momentum = cosine_momentum(self.config.teacher_momentum, progress.step, progress.total_steps)
        self.teacher.update(momentum, read)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """One feature for all images."""
        return constant_features(metrics, progress)

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 crops, and as colors what the teacher and the student's average make of them."""
        pixels = batch["image"][:MAX_PICTURES]
        taught = self._teach(pixels)
        with evaluating(self.exported):
            own = self.exported.features(self.exported.normalized(pixels))
        shown = {"image": to_rgb(pixels)}
        shown |= {
            name: principal_colors(features.patches, features.grid)
            for name, features in (("teacher", taught), ("student", own))
        }
        size = tuple(pixels.shape[-2:])
        return {name: functional.interpolate(images, size=size) for name, images in shown.items()}


def _distance(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean cosine distance of rows (..., D'), 0 to 2."""
    return 1 - functional.cosine_similarity(at_least_float32(found), at_least_float32(wanted), dim=-1).mean()


def _smooth_l1(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean over all numbers: of a difference below 1 half its square, of others their size less 1/2."""
    return functional.smooth_l1_loss(at_least_float32(found), at_least_float32(wanted))
