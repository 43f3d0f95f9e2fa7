"""Deterministic inputs and weights of the golden cases, rebuilt from their written recipe."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones.registry import create_backbone
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE


class GoldenRecipe:
    """Counter-hash numbers, images and weights as the golden values' specification defines them."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values = values

    @staticmethod
    def uniform(name: str, count: int) -> np.ndarray:
        """`count` float64 numbers in (0, 1): murmur3's finaliser over a Weyl sequence from crc32(name)."""
        z = np.arange(1, count + 1, dtype=np.uint32)  # uint32 wraps around by itself
        z *= np.uint32(0x9E3779B9)
        z += np.uint32(zlib.crc32(name.encode()))
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            z ^= z >> np.uint32(shift)
            z *= np.uint32(factor)
        z ^= z >> np.uint32(16)
        return (z + 0.5) / 2.0**32

    def fill(self, name: str, shape: tuple[int, ...], amplitude: float) -> Tensor:
        values = amplitude * (2 * self.uniform(name, math.prod(shape)) - 1)
        return torch.from_numpy(values.astype(np.float32).reshape(shape))

    @staticmethod
    def image(num: int, channels: int, height: int, width: int, tag: float) -> Tensor:
        n, c, i, j = np.meshgrid(*(np.arange(size) for size in (num, channels, height, width)), indexing="ij")
        waves = np.sin(0.9 * n + 1.7 * c + 0.31 * i + 0.17 * j + tag)
        chirp = np.cos(0.05 * i * j + 0.3 * c - 0.2 * n + 0.7 * tag)
        return torch.from_numpy((waves + 0.5 * chirp).astype(np.float32))

    def weight(self, prefix: str, name: str, shape: tuple[int, ...]) -> Tensor:
        last = name.rpartition(".")[2]
        if last in {"cls_token", "mask_token", "masked_embed", "pos_embed"}:
            return self.fill(prefix + name, shape, 0.5)
        if last == "bias":
            return self.fill(prefix + name, shape, 0.1)
        if len(shape) == 1:
            return 1 + self.fill(prefix + name, shape, 0.1)
        return self.fill(prefix + name, shape, math.sqrt(3 / math.prod(shape[1:])))


def official_name(name: str) -> str:
    """Our parameter name -> the name in the golden file."""
    for ours, theirs in (
        ("backbone.vit.", ""),
        ("decoder.embed", "decoder_embed"),
        ("decoder.blocks", "decoder_blocks"),
        ("decoder.norm", "decoder_norm"),
        ("decoder.predict", "decoder_pred"),
        ("decoder.mask_token", "mask_token"),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


class GoldenMAE:
    """The golden MAE cases on our implementation."""

    def __init__(self, recipe: GoldenRecipe) -> None:
        self.recipe = recipe
        self.values = recipe.values

    def build(self, dtype: torch.dtype = torch.float64, options: Mapping[str, Any] = {}, **config: Any) -> MAE:
        """The small model (ViT 64 x 2, patch 4, 32 px) with the recipe's weights; images pass unnormalised."""
        vit = {"embed_dim": 64, "depth": 2, "num_heads": 4} | dict(options)
        decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4} | config
        return self.filled("vit_tiny_patch16_224", 32, 4, vit, MAEConfig(**decoder)).to(dtype)

    def filled(self, name: str, image_size: int, patch_size: int, options: dict[str, Any], config: MAEConfig) -> MAE:
        backbone = create_backbone(
            name, image_size=image_size, patch_size=patch_size, options=options, pixel_mean=[0] * 3, pixel_std=[1] * 3
        )
        mae = MAE(backbone, config)
        with torch.no_grad():
            for key, parameter in mae.named_parameters():
                parameter.copy_(self.recipe.weight("mae.", official_name(key), tuple(parameter.shape)))
        return mae

    def batch(self, dtype: torch.dtype = torch.float64, tag: float = 0.0) -> dict[str, Tensor]:
        noise = torch.from_numpy(self.recipe.uniform("mae.noise", 128)).view(2, 64)
        return {"image": self.recipe.image(2, 3, 32, 32, tag).to(dtype), "noise": noise}


@pytest.fixture(scope="session")
def golden_recipe() -> GoldenRecipe:
    path = Path(__file__).parent.parent / "golden" / "mae.json"
    return GoldenRecipe(json.loads(path.read_text(encoding="utf-8")))


@pytest.fixture(scope="session")
def golden_mae(golden_recipe: GoldenRecipe) -> GoldenMAE:
    return GoldenMAE(golden_recipe)


@pytest.fixture(scope="session")
def official_names() -> Any:
    return official_name
