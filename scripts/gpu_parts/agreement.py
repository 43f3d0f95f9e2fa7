"""Whether a GPU computes what a CPU does, and a ZeRO stage what stage 0 does."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from gpu_parts.questions import Check, Row, difference, verdict
from gpu_parts.training import losses, recipe_of

__all__ = ["OBJECTIVES", "PARITY", "parity", "reference", "zero"]

# A small recipe of every objective. Its own learning rate matters not: the two steps of `losses` have one of their own.
OBJECTIVES: dict[str, tuple[str, tuple[str, ...]]] = {
    "mae": ("mae_cifar10", ()),
    "dino": ("dino_cifar10", ()),
    "dinov3": ("dinov3_cifar10", ("objective.gram_weight=1.0", "objective.gram_from=teacher", "objective.gram_step=0")),
    "sit": ("sit_cifar10", ()),
    "gmml": ("gmml_cifar10", ()),
    "selfpatch": ("selfpatch_cifar10", ()),
    "distillation": ("dino_cifar10", ("objective={name: distillation, teacher_dim: 32}", "teacher_from=unused")),
    "point_mae": ("point_mae_psb", ()),
    "nerf_mae": ("nerf_mae_synthetic", ()),
    "volume_mae": ("volume_mae_hippocampus", ()),
    "uni4eye": ("uni4eye_hippocampus", ()),
}
PARITY = 1e-4  # relative, of losses and gradient norms in float32 without TF32; between two CPUs 1e-6 were seen
ZERO = 1e-4  # relative, of losses in float32 between ZeRO stages


def objective_recipe(check: Check, name: str) -> Any:
    recipe, overrides = OBJECTIVES[name]
    overrides = ("train.zero_stage=0", "train.precision=fp32", "train.tf32=false", *overrides)
    return recipe_of(check, recipe, 4 if check.quick else 16, overrides)


def reference(check: Check, case: str) -> Row:
    """Two steps of an objective on the CPU."""
    return losses(check, objective_recipe(check, case), 2)


def parity(check: Check, case: str) -> Row:
    """The same two steps on the device."""
    expected = check.rows("reference").get(case, {})
    if "loss" not in expected:
        raise RuntimeError(f"no reference: {expected.get('error', 'the part has not run')}")
    found = losses(check, objective_recipe(check, case), 2)
    each = {name: difference(found[name], expected[name]) for name in ("loss", "grad_norm")}
    largest = math.nan if any(map(math.isnan, each.values())) else max(each.values())
    note = {"note": "a CPU beside itself: zero, and says nothing of a GPU"} if check.device == "cpu" else {}
    return verdict(note | found | {"differences": each, "difference": largest}, "difference", PARITY)


@cache
def unsharded(check: Check) -> Row:
    return losses(check, zero_recipe(check, 0), 3)


def zero_recipe(check: Check, stage: int) -> Any:
    overrides = (f"train.zero_stage={stage}", "train.precision=fp32", "train.tf32=false")
    return recipe_of(check, "mae_cifar10", 16, overrides)


def zero(check: Check, case: str) -> Row:
    """Three steps of MAE in float32 in a ZeRO stage, beside those of stage 0."""
    found, expected = losses(check, zero_recipe(check, int(case)), 3), unsharded(check)
    return verdict(found | {"difference": difference(found["loss"], expected["loss"])}, "difference", ZERO)
