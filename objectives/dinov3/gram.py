"""Gram anchoring: the similarities between the patches of an image stay those of an earlier, frozen teacher.

O. Simeoni et al., "DINOv3", 2025, arXiv:2508.10104, section 4. In long runs the class token goes on improving while
patch features lose their locality; a student whose patch similarities are tied to those of an early teacher keeps
both. The loss is the mean over all entries of the matrices, where the paper's formula has the sum.

Legend: B crops, N patches, D width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from backbones.images.base import ImageEncoder
from backbones.precision import at_least_float32
from objectives.companions import Companion
from objectives.errors import ObjectiveError
from objectives.parts.frozen_use import patches_unlike
from objectives.teacher import Teacher

__all__ = ["GramTeacher", "gram_loss", "is_refreshed"]


def gram_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    normalize: bool = True,
    level: str = "image",
    negatives: str = "keep",
) -> Tensor:
    """Mean squared difference of the patches' similarities, a scalar in at least float32.

    Args:
        student: (B, N, D) patch tokens after the final norm; (1, n, D) for any n tokens taken together.
        teacher: the same of the anchor.
        normalize: similarities are cosines, not products.
        level: "image" compares the patches of an image, (B, N, N) numbers; "batch" all patches of the batch.
        negatives: "keep"; "remove" sets negative similarities of both to 0; "remove_teacher" those of the teacher.
    """
    student, teacher = (at_least_float32(tokens) for tokens in (student, teacher))
    if level == "batch":
        student, teacher = student.flatten(0, -2), teacher.flatten(0, -2)  # (B N, D)
    if normalize:
        student, teacher = functional.normalize(student, dim=-1), functional.normalize(teacher, dim=-1)
    wanted, found = teacher @ teacher.mT, student @ student.mT
    if negatives != "keep":
        wanted = wanted.clamp_min(0)
    if negatives == "remove":
        found = found.clamp_min(0)
    return functional.mse_loss(found, wanted)


def is_refreshed(done: int, every: int | None, first: int, most: int) -> bool:
    """Whether the anchor takes the weights of the teacher when `done` steps are done.

    That is at the first `most` multiples of `every` from `first` on: a function of the step alone, so that a restart
    need not remember how many there were.
    """
    if not every:
        return False
    begin = math.ceil(max(first, 1) / every) * every
    return done % every == 0 and begin <= done < begin + most * every


class GramTeacher(Companion):
    """The anchor: a backbone in evaluation mode and float32 that changes only when it takes the teacher's weights."""

    title = "Gram anchor"
    remedy = "an anchor is of the student's architecture: set backbone as in the run that it comes from"

    def __init__(self, backbone: ImageEncoder, *, from_checkpoint: bool) -> None:
        super().__init__(
            copy.deepcopy(backbone).float(),
            filled="checkpoint" if from_checkpoint else "objective",
            moves="frozen",
            saved="whole",
        )

    @property
    def backbone(self) -> ImageEncoder:
        """The network."""
        assert isinstance(self.module, ImageEncoder)
        return self.module

    def outline(self, spec: Mapping[str, Any]) -> None:
        """It is the student, and stays so. Raises ObjectiveError: the weights are of another patch size."""
        if (found := spec.get("patch_size", self.backbone.patch_size)) != self.backbone.patch_size:
            raise ObjectiveError(patches_unlike("anchor", found, self.backbone.patch_size))

    @torch.no_grad()
    def take(self, teacher: Teacher) -> None:
        """Become the teacher's backbone."""
        for own, value in zip(self.module.parameters(), teacher.backbone.parameters(), strict=True):
            self.share_of(own).copy_(teacher.share_of(value))  # both are whole, or both are cut alike
