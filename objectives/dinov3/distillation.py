"""Distillation: a larger teacher that does not learn any more, and the heads that it learned with, give the targets.

O. Simeoni et al., "DINOv3", 2025, arXiv:2508.10104, section 5 (model distillation): a smaller student with heads of its
own learns what the teacher's heads make of whole images, by the losses of pretraining; its moving average is what is
exported. Patches that count in the iBOT loss are drawn as in pretraining, but the student sees them.

NOT here: the losses (`objectives.dinov3.objective`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from backbones.images.base import ImageEncoder
from objectives.companions import Companion
from objectives.dinov3.config import prototypes_unlike
from objectives.errors import ObjectiveError
from objectives.parts.frozen_teacher import FrozenBackbone
from objectives.parts.frozen_use import patches_unlike
from objectives.parts.prototypes import DINOHead

__all__ = ["FrozenTeacher"]


class FrozenTeacher:
    """Two companions that are filled from the same checkpoint: a backbone, and the heads on top of it."""

    def __init__(
        self, student: ImageEncoder, sizes: Sequence[int], num_prototypes: int, patch_num_prototypes: int
    ) -> None:
        """Begins without weights.

        Args:
            student: whose crops it sees.
            sizes: of the crops, pixels per side.
            num_prototypes, patch_num_prototypes: outputs of the student's heads, which its own must have, too.
        """
        self._backbone = _SameGrid(student, sizes)
        self._heads = _FrozenHeads(self._backbone, num_prototypes, patch_num_prototypes)

    def companions(self) -> dict[str, Companion]:
        """By name, the backbone first."""
        return {"frozen_backbone": self._backbone, "frozen_heads": self._heads}

    @property
    def backbone(self) -> ImageEncoder:
        """The encoder."""
        return self._backbone.backbone

    @property
    def head(self) -> nn.Module:
        """Of class tokens."""
        return self._heads.module.get_submodule("head")

    @property
    def patch_head(self) -> nn.Module:
        """Of patches; the same one, if the teacher learned with a shared head."""
        heads = dict(self._heads.module.named_children())
        return heads.get("patch_head", heads["head"])


class _SameGrid(FrozenBackbone):
    """An encoder with a class token whose patches are those of the student, one by one."""

    def __init__(self, student: ImageEncoder, sizes: Sequence[int]) -> None:
        super().__init__(student, sizes)
        self._patch_size = student.patch_size

    def outline(self, spec: Mapping[str, Any]) -> None:
        """Raises ObjectiveError: it has other patches, or no class token."""
        super().outline(spec)
        encoder = self.backbone
        if encoder.patch_size != self._patch_size:
            raise ObjectiveError(patches_unlike("teacher", encoder.patch_size, self._patch_size))
        if not encoder.has_cls:
            raise ObjectiveError(f"the teacher {spec['name']!r} has no class token")


class _FrozenHeads(Companion):
    """The heads of class tokens and of patches."""

    part = "heads"
    title = "its heads"

    def __init__(self, backbone: FrozenBackbone, num_prototypes: int, patch_num_prototypes: int) -> None:
        super().__init__(nn.ModuleDict(), filled="checkpoint", moves="frozen", saved="reference")
        self._backbone = backbone
        self._wanted = (num_prototypes, patch_num_prototypes)

    def outline(self, spec: Mapping[str, Any]) -> None:
        """Become the heads that `spec` describes, those of `DINOv3.exported_heads`.

        Raises:
            ObjectiveError: they have other prototypes than the student's, or are not of this backbone or this kind.
        """
        try:
            heads = {name: DINOHead(**facts) for name, facts in spec.items()}
            of_tokens = {"head": heads["head"], "patch_head": heads.get("patch_head", heads["head"])}
        except (KeyError, TypeError) as error:
            raise ObjectiveError("the teacher's heads are not those of objective dinov3") from error
        for name, head in of_tokens.items():
            if head.spec["dim"] != self._backbone.backbone.embed_dim:
                raise ObjectiveError(
                    f"the teacher's {name} takes tokens of {head.spec['dim']} numbers, and its backbone has "
                    f"{self._backbone.backbone.embed_dim}"
                )
        if unlike := list(prototypes_unlike(spec, *self._wanted)):
            raise ObjectiveError("; ".join(unlike))
        self.module = nn.ModuleDict(heads).requires_grad_(False).eval()
