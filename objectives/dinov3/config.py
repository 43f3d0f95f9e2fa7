"""Settings of DINOv3. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from objectives.parts.frozen_use import FrozenTeacherConfig, TeacherUse, patches_unlike
from objectives.parts.settings import GLOBAL_SCALE, LAST_LAYERS, LOCAL_SCALE, DistillationConfig, MultiCropConfig

__all__ = ["DINOv3Config", "prototypes_unlike"]

_WEIGHT = {"range": (0.0, 1000.0)}
_SHARE = {"range": (0.0, 1.0)}
_WIDTH = {"range": (1, 65536)}
_PROTOTYPES = {"range": (2, 2**20)}
_STEPS = {"range": (0, 10**9)}
_PIXELS = {"range": (1, 8192)}


@dataclass
class DINOv3Config(FrozenTeacherConfig, DistillationConfig, MultiCropConfig):
    """DINOv3 (Simeoni et al. 2025, arXiv:2508.10104); defaults are the authors' ViT-L/16 run on ImageNet-1k.

    With `sinkhorn`, separate heads and no Gram anchoring it is DINOv2 (arXiv:2304.07193); with `targets: softmax`,
    `shared_head` and `patch_center: all` iBOT (arXiv:2111.07832).
    """

    teacher_settings: ClassVar[str] = (
        "objective.distill=true, or objective.gram_weight above 0 with objective.gram_from=checkpoint"
    )
    name: str = "dinov3"

    # Crops
    global_scale: list[float] = field(default_factory=lambda: [0.32, 1.0], metadata=GLOBAL_SCALE)
    local_scale: list[float] = field(default_factory=lambda: [0.05, 0.32], metadata=LOCAL_SCALE)
    # The released code blurs with the complement of the probabilities that it names (1.0, 0.1, 0.5), and so were all
    # released weights made; DINO and BYOL used the named ones.
    blur_p: list[float] = field(
        default_factory=lambda: [0.0, 0.9, 0.5],
        metadata=_SHARE | {"length": 3, "help": "probability of blur of the first global, second global, local crops"},
    )

    # Other sizes that a share of the steps has instead, the same on all ranks: item i of each list goes together
    mix_share: list[float] = field(default_factory=list, metadata=_SHARE | {"help": "shares of the steps"})
    mix_global: list[int] = field(
        default_factory=list, metadata=_PIXELS | {"help": "sides of the global crops in pixels, one for each share"}
    )
    mix_local: list[int] = field(default_factory=list, metadata=_PIXELS | {"help": "sides of the local crops"})
    mix_gram: list[int] = field(
        default_factory=list, metadata=_PIXELS | {"help": "sides of the anchor's crops; with gram_size only"}
    )

    # Heads
    num_prototypes: int = field(default=65536, metadata=_PROTOTYPES | {"help": "outputs of the head of class tokens"})
    head_hidden_dim: int = field(default=2048, metadata=_WIDTH | {"help": "width of that head's layers"})
    head_bottleneck_dim: int = field(default=256, metadata=_WIDTH | {"help": "width before its prototypes"})
    shared_head: bool = field(default=False, metadata={"help": "patches go through the head of class tokens (iBOT)"})
    patch_num_prototypes: int = field(default=65536, metadata=_PROTOTYPES | {"help": "outputs of the head of patches"})
    patch_head_hidden_dim: int = field(default=2048, metadata=_WIDTH | {"help": "width of that head's layers"})
    patch_head_bottleneck_dim: int = field(default=256, metadata=_WIDTH | {"help": "width before its prototypes"})
    last_layer: str = field(
        default="linear",
        metadata={
            "choices": LAST_LAYERS,
            "help": "of both heads; weight_norm learns in short runs with few images, where linear stays at ln K",
        },
    )

    # Targets
    distill: bool = field(
        default=False,
        metadata={"help": "they come from teacher_from and its heads, a frozen teacher; the student sees whole crops"},
    )
    teacher_temp: float = field(
        default=0.07, metadata={"range": (0.001, 10.0), "help": "softmax temperature of the teacher after its warm-up"}
    )
    teacher_temp_warmup: float = field(
        default=0.3, metadata=_SHARE | {"help": "share of the steps in which it goes from start to end"}
    )
    teacher_temp_inclusive: bool = field(
        default=True, metadata={"help": "the last step of its warm-up has the end, not the step after it"}
    )
    patch_teacher_temp: float | None = field(
        default=None,
        metadata={
            "range": (0.001, 10.0),
            "help": "the same for patches, after the same warm-up; null: as class tokens",
        },
    )
    teacher_momentum: float = field(
        default=0.992, metadata=_SHARE | {"help": "share of the teacher kept per step at the start"}
    )
    teacher_momentum_end: float = field(
        default=1.0, metadata=_SHARE | {"help": "and at the end, by half a cosine; as at the start: constant"}
    )
    targets: str = field(
        default="sinkhorn",
        metadata={"choices": ("sinkhorn", "softmax"), "help": "how the teacher's logits become targets"},
    )
    # With few images in a step Sinkhorn-Knopp flattens the targets of class tokens, while centers of patches collapse.
    patch_targets: str | None = field(
        default=None,
        metadata={"choices": ("sinkhorn", "softmax"), "help": "the same for patches; null: as class tokens"},
    )
    center_momentum: float = field(
        default=0.9, metadata=_SHARE | {"help": "with softmax: share of the teacher's centers that is kept per step"}
    )
    patch_center: str = field(
        default="masked", metadata={"choices": ("masked", "all"), "help": "with softmax: patches whose mean it is"}
    )

    # Masks
    mask_share: float = field(default=0.5, metadata=_SHARE | {"help": "share of the global crops that is masked"})
    mask_ratio: list[float] = field(
        default_factory=lambda: [0.1, 0.5],
        metadata={"range": (0.0, 0.9), "length": 2, "help": "least and greatest share of a masked crop's patches"},
    )

    # Weights of the losses
    dino_weight: float = field(default=1.0, metadata=_WEIGHT | {"help": "of the loss of class tokens"})
    local_weight: float = field(default=1.0, metadata=_WEIGHT | {"help": "of local crops within it"})
    local_weight_start: float | None = field(
        default=None, metadata=_WEIGHT | {"help": "the same at the start, see ramp_steps; null: no change"}
    )
    patch_weight: float = field(default=1.0, metadata=_WEIGHT | {"help": "of the loss of masked patches"})
    koleo_weight: float = field(default=0.1, metadata=_WEIGHT | {"help": "of KoLeo, for each global crop"})
    koleo_neighbors: int = field(default=1, metadata={"range": (1, 64), "help": "nearest rows that KoLeo averages"})
    koleo_group: int | None = field(
        default=None,
        metadata={"range": (2, 2**20), "help": "images, of adjacent ranks, among which they are; null: a micro-batch"},
    )
    ramp_steps: int = field(
        default=0, metadata=_STEPS | {"help": "steps in which weights with a start go to their end, by half a cosine"}
    )

    # Gram anchoring
    gram_weight: float = field(default=0.0, metadata=_WEIGHT | {"help": "of Gram anchoring; 0: none"})
    gram_weight_start: float | None = field(
        default=None, metadata=_WEIGHT | {"help": "the same at the start, see ramp_steps; null: no change"}
    )
    gram_from: str = field(
        default="checkpoint",
        metadata={
            "choices": ("checkpoint", "teacher", "live"),
            "help": "the anchor: teacher_from, the teacher as it is at step gram_step, or the teacher of each step",
        },
    )
    gram_step: int = field(default=0, metadata=_STEPS | {"help": "with gram_from=teacher: steps done when it is taken"})
    gram_every: int | None = field(
        default=None, metadata={"range": (1, 10**9), "help": "steps after which the anchor takes the teacher's weights"}
    )
    gram_first: int = field(default=0, metadata=_STEPS | {"help": "steps done before it does so for the first time"})
    gram_most: int = field(default=3, metadata={"range": (1, 10**6), "help": "how many times it does so"})
    gram_size: int | None = field(
        default=None,
        metadata={
            "range": (1, 8192),
            "help": "side in pixels of the anchor's crops, which are not distorted then; null: the global crops",
        },
    )
    gram_level: str = field(
        default="image", metadata={"choices": ("image", "batch"), "help": "compare patches of an image or of the batch"}
    )
    gram_tokens: str = field(
        default="all",
        metadata={"choices": ("all", "masked", "unmasked"), "help": "which patches; masked ones need gram_level=batch"},
    )
    gram_negatives: str = field(
        default="keep",
        metadata={"choices": ("keep", "remove", "remove_teacher"), "help": "negative similarities, or those set to 0"},
    )
    gram_normalize: bool = field(default=True, metadata={"help": "compare cosines, not products"})
    gram_resize: str = field(
        default="bicubic",
        metadata={"choices": ("bicubic", "bilinear"), "help": "how the anchor's features come to the student's grid"},
    )
    gram_antialias: bool = field(default=False, metadata={"help": "with antialiasing"})

    # The student while it trains
    drop_path: float = field(
        default=0.3, metadata={"range": (0.0, 0.9), "help": "share of the samples that each branch leaves out"}
    )
    rope_rescale: float | None = field(
        default=None, metadata={"range": (1.0, 100.0), "help": "coordinates times up to this, or divided; per block"}
    )
    rope_jitter: float | None = field(
        default=None, metadata={"range": (1.0, 100.0), "help": "the same, of each axis for itself"}
    )
    rope_shift: float | None = field(
        default=None, metadata={"range": (0.0, 2.0), "help": "coordinates, which span 2, plus or minus up to this"}
    )
    local_norm: bool = field(
        default=False, metadata={"help": "class tokens of local crops have a final norm of their own (7B)"}
    )

    # Its optimizer
    patch_embed_lr: float = field(
        default=0.2, metadata=_SHARE | {"help": "learning rate of the patch embedding, times"}
    )

    @property
    def targets_of_patches(self) -> str:
        return self.targets if self.patch_targets is None else self.patch_targets

    def teacher_use(self) -> TeacherUse | None:
        """Distillation has a teacher with its heads, Gram anchoring an anchor unless that comes from the run itself."""
        if self.distill:
            return TeacherUse("distill", True, "a teacher", "false", needs_heads=True)
        if self.gram_weight and self.gram_from == "checkpoint":
            return TeacherUse("gram_weight", self.gram_weight, "an anchor", "0")
        return None

    def teacher_misfits(
        self, patch_size: int | None, teacher: Mapping[str, Any], heads: Mapping[str, Any] | None
    ) -> Iterator[str]:
        """Patches of another size, and heads with other prototypes."""
        found = teacher.get("patch_size")
        if isinstance(found, int) and patch_size is not None and found != patch_size:
            yield patches_unlike("teacher" if self.distill else "anchor", found, patch_size)
        if self.distill and heads is not None:
            patch = self.num_prototypes if self.shared_head else self.patch_num_prototypes
            yield from prototypes_unlike(heads, self.num_prototypes, patch)


def prototypes_unlike(heads: Mapping[str, Any], num_prototypes: int, patch_num_prototypes: int) -> Iterator[str]:
    """The mistakes of a teacher's heads with other prototypes than the student's, which these numbers are."""
    wanted = {"head": ("num_prototypes", num_prototypes), "patch_head": ("patch_num_prototypes", patch_num_prototypes)}
    for name, (setting, own) in wanted.items():
        facts = heads.get(name, heads.get("head"))  # the same one, if the teacher learned with a shared head
        found = facts.get("num_prototypes") if isinstance(facts, Mapping) else None
        if isinstance(found, int) and found != own:
            yield f"the teacher's {name} has {found} prototypes, the student's {own}; set objective.{setting}={found}"
