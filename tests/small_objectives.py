"""Sizes of every objective that ships which make a step cheap, for 32-pixel images; everything else is the default."""

from __future__ import annotations

from typing import Any

__all__ = ["SMALL"]

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
