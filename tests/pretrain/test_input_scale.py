"""Data in other units than a backbone expects are named at the first batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.registry import create_backbone
from objectives.base import Objective
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.nerf_mae.objective import NeRFMAE
from objectives.uni4eye.config import Uni4EyeConfig
from objectives.uni4eye.objective import Uni4Eye
from objectives.volume_mae.config import VolumeMAEConfig
from objectives.volume_mae.objective import VolumeMAE
from pretrain.training.input_scale import scale_warning

SMALL: dict[str, Any] = {"size": [16, 16, 16], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
DECODER: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2}
FIELDS = frozenset({"volume.npy", "jpg", "grid.npy"})
CPU = torch.device("cpu")


def volume_mae(**settings: Any) -> Objective:
    backbone = create_backbone("voxel_vit", kind="voxels", **SMALL | settings)
    return VolumeMAE(backbone, VolumeMAEConfig(**DECODER))


def tissue(num: int = 2, channels: int = 1) -> Tensor:
    """(num, channels, 16, 16, 16) in [0, 1], with a mean of 0.5 and a deviation of 0.29."""
    return torch.rand(num, channels, 16, 16, 16, generator=torch.Generator().manual_seed(0))


def batch(volume: Tensor, size: int = 16) -> dict[str, Tensor]:
    return {"volume": volume, "volume.size": torch.full((len(volume), 3), size)}


FITTING: dict[str, tuple[dict[str, Any], Tensor]] = {
    "bytes": ({"voxel_mean": [0.4], "voxel_std": [0.25]}, (tissue() * 255).to(torch.uint8)),
    "floats without settings": ({}, tissue()),
    "units with a window": ({"voxel_window": [-160.0, 240.0]}, tissue() * 2000 - 1000),
    "units with their own mean": ({"voxel_mean": [0.0], "voxel_std": [600.0]}, tissue() * 2000 - 1000),
    "nothing but air": ({}, torch.zeros(2, 1, 16, 16, 16)),
}


@pytest.mark.parametrize("case", FITTING)
def test_scale_warning__data_that_fit_are_no_matter(case: str) -> None:
    settings, volume = FITTING[case]
    assert scale_warning(volume_mae(**settings), batch(volume), FIELDS, CPU) is None


def test_scale_warning__names_field_values_and_settings() -> None:
    """Hounsfield units before a recipe of bytes."""
    model = volume_mae(voxel_mean=[0.4], voxel_std=[0.25])
    said = scale_warning(model, batch((tissue() * 2000 - 1000).to(torch.int16)), FIELDS, CPU)
    assert said is not None and "\n" not in said
    assert said.startswith("field volume.npy holds values from -999 to 999 (mean ")
    assert (
        "; backbone.voxel_window=[] backbone.voxel_mean=[0.4] backbone.voxel_std=[0.25] make of them a mean of " in said
    )


FAR: dict[str, tuple[dict[str, Any], Tensor]] = {
    "far from the mean": ({}, tissue() + 100),
    "wide": ({}, (tissue() - 0.5) * 2000),
    "hardly different": ({"voxel_std": [600.0]}, tissue()),
    "bytes before a recipe of units": ({"voxel_mean": [-500.0]}, (tissue() * 255).to(torch.uint8)),
    "a window beside the values": ({"voxel_window": [-160.0, 240.0], "voxel_std": [0.25]}, tissue()),
}


@pytest.mark.parametrize("case", FAR)
def test_scale_warning__data_in_other_units(case: str) -> None:
    settings, volume = FAR[case]
    assert scale_warning(volume_mae(**settings), batch(volume), FIELDS, CPU) is not None


def test_scale_warning__one_channel_of_several_and_no_padding() -> None:
    model = volume_mae(in_chans=2)
    values = tissue(channels=2)
    values[:, :, 8:] = 5000  # beyond their size
    assert scale_warning(model, batch(values, size=8), FIELDS, CPU) is None
    values[:, 1] *= 300
    said = scale_warning(model, batch(values, size=8), FIELDS, CPU)
    assert said is not None and said.startswith("channel 1 of field volume.npy holds values from ")


def test_scale_warning__photos_are_checked_as_well() -> None:
    encoder = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 1})
    model = MAE(encoder, MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2))
    pixels = torch.rand(2, 3, 32, 32)
    assert scale_warning(model, {"image": (pixels * 255).to(torch.uint8)}, FIELDS, CPU) is None
    said = scale_warning(model, {"image": pixels * 10_000}, FIELDS, CPU)
    assert said is not None and "field jpg holds" in said and "backbone.pixel_mean=[0.485, " in said
    both = create_backbone("unified_vit", kind="voxels", **SMALL, image_size=16, image_patch_size=8)
    joined = {"image": torch.rand(2, 3, 16, 16), **batch(tissue() * 4000)}
    said = scale_warning(Uni4Eye(both, Uni4EyeConfig(**DECODER)), joined, FIELDS, CPU)
    assert said is not None and said.startswith("field volume.npy holds")


def test_scale_warning__grids_are_checked_where_they_are_read() -> None:
    swin = create_backbone("voxel_swin", kind="voxels", size=[16] * 3, embed_dim=6, depths=[1, 1], num_heads=[1, 1])
    model = NeRFMAE(swin, NeRFMAEConfig(mask_block=1))
    grid = torch.zeros(1, 4, 16, 16, 16)
    grid[:, :, 0, 0, 0] = 0.1
    assert scale_warning(model, {"grid": grid, "grid.size": torch.full((1, 3), 16)}, FIELDS, CPU) is None
