"""What heads of a checkpoint fill in is what the objective that trained them predicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from backbones.errors import BackboneError
from backbones.registry import create_backbone
from backbones.voxels.patches import to_patches
from backbones.voxels.reconstruction import Reconstruction, reconstruction_of
from objectives.base import Objective
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.nerf_mae.objective import NeRFMAE
from objectives.volume_mae.config import VolumeMAEConfig
from objectives.volume_mae.objective import VolumeMAE

SWIN: dict[str, Any] = {"size": [16, 24, 16], "embed_dim": 12, "depths": [1, 2], "num_heads": [1, 2]}
VIT: dict[str, Any] = {"size": [16, 24, 16], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
VIT |= {"voxel_mean": [0.3], "voxel_std": [0.2]}


def _nerf_mae() -> NeRFMAE:
    torch.manual_seed(0)
    return NeRFMAE(create_backbone("voxel_swin", kind="voxels", **SWIN), NeRFMAEConfig(mask_block=2)).eval()


def _volume_mae(**settings: Any) -> VolumeMAE:
    torch.manual_seed(0)
    sizes = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5, "norm_pix_loss": False}
    return VolumeMAE(create_backbone("voxel_vit", kind="voxels", **VIT), VolumeMAEConfig(**sizes | settings)).eval()


def _rebuilt(objective: Objective) -> Reconstruction:
    heads = objective.exported_heads()
    assert heads is not None and heads.from_start
    return reconstruction_of(objective.exported, heads.spec, heads.tensors)


@torch.no_grad()
def test_covered__fills_in_what_nerf_mae_predicts() -> None:
    objective = _nerf_mae()
    grid = torch.rand(2, 4, 16, 24, 16, generator=torch.Generator().manual_seed(1))
    batch = {"grid": grid, "grid.size": torch.tensor([[16, 24, 16]] * 2), "seed": torch.tensor([3, 4])}
    expected = objective._reconstruct(batch).prediction
    filled = _rebuilt(objective)(grid, objective._mask(batch))
    torch.testing.assert_close(filled[:, :3], expected[:, :3].clamp(0, 1))
    torch.testing.assert_close(filled[:, 3], expected[:, 3].sigmoid())


@torch.no_grad()
def test_left_out__fills_in_what_volume_mae_predicts() -> None:
    objective = _volume_mae()
    volume = torch.rand(2, 1, 16, 24, 16, generator=torch.Generator().manual_seed(1))
    batch = {"volume": volume, "volume.size": torch.tensor([[16, 24, 16]] * 2), "seed": torch.tensor([3, 4])}
    result = objective._reconstruct(batch)
    model = _rebuilt(objective)
    filled = to_patches(model(volume, result.mask.is_masked.unflatten(1, (2, 3, 2))), 8)  # (B, N, L)
    hidden = torch.stack([row[idx] for row, idx in zip(filled, result.mask.drop_idx, strict=True)])
    torch.testing.assert_close(hidden, result.prediction * 0.2 + 0.3)
    assert not torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("objective", [_nerf_mae(), _volume_mae()], ids=["covered", "left_out"])
@torch.no_grad()
def test_reconstruction__does_not_look_at_what_is_hidden(objective: Objective) -> None:
    model = _rebuilt(objective)
    grid = [side // model.cube for side in SWIN["size"]]
    is_hidden = torch.zeros(1, *grid, dtype=torch.bool)
    is_hidden[:, 1:] = True
    channels = model.encoder.in_chans
    volume = torch.rand(1, channels, 16, 24, 16, generator=torch.Generator().manual_seed(1))
    other = volume.clone()
    other[:, :, model.cube :] = 0.5
    hidden = slice(model.cube, None)
    assert torch.equal(model(volume, is_hidden)[:, :, hidden], model(other, is_hidden)[:, :, hidden])
    other[:, :, 0] = 0.5
    assert not torch.equal(model(volume, is_hidden)[:, :, hidden], model(other, is_hidden)[:, :, hidden])


def test_volume_mae__exports_a_decoder_of_voxels_as_they_are_alone() -> None:
    assert _volume_mae(norm_pix_loss=True).exported_heads() is None


def test_reconstruction_of__other_heads_are_refused() -> None:
    objective = _nerf_mae()
    heads, encoder = objective.exported_heads(), objective.backbone
    with pytest.raises(BackboneError, match="no decoder of hidden voxels"):
        reconstruction_of(encoder, {"head": {"dim": 3}}, heads.tensors)
    with pytest.raises(BackboneError, match="no decoder of hidden voxels"):
        reconstruction_of(create_backbone("voxel_vit", kind="voxels", **VIT), heads.spec, heads.tensors)
    fewer = {name: tensor for name, tensor in heads.tensors.items() if name != "mask_token"}
    with pytest.raises(BackboneError, match="mask_token differs"):
        reconstruction_of(encoder, heads.spec, fewer)
    wider = heads.tensors | {"mask_token": torch.zeros(24)}
    with pytest.raises(BackboneError, match="mask_token differs"):
        reconstruction_of(encoder, heads.spec, wider)
