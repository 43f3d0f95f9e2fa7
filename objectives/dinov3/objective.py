"""DINOv3: class tokens and masked patches predict what their own moving average makes of the whole pictures.

O. Simeoni et al., "DINOv3", 2025, arXiv:2508.10104, written from the papers and a specification. The teacher sees the
two global crops whole, the student sees them with blocks of patches masked, and small local crops:

    loss = DINO (class tokens of different crops)  +  iBOT (masked patches)  +  0.1 KoLeo  +  w Gram anchoring

DINOv2 (M. Oquab et al., 2023, arXiv:2304.07193) and iBOT (J. Zhou et al., 2022, arXiv:2111.07832) are configurations of
it. A recipe trains it in stages: long without Gram anchoring, then with, then at higher resolution (docs/stages.md).
With `distill` a frozen teacher says what is predicted, in place of the moving average, and nothing is masked.

Beside the authors' code: rotary tables and KoLeo are in float32, a step that is not finite is dropped at once, and
which crops are masked is drawn from the samples' seeds. NOT here: clipping per part (`optimizer.clip_mode`), schedules
of the optimizer.

Legend: B batch, V = 2 + L crops, N patches of a global crop, M masked patches of all, D width, K and K' prototypes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from backbones.features import ImageFeatures
from backbones.images.base import ImageEncoder
from backbones.images.packed_blocks import Crops
from backbones.images.vit import ViTBackbone
from backbones.precision import at_least_float32
from objectives.base import Heads, ImageObjective, Output, Progress
from objectives.companions import Companion
from objectives.dinov3.config import DINOv3Config
from objectives.dinov3.distillation import FrozenTeacher
from objectives.dinov3.gram import GramTeacher, gram_loss, is_refreshed
from objectives.dinov3.student import draw_blocks
from objectives.errors import ObjectiveError
from objectives.health import effective_rank, entropy, patch_cosine
from objectives.masking import random_noise
from objectives.parts import cross_view, teacher_schedules
from objectives.parts.block_masks import BlockMasks, block_masks
from objectives.parts.centering import Center
from objectives.parts.image_token import image_token
from objectives.parts.koleo import koleo
from objectives.parts.multicrop import GLOBAL_VIEWS, crops_of, local_size, multi_crop_views, require_crops
from objectives.parts.prototypes import DINOHead
from objectives.parts.sinkhorn import sinkhorn_knopp
from objectives.parts.token_grid import on_grid
from objectives.parts.visuals import crops_and_features
from objectives.requirements import require, require_sizes
from objectives.schedules import half_cosine
from objectives.teacher import ReadWeights, Teacher

__all__ = ["DINOv3"]

_NUM_GLOBAL = len(GLOBAL_VIEWS)
_STD = 0.02


class _Taught(NamedTuple):
    """What the teacher makes of the global crops.

    Attributes:
        features: of the 2 B crops.
        targets: (2, B, K) distributions.
        patch_targets: (M, K') distributions at the masked patches.
    """

    features: ImageFeatures
    targets: Tensor
    patch_targets: Tensor


class DINOv3(ImageObjective):
    """Self-distillation of class tokens and masked patches, with features that spread out and stay local."""

    Config: ClassVar[type] = DINOv3Config
    compares_images = True  # Sinkhorn-Knopp and KoLeo see the images of a micro-batch, on all ranks
    backbone: ViTBackbone

    def __init__(self, backbone: ImageEncoder, config: DINOv3Config) -> None:
        """Draws the backbone's weights anew, as the authors do, where they are timm's.

        Raises:
            ObjectiveError: the backbone is not a plain ViT with a class token, the crops do not fit it, or settings
                exclude each other.
        """
        super().__init__(backbone, config.name)
        require(backbone, config.name, "has_plain_blocks", "has_cls")
        require_crops(backbone, config)
        _require_sense(backbone, config)
        gram_sizes = [] if config.gram_size is None else [config.gram_size]
        require_sizes(backbone, config.name, *gram_sizes, *config.mix_global, *config.mix_local, *config.mix_gram)
        self.config = config
        self.backbone.pack_blocks()
        backbone.resample_positions_as("dino")  # absolute ones, as in iBOT and DINOv2; rotary ones need none
        if backbone.init == "timm":
            _initialize(self.backbone.network)
            backbone.reset_tokens(_STD)
        self.mask_token = None if config.distill else nn.Parameter(torch.zeros(1, backbone.embed_dim))
        self.head = DINOHead(
            backbone.embed_dim,
            config.num_prototypes,
            hidden_dim=config.head_hidden_dim,
            bottleneck_dim=config.head_bottleneck_dim,
            last_layer=config.last_layer,
        )
        students: dict[str, nn.Module] = {"backbone": backbone, "head": self.head}
        if not config.shared_head:
            self.patch_head = students["patch_head"] = DINOHead(
                backbone.embed_dim,
                config.patch_num_prototypes,
                hidden_dim=config.patch_head_hidden_dim,
                bottleneck_dim=config.patch_head_bottleneck_dim,
                last_layer=config.last_layer,
            )
        if config.local_norm:
            self.local_norm = self.backbone.copy_of_final_norm()
        self.center = self.patch_center = None
        if config.targets == "softmax":
            self.center = Center(config.num_prototypes, config.center_momentum)
        if config.targets_of_patches == "softmax":
            self.patch_center = Center(self._num_patch_prototypes, config.center_momentum)
        self.teacher: Teacher = Teacher(**students)
        self.anchor: GramTeacher | None = None
        if config.gram_weight and config.gram_from != "live":
            self.anchor = GramTeacher(backbone, from_checkpoint=config.gram_from == "checkpoint")
        self.frozen: FrozenTeacher | None = None
        if config.distill:
            sizes = [backbone.image_size, *config.mix_global]
            self.frozen = FrozenTeacher(backbone, sizes, config.num_prototypes, self._num_patch_prototypes)

    @property
    def _num_patch_prototypes(self) -> int:
        return self.config.num_prototypes if self.config.shared_head else self.config.patch_num_prototypes

    # What it wants of the data, and what it has beside the student

    def views(self) -> list[dict[str, Any]]:
        """Two "global" crops, `num_local` of "local", and the first two once more at the size of the anchor's."""
        config = self.config
        return self._views_at(self.backbone.image_size, local_size(self.backbone, config), config.gram_size)

    def mixed_views(self) -> list[tuple[float, list[dict[str, Any]]]]:
        """The same at the other sizes that `mix_share` of the steps have."""
        config = self.config
        grams: list[int | None] = [*config.mix_gram] or [config.gram_size] * len(config.mix_share)
        sizes = zip(config.mix_global, config.mix_local, grams, strict=True)
        return [(share, self._views_at(*each)) for share, each in zip(config.mix_share, sizes, strict=True)]

    def _views_at(self, global_side: int, local_side: int, gram_side: int | None) -> list[dict[str, Any]]:
        """Views of these sides in pixels."""
        sides = dict.fromkeys(GLOBAL_VIEWS, global_side)
        views = [
            view | {"size": sides.get(view["name"], local_side)}
            for view in multi_crop_views(self.backbone, self.config)
        ]
        for view, blur_p in zip(views, self.config.blur_p, strict=False):
            if "photometric" in view and self.config.blur:
                view["photometric"] = view["photometric"] | {"blur_p": blur_p}
        if self._has_own_crops:
            views += [{"name": f"gram_{i}", "size": gram_side, "same_crop_as": f"global_{i}"} for i in (1, 2)]
        return views

    @property
    def _has_own_crops(self) -> bool:
        return self.anchor is not None and self.config.gram_size is not None

    def companions(self) -> dict[str, Companion]:
        """The teacher and, with Gram anchoring, the anchor; with distillation the frozen teacher and its heads."""
        anchor: dict[str, Companion] = {} if self.anchor is None else {"gram": self.anchor}
        return super().companions() | anchor | ({} if self.frozen is None else self.frozen.companions())

    def exported_heads(self) -> Heads:
        """Those of the teacher, from which a smaller student can learn."""
        heads = {name: head for name, head in self.teacher.modules.items() if isinstance(head, DINOHead)}
        tensors = {
            f"{name}.{key}": tensor
            for name, head in heads.items()
            for key, tensor in head.state_dict(keep_vars=True).items()
        }
        return Heads({name: head.spec for name, head in heads.items()}, tensors)

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """As every objective's, with the authors' counting of layers and their rate of the patch embedding.

        The final norm and the heads have scale 1, the last block `layer_decay`, the first one layer_decay ** blocks,
        and what comes before it once more; the patch embedding times `patch_embed_lr`.
        """
        depths = self.backbone.layer_ids() if layer_decay != 1.0 else {}
        scales = {}  # of the backbone's parameters
        for name, parameter in self.backbone.network.named_parameters():
            is_last = name.startswith("norm.")
            above = 0 if is_last else self.backbone.num_layers + 1 - depths.get(name, 0)  # layers above this one
            rate = self.config.patch_embed_lr if name.startswith("patch_embed.") else 1.0
            scales[parameter] = rate * layer_decay**above
        if self.mask_token is not None:
            scales[self.mask_token] = layer_decay ** (self.backbone.num_layers + 1)
        groups: dict[tuple[str, float, bool, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                decays = parameter.ndim >= 2 and not name.endswith(".bias")
                is_frozen = name.endswith((".prototypes", ".gain"))
                groups[self.part_of(name), scales.get(parameter, 1.0), decays, is_frozen].append(parameter)
        return [
            {
                "params": parameters,
                "weight_decay": weight_decay * decays,
                "wd_scale": float(decays),
                "lr_scale": scale,
                "frozen_share": self.config.freeze_prototypes * is_frozen,
                "group_name": f"{part}.{'decay' if decays else 'no_decay'}.{scale:.6g}",
            }
            for (part, scale, decays, is_frozen), parameters in groups.items()
        ]

    def part_of(self, name: str) -> str:
        """The mask token and the norm of local crops belong to the backbone."""
        part = super().part_of(name)
        return "backbone" if part in ("mask_token", "local_norm") else part

    # A step

    def begin(self, read: ReadWeights) -> None:
        """An anchor that is the teacher of step 0 is filled."""
        self._move_anchor(0)

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: "global_1", "global_2" (B, C, H, W) and "local" (L, B, C, h, w), uint8 or float in [0, 1]; "seed"
                (B,); "gram_1", "gram_2" (B, C, H', W') where the anchor has a size of its own.
            progress: sets the teacher's temperature and the weights that change.
        """
        config = self.config
        pixels = crops_of(batch)  # (2 B, C, H, W), (L B, C, h, w)
        crops = [self.backbone.normalized(images) for images in pixels]
        masks = self._masks(batch["seed"], crops[0])
        seen = crops[0] if self.frozen is None else self.frozen.backbone.normalized(pixels[0])  # by the teacher
        taught = self._teach(seen, masks, progress)
        student, class_tokens = self._see(crops, masks, batch["seed"])
        logits = self.head(class_tokens)  # (V B, K)
        patch_logits = self._patch_head(self)(student.patches.flatten(0, 1)[masks.idx])  # (M, K')

        with torch.autocast(logits.device.type, enabled=False):
            scores = at_least_float32(logits) / config.student_temp
            scores = scores.unflatten(0, (-1, taught.targets.shape[1]))  # (V, B, K)
            patch_scores = at_least_float32(patch_logits) / config.student_temp
            terms = {
                "dino_global": cross_view.cross_view_loss(taught.targets, scores[:_NUM_GLOBAL]),
                "ibot": cross_view.masked_patch_loss(taught.patch_targets, patch_scores, masks.weight, len(crops[0])),
            }
            if len(scores) > _NUM_GLOBAL:
                pairs = cross_view.soft_cross_entropy(taught.targets.mean(0), scores[_NUM_GLOBAL:])  # (L, B)
                terms["dino_local"] = pairs.mean()
            if config.koleo_weight:
                terms |= self._spread(student)
            if config.gram_weight:
                anchored = self._anchored(batch, crops[0], taught)
                terms["gram"] = self._gram(student.patches, anchored, masks, config.gram_tokens)
            loss = self._total(terms, num_local=len(scores) - _NUM_GLOBAL, progress=progress)
        metrics = {"loss": loss, **terms}
        if progress.is_logged:
            of_images = taught.features if self.frozen is None else student
            metrics |= self._health(of_images, taught, scores, patch_scores)
            if config.gram_weight:
                metrics |= self._gram_health(taught, student, anchored, masks)
        return Output(loss, {name: value.detach() for name, value in metrics.items()})

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Moves the centers, then the teacher, then what is anchored to it."""
        for center in (self.center, self.patch_center):
            if center is not None:
                center.update()
        self.teacher.update(self._momentum(progress), read)
        self._move_anchor(progress.step + 1)

    def _momentum(self, progress: Progress) -> float:
        """Share of the teacher that a step keeps."""
        config = self.config
        return half_cosine(config.teacher_momentum, config.teacher_momentum_end, progress.step / progress.total_steps)

    def _masks(self, seeds: Tensor, images: Tensor) -> BlockMasks:
        """Of the global crops, one view after the other."""
        config, grid = self.config, self.backbone.grid_at(*images.shape[-2:])
        of_crops = torch.cat([random_noise(seeds, 1, view)[:, 0] for view in range(_NUM_GLOBAL)])  # (2 B,)
        return block_masks(of_crops, grid, share=config.mask_share, ratio=(config.mask_ratio[0], config.mask_ratio[1]))

    @torch.no_grad()
    def _teach(self, images: Tensor, masks: BlockMasks, progress: Progress) -> _Taught:
        """Targets from whole global crops (2 B, C, H, W); what centers move towards is observed."""
        config, frozen = self.config, self.frozen
        if frozen is None:
            backbone, head, patch_head = self.exported, self.teacher.head, self._patch_head(self.teacher)
        else:
            backbone, head, patch_head = frozen.backbone, frozen.head, frozen.patch_head
        with self.teacher.precision(self.backbone.dtype, images.device):
            features = backbone.features(images)
            logits = head(image_token(features))  # (2 B, K)
            patches = features.patches.flatten(0, 1)  # (2 B N, D)
            needs_all = self.patch_center is not None and config.patch_center == "all"
            patch_logits = patch_head(patches if needs_all else patches[masks.idx])
        at_masks = patch_logits[masks.idx] if needs_all else patch_logits  # (M, K')
        temperature = teacher_schedules.teacher_temperature(config, progress, inclusive=config.teacher_temp_inclusive)
        patch_temperature = temperature
        if config.patch_teacher_temp is not None:
            patch_temperature *= config.patch_teacher_temp / config.teacher_temp
        with torch.autocast(images.device.type, enabled=False):
            targets = _targets(self.center, logits, temperature)
            patch_targets = _targets(self.patch_center, at_masks, patch_temperature)
            if self.center is not None:
                self.center.observe(logits, progress.step)
            if self.patch_center is not None:
                self.patch_center.observe(patch_logits, progress.step)
        return _Taught(features, targets.unflatten(0, (_NUM_GLOBAL, -1)), patch_targets)

    def _see(self, crops: list[Tensor], masks: BlockMasks, seeds: Tensor) -> tuple[ImageFeatures, Tensor]:
        """The student's features of the global crops, which are masked, and the class tokens of all crops (V B, D)."""
        is_masked = None if self.mask_token is None else masks.is_masked
        inputs = [Crops(crops[0], is_masked, self.mask_token), *map(Crops, crops[1:])]
        sizes = [len(images) for images in crops]
        draws = draw_blocks(self.config, seeds[:1], sizes, self.backbone.num_layers) if self.training else ()
        whole, *local = self.backbone.streams(inputs, draws)
        features = self.backbone.read_out(whole, self.backbone.grid_at(*crops[0].shape[-2:]))
        tokens = [image_token(features)]
        for stream, images in zip(local, crops[1:], strict=True):
            if self.config.local_norm:
                tokens.append(self.local_norm(stream[:, 0]))
            else:
                tokens.append(image_token(self.backbone.read_out(stream, self.backbone.grid_at(*images.shape[-2:]))))
        return features, torch.cat(tokens)

    def _patch_head(self, owner: Any) -> nn.Module:
        """Of the objective or of its teacher."""
        head: nn.Module = owner.head if self.config.shared_head else owner.patch_head
        return head

    # Losses

    def _spread(self, student: ImageFeatures) -> dict[str, Tensor]:
        """KoLeo on class tokens before the head, of each global crop for itself."""
        config = self.config
        found = [
            koleo(tokens, num_neighbors=config.koleo_neighbors, group_size=config.koleo_group)
            for tokens in image_token(student).chunk(_NUM_GLOBAL)
        ]
        return {
            "koleo": torch.stack([each.loss for each in found]).mean(),
            "koleo_duplicates": torch.stack([each.duplicates for each in found]).mean(),
        }

    def _total(self, terms: Mapping[str, Tensor], num_local: int, progress: Progress) -> Tensor:
        """The weighted sum; DINO's two terms weigh as many as there are pairs of crops in them."""
        config = self.config
        num_global_pairs, num_local_pairs = _NUM_GLOBAL * (_NUM_GLOBAL - 1), _NUM_GLOBAL * num_local
        dino = num_global_pairs * terms["dino_global"]
        if num_local:
            local_weight = self._ramped(config.local_weight_start, config.local_weight, progress)
            dino = dino + num_local_pairs * local_weight * terms["dino_local"]
        loss = config.dino_weight * dino / (num_global_pairs + num_local_pairs) + config.patch_weight * terms["ibot"]
        if config.koleo_weight:
            loss = loss + config.koleo_weight * _NUM_GLOBAL * terms["koleo"]
        if config.gram_weight:
            loss = loss + self._ramped(config.gram_weight_start, config.gram_weight, progress) * terms["gram"]
        return loss

    def _ramped(self, start: float | None, end: float, progress: Progress) -> float:
        """A weight that goes from `start` to `end` in the first `ramp_steps` steps, both ends included."""
        steps = self.config.ramp_steps
        if start is None or progress.step >= steps:
            return end
        return half_cosine(start, end, progress.step / max(1, steps - 1))

    # Gram anchoring

    def _move_anchor(self, done: int) -> None:
        """Give the anchor the teacher's weights where that is due after `done` steps."""
        config = self.config
        is_taken = config.gram_from == "teacher" and done == config.gram_step
        is_due = is_taken or is_refreshed(done, config.gram_every, config.gram_first, config.gram_most)
        if self.anchor is not None and is_due:
            self.anchor.take(self.teacher)

    @torch.no_grad()
    def _anchored(self, batch: dict[str, Tensor], images: Tensor, taught: _Taught) -> Tensor:
        """The anchor's patch tokens of whole global crops on the student's grid, (2 B, N, D)."""
        if self.anchor is None:
            return taught.features.patches
        if self._has_own_crops:
            images = self.backbone.normalized(torch.cat([batch["gram_1"], batch["gram_2"]]))
        with self.teacher.precision(self.backbone.dtype, images.device):
            features = self.anchor.backbone.features(images)
        config = self.config
        return on_grid(features.patches, features.grid, taught.features.grid, config.gram_resize, config.gram_antialias)

    def _gram(self, found: Tensor, anchored: Tensor, masks: BlockMasks, tokens: str) -> Tensor:
        """The loss of patch tokens (2 B, N, D), of all of them or only of masked or unmasked ones."""
        config = self.config
        level = config.gram_level
        if tokens != "all":
            idx = masks.idx if tokens == "masked" else masks.unmasked_idx
            found, anchored, level = found.flatten(0, 1)[idx], anchored.flatten(0, 1)[idx], "batch"
        return gram_loss(found, anchored, normalize=config.gram_normalize, level=level, negatives=config.gram_negatives)

    # For people

    @torch.no_grad()
    def _health(
        self, features: ImageFeatures, taught: _Taught, scores: Tensor, patch_scores: Tensor
    ) -> dict[str, Tensor]:
        """What tells a healthy run from one that is stuck, collapses, or loses its dense features of whole crops."""
        cls_loss = cross_view.cross_view_loss(taught.targets, scores)
        patch_loss = cross_view.soft_cross_entropy(taught.patch_targets, patch_scores).mean()
        metrics = {"cls_loss": cls_loss, "patch_loss": patch_loss}
        metrics |= cross_view.head_metrics("cls_", cls_loss, [taught.targets], [1.0])
        metrics |= cross_view.head_metrics("patch_", patch_loss, [taught.patch_targets], [1.0])
        first, _ = image_token(features).chunk(_NUM_GLOBAL)
        return metrics | {
            "student_marginal_entropy": entropy(scores.softmax(-1).mean(dim=(0, 1))),
            "logit_max": scores.abs().max() * self.config.student_temp,
            "effective_rank": effective_rank(first),
            "cls_cosine": patch_cosine(first[None]),  # between images
            "cls_patch_cosine": cosine_similarity(
                at_least_float32(image_token(features))[:, None], at_least_float32(features.patches), dim=-1
            ).mean(),
            "patch_cosine": patch_cosine(features.patches),
        }

    @torch.no_grad()
    def _gram_health(
        self, taught: _Taught, student: ImageFeatures, anchored: Tensor, masks: BlockMasks
    ) -> dict[str, Tensor]:
        """The student's loss on masked and on unmasked patches, and the teacher's distance from the anchor."""
        metrics = {
            f"gram_{tokens}": self._gram(student.patches, anchored, masks, tokens) for tokens in ("masked", "unmasked")
        }
        # Both see whole crops: without masks nothing but what was learned since keeps them apart.
        metrics["gram_drift"] = self._gram(taught.features.patches, anchored, masks, "all")
        return metrics

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """Uniform outputs or outputs on a few prototypes, of class tokens or patches, or one feature for all images."""
        config = self.config
        return (
            cross_view.collapse(metrics, progress, config.num_prototypes, "cls_")
            or cross_view.collapse(metrics, progress, self._num_patch_prototypes, "patch_")
            or cross_view.constant_features(metrics, progress)
        )

    @torch.no_grad()
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """At most 8 each of the crops and of what the teacher makes of the first: features as colors, attention."""
        return crops_and_features(self.exported, batch)


def _require_sense(backbone: ImageEncoder, config: DINOv3Config) -> None:
    """Refuse settings that exclude each other or would have no effect.

    Raises:
        ObjectiveError: naming the first.
    """
    mixed = {len(config.mix_share), len(config.mix_global), len(config.mix_local)}
    mistakes = {
        "objective.mix_share, mix_global and mix_local go together; give each as many items": len(mixed) > 1,
        "objective.mix_share is of all steps; its items are more than 1 in sum": sum(config.mix_share) > 1 + 1e-9,
        "objective.mix_gram is of an anchor with crops of its own; give as many items as mix_share, and gram_size": (
            bool(config.mix_gram) and (len(config.mix_gram) not in mixed or config.gram_size is None)
        ),
        "objective.gram_tokens selects patches of the whole batch; set objective.gram_level=batch": (
            config.gram_tokens != "all" and config.gram_level == "image"
        ),
        "objective.gram_size is of an anchor with crops of its own; gram_from=live has none": (
            config.gram_from == "live" and config.gram_size is not None
        ),
        "objective.gram_every refreshes an anchor; gram_from=live has none": (
            config.gram_from == "live" and config.gram_every is not None
        ),
        "objective.distill and the anchor of objective.gram_weight would both be teacher_from; set gram_weight=0": (
            config.distill and config.gram_weight > 0
        ),
        "objective.local_norm is for local crops; objective.num_local=0 has none": (
            config.local_norm and not config.num_local
        ),
        "objective.drop_path leaves out whole samples; leave out drop_path_rate among backbone.options": bool(
            backbone.spec["options"].get("drop_path_rate")
        ),
        "objective.rope_rescale, rope_jitter and rope_shift move rotary positions of DINOv3's kind; backbone "
        f"{backbone.spec['name']!r} has none: use for example vit_small_patch16_dinov3, or null": (
            (config.rope_rescale, config.rope_jitter, config.rope_shift) != (None, None, None)
            and not backbone.has_movable_positions
        ),
        "objective.shared_head takes the settings of the head of class tokens; "
        "set patch_num_prototypes as num_prototypes": config.shared_head
        and config.patch_num_prototypes != config.num_prototypes,
    }
    for mistake, is_made in mistakes.items():
        if is_made:
            raise ObjectiveError(mistake)


def _targets(center: Center | None, logits: Tensor, temperature: float) -> Tensor:
    """Distributions (N, K) of the teacher's logits (N, K), by Sinkhorn-Knopp where there is no center."""
    return sinkhorn_knopp(logits, temperature) if center is None else center.targets(logits, temperature)


def _initialize(network: nn.Module) -> None:
    """Linear layers N(0, 0.02^2) cut at 2, biases 0; timm makes the residual branches smaller with depth.

    The patch embedding, a convolution, keeps torch's bounds of 1 / sqrt(inputs).
    """
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            nn.init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                nn.init.uniform_(module.bias, -bound, bound)
