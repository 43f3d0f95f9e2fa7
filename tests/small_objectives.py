"""Sizes of every objective that make a step cheap, for 32-pixel images, and a teacher for those that need one."""

from __future__ import annotations

from typing import Any

import torch

from backbones.registry import create_backbone
from objectives.base import Objective

__all__ = ["SMALL", "with_frozen_teacher"]

SMALL: dict[str, dict[str, Any]] = {
    "mae": {"decoder_dim": 48, "decoder_depth": 1, "decoder_heads": 3},
    "dino": {"num_prototypes": 64, "head_hidden_dim": 64, "head_bottleneck_dim": 32, "num_local": 2, "local_size": 24},
    "sit": {"projector_hidden_dim": 64, "projector_dim": 32},
    "gmml": {},
}
SMALL["selfpatch"] = SMALL["dino"] | {"num_patch_prototypes": 32}
SMALL["dinov3"] = SMALL["dino"] | {
    "patch_num_prototypes": 32,
    "patch_head_hidden_dim": 64,
    "patch_head_bottleneck_dim": 32,
}
SMALL["distillation"] = {"teacher_dim": 32, "head_hidden_dim": 48}


def with_frozen_teacher(objective: Objective) -> Objective:
    """The objective, with a random encoder of 32 numbers a token where it would have one of a checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for companion in objective.companions().values():
            if companion.filled == "checkpoint":
                options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
                companion.outline(create_backbone("vit_tiny_patch16_224", image_size=32, options=options).spec)
    return objective
