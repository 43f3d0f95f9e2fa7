"""SelfPatch: DINO on images, and a patch predicts what its most similar neighbours have in common.

S. Yun et al., "Patch-level Representation Learning for Self-supervised Vision Transformers", CVPR 2022,
arXiv:2206.07990. The encoder should have neither class token nor final norm (`class_token: false, final_norm: false`
among the backbone's options), as in the paper: both are in the aggregation head. It works with them too.

As in the authors' code, and unlike DINO: the teacher sees all crops, centers are means over all of them, and the patch
loss compares student and teacher on the same crop. NOT here: clipping per parameter tensor, which theirs does.

Legend: B batch, V = 2 + L views, N patches of a crop, D width, k positives, K image and K' patch prototypes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from backbones.features import take_tokens
from backbones.images.base import ImageEncoder
from objectives.base import ImageObjective, Output, Progress
from objectives.errors import ObjectiveError
from objectives.health import effective_rank, patch_cosine
from objectives.parts import cross_view, teacher_schedules
from objectives.parts.centering import Center
from objectives.parts.multicrop import GLOBAL_VIEWS, crops_of, multi_crop_views, require_crops
from objectives.parts.prototypes import DINOHead
from objectives.parts.visuals import crops_and_features
from objectives.selfpatch.aggregation import Aggregation, Positives, find_positives
from objectives.selfpatch.config import SelfPatchConfig
from objectives.teacher import ReadWeights, Teacher

__all__ = ["SelfPatch"]

_NUM_GLOBAL = len(GLOBAL_VIEWS)
_HEAD_WIDTH = 64  # channels per attention head, as in every ViT of the paper


class _Taught(NamedTuple):
    """What the teacher makes of the crops of one resolution; v views."""

    patches: Tensor  # (v B, N, D) from the encoder
    positives: Positives
    image: Tensor  # (v B, D) all patches summed up
    image_logits: Tensor  # (v B, K)
    patch_logits: Tensor  # (v B, N, K') of each patch's positives


class SelfPatch(ImageObjective):
    """DINO's loss on images plus `patch_loss_weight` times a cross-entropy on patches.

    Statistics for the centers are sums over images and patches, so micro-batches and ranks give what one large batch
    gives.
    """

    Config: ClassVar[type] = SelfPatchConfig

    def __init__(self, backbone: ImageEncoder, config: SelfPatchConfig) -> None:
        """Gives the backbone's positions DINO's resampling.

        Raises:
            ObjectiveError: the crops do not fit the backbone, or have too few patches for neighbours; the aggregation
                heads do not divide the width.
        """
        super().__init__(backbone, config.name)
        require_crops(backbone, config, min_patches=3)  # for eight different neighbours
        dim, num_heads = backbone.embed_dim, config.aggregation_heads or max(1, backbone.embed_dim // _HEAD_WIDTH)
        if dim % num_heads:
            raise ObjectiveError(
                f"objective.aggregation_heads {num_heads} does not divide the backbone's width of {dim}"
            )
        widths: dict[str, Any] = {"hidden_dim": config.head_hidden_dim, "bottleneck_dim": config.head_bottleneck_dim}
        self.config = config
        backbone.resample_positions_as("dino")
        self.aggregation = Aggregation(dim, num_heads, config.aggregation_depth)
        self.head = DINOHead(dim, config.num_prototypes, **widths)
        self.patch_head = DINOHead(dim, config.num_patch_prototypes, **widths)
        self.center = Center(config.num_prototypes, config.center_momentum)
        self.patch_center = Center(config.num_patch_prototypes, config.center_momentum)
        self.teacher: Teacher = Teacher(
            backbone=backbone, aggregation=self.aggregation, head=self.head, patch_head=self.patch_head
        )

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
            taught = [self._teach(images) for images in crops]
        frozen = teacher_schedules.freezes_prototypes(self.config, progress)
        patches = [self.backbone.features(images).patches for images in crops]  # per resolution (v B, N, D)
        images = torch.cat([self.aggregation(tokens) for tokens in patches])  # (V B, D)
        logits = self.head(images, frozen)  # (V B, K)
        patch_logits = [self.patch_head(self.aggregation.norm(tokens), frozen) for tokens in patches]  # (v B, N, K')

        shares = [len(tokens) / len(images) for tokens in patches]  # each view counts alike, however many its patches
        with torch.autocast(logits.device.type, enabled=False):
            temperature = teacher_schedules.teacher_temperature(self.config, progress)
            targets = self.center.targets(taught[0].image_logits, temperature)  # (2 B, K)
            patch_targets = [self.patch_center.targets(view.patch_logits, temperature) for view in taught]
            cls_loss = self._image_loss(targets, logits)
            patch_loss = self._patch_loss(patch_targets, patch_logits, shares)
            loss = cls_loss + self.config.patch_loss_weight * patch_loss
        for view in taught:
            self.center.observe(view.image_logits, progress.step)
            self.patch_center.observe(view.patch_logits, progress.step)
        metrics = {"loss": loss.detach(), "cls_loss": cls_loss.detach(), "patch_loss": patch_loss.detach()}
        if progress.is_logged:
            metrics |= cross_view.head_metrics("cls_", cls_loss, [targets], [1.0])
            metrics |= cross_view.head_metrics("patch_", patch_loss, patch_targets, shares)
            metrics |= self._health(taught[0])
        return Output(loss, metrics)

    def _teach(self, images: Tensor) -> _Taught:
        """The teacher on crops of one resolution (v B, C, H, W); float32, or bf16 where it computes in that."""
        teacher, config = self.teacher, self.config
        features = self.exported.features(images)
        patches = features.patches  # (v B, N, D)
        wraps = config.borders == "wrap"
        with torch.autocast(images.device.type, enabled=False):
            positives = find_positives(patches.detach(), features.grid, config.num_positives, wraps=wraps)
        near = take_tokens(patches, positives.idx.flatten(1)).reshape(-1, config.num_positives, patches.shape[-1])
        is_valid = None if wraps else positives.is_inside.flatten(0, 1)  # (v B N, k)
        summaries = teacher.aggregation(near, is_valid).unflatten(0, patches.shape[:2])  # (v B, N, D)
        image = teacher.aggregation(patches)  # (v B, D)
        return _Taught(patches, positives, image, teacher.head(image), teacher.patch_head(summaries))

    def _image_loss(self, targets: Tensor, logits: Tensor) -> Tensor:
        """DINO's: targets (2 B, K) of the global views, logits (V B, K) of all."""
        views = (-1, len(targets) // _NUM_GLOBAL)
        scores = logits.to(targets.dtype) / self.config.student_temp
        return cross_view.cross_view_loss(targets.unflatten(0, views), scores.unflatten(0, views))

    def _patch_loss(self, targets: list[Tensor], logits: list[Tensor], shares: list[float]) -> Tensor:
        """Mean over views of each view's mean over patches; per resolution (v B, N, K') and its share of the views."""
        temperature = self.config.student_temp
        means = [
            share * cross_view.soft_cross_entropy(target, scores.to(target.dtype) / temperature).mean()
            for target, scores, share in zip(targets, logits, shares, strict=True)
        ]
        return torch.stack(means).sum()

    @torch.no_grad()
    def _health(self, taught: _Taught) -> dict[str, Tensor]:
        """Signs of the teacher's features, from the global crops.

        "patch_cosine" near 1 is over-smoothing, the danger of learning from neighbours; "positive_similarity" is the
        mean cosine of a patch and its positives, "wrapped_positives" the share that lies beyond a border.
        """
        is_inside, similarity = taught.positives.is_inside, taught.positives.similarity
        is_real = is_inside if self.config.borders == "clip" else torch.ones_like(is_inside)
        return {
            "center_norm": self.center.value.norm(),
            "patch_center_norm": self.patch_center.value.norm(),
            "effective_rank": effective_rank(taught.image),
            "patch_cosine": patch_cosine(taught.patches),
            "positive_similarity": similarity.where(is_real, 0).sum() / is_real.sum(),
            "wrapped_positives": (is_real & ~is_inside).float().mean(),
        }

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Moves the centers, then the teacher."""
        self.center.update()
        self.patch_center.update()
        self.teacher.update(teacher_schedules.teacher_momentum(self.config, progress), read)

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Uniform outputs or outputs on a few prototypes of either head, or patches of an image that are all alike."""
        config = self.config
        return (
            cross_view.collapse(metrics, progress, config.num_prototypes, "cls_")
            or cross_view.collapse(metrics, progress, config.num_patch_prototypes, "patch_")
            or cross_view.constant_features(metrics, progress)
            or cross_view.over_smoothing(metrics, progress)
        )

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of the crops and of the teacher's patch features of the first one, as colours."""
        return crops_and_features(self.exported, batch)
