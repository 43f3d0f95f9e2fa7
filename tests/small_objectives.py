"""What makes a step of every objective cheap: its sizes, a backbone, data; and a teacher for those that need one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backbones.images.config import ImageConfig
from backbones.points.config import PointTransformerConfig
from backbones.registry import create_backbone
from backbones.voxels.config import UnifiedVitConfig, VoxelSwinConfig, VoxelVitConfig
from objectives.base import Objective
from tests import small_data

__all__ = ["SMALL", "backbone_of", "data_of", "kind_of", "with_frozen_teacher"]

PHOTOS = Path(__file__).resolve().parents[1] / "pretrain" / "demo_data" / "grocery"
# Of the objectives that encode something else than images.
_KINDS = {"nerf_mae": "voxels", "point_mae": "points", "uni4eye": "voxels", "volume_mae": "voxels"}
# By objective, else by kind.
_BACKBONES: dict[str, Any] = {
    "image": ImageConfig("vit_tiny_patch16_224", 32, 8, options={"depth": 3, "embed_dim": 48, "num_heads": 3}),
    "points": PointTransformerConfig(
        num_points=96,
        num_groups=12,
        group_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        tokenizer_dim=8,
        drop_path=0.0,
    ),
    "nerf_mae": VoxelSwinConfig(size=[16, 16, 16], embed_dim=12, depths=[1, 2], num_heads=[1, 2], drop_path=0.0),
    "uni4eye": UnifiedVitConfig(
        size=[16, 16, 16],
        patch_size=4,
        image_size=32,
        image_patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
    ),
    "volume_mae": VoxelVitConfig(size=[16, 16, 16], patch_size=4, embed_dim=48, depth=3, num_heads=3),
}
_DATA = {
    "image": lambda: PHOTOS,
    "points": small_data.clouds,
    "nerf_mae": small_data.grids,
    "uni4eye": small_data.photos_and_volumes,
    "volume_mae": small_data.volumes,
}

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
SMALL["nerf_mae"] = {"mask_block": 2}
SMALL["volume_mae"] = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2, "volume_array": "image"}
SMALL["uni4eye"] = SMALL["volume_mae"]
SMALL["point_mae"] = {"decoder_depth": 1, "decoder_heads": 3, "decoder_drop_path": 0.0}


def kind_of(name: str) -> str:
    """What the backbone of an objective encodes."""
    return _KINDS.get(name, "image")


def backbone_of(name: str) -> Any:
    """Settings of a small backbone for an objective."""
    return _BACKBONES.get(name) or _BACKBONES[kind_of(name)]


def data_of(name: str) -> Path:
    """A folder with train-*.tar of what an objective learns from."""
    return (_DATA.get(name) or _DATA[kind_of(name)])()


def with_frozen_teacher(objective: Objective) -> Objective:
    """The objective, with a random encoder of 32 numbers a token where it would have one of a checkpoint."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        for companion in objective.companions().values():
            if companion.filled == "checkpoint":
                options = {"depth": 1, "embed_dim": 32, "num_heads": 2}
                companion.outline(create_backbone("vit_tiny_patch16_224", image_size=32, options=options).spec)
    return objective
