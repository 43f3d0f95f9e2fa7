from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.registry import create_backbone
from backbones.voxels.padding import inside
from backbones.voxels.patches import to_patches
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.streaming.stream import Stream
from data_pipelines.views.specs import views_from
from objectives import contract
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.volume_mae.config import VolumeMAEConfig
from objectives.volume_mae.objective import VolumeMAE

VOLUMES = Path(__file__).resolve().parents[3] / "shared" / "data" / "volumes_hippocampus" / "train-000000.tar"
SMALL = {"size": [16, 24, 8], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_dim": 12, "decoder_depth": 1, "decoder_heads": 2}
PROGRESS = Progress(1, 4)


def objective(backbone: dict[str, Any] | None = None, **settings: Any) -> VolumeMAE:
    torch.manual_seed(0)
    encoder = create_backbone("voxel_vit", kind="voxels", **SMALL | (backbone or {}))
    return VolumeMAE(encoder, VolumeMAEConfig(**{"mask_ratio": 0.5} | DECODER | settings))


def batch(num: int = 4, *, channels: int = 1, full: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = torch.tensor(SMALL["size"]).expand(num, 3).clone()
    if not full:
        size[1:] -= torch.randint(0, 8, (num - 1, 3), generator=generator)
    volume = torch.randint(0, 256, (num, channels, *SMALL["size"]), generator=generator, dtype=torch.uint8)
    for number, (x, y, z) in enumerate(size.tolist()):
        volume[number, :, x:], volume[number, :, :, y:], volume[number, :, :, :, z:] = 0, 0, 0
    return {"volume": volume, "volume.size": size, "seed": torch.arange(num) + 10, "sample_id": torch.arange(num)}


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_contract__public_checks_pass(check: Any, norm_pix_loss: bool) -> None:
    check(objective(norm_pix_loss=norm_pix_loss), batch())


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss__is_that_of_a_loop_over_voxels_that_are_no_padding(norm_pix_loss: bool) -> None:
    model, seen = objective({"in_chans": 2}, norm_pix_loss=norm_pix_loss), batch(3, channels=2)
    result = model._reconstruct(seen)
    patches = to_patches(model.backbone.normalized(seen["volume"]), 8)
    means = []
    for b in range(3):
        errors = []
        for row, patch in enumerate(result.mask.drop_idx[b].tolist()):
            start = [8 * place for place in (patch // 3, patch % 3, 0)]
            places = list(itertools.product(range(8), range(8), range(8)))
            ends = seen["volume.size"][b].tolist()
            is_inside = torch.tensor([all(start[a] + place[a] < ends[a] for a in range(3)) for place in places])
            values = patches[b, patch].view(2, -1)[:, is_inside].flatten()
            predicted = result.prediction[b, row].view(2, -1)[:, is_inside].flatten()
            if norm_pix_loss and len(values):
                values = (values - values.mean()) / (values.var() + 1e-6).sqrt()
            errors += (predicted - values).square().tolist()
        means.append(sum(errors) / max(1, len(errors)))
    assert model(seen, PROGRESS).loss.item() == pytest.approx(sum(means) / 3, rel=1e-4)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss__with_a_window_is_that_of_windowed_values(norm_pix_loss: bool) -> None:
    """Hounsfield units, whose padding is stored as 0, and is empty like what lies below the window."""
    seen = batch()
    units = seen["volume"].float() * 8 - 1000
    for number, (x, y, z) in enumerate(seen["volume.size"].tolist()):
        units[number, :, x:], units[number, :, :, y:], units[number, :, :, :, z:] = 0, 0, 0
    windowed = ((units + 160) / 400).clamp(0, 1) * inside(seen["volume.size"], units.shape[2:]).unsqueeze(1)
    model = objective({"voxel_window": [-160.0, 240.0]}, norm_pix_loss=norm_pix_loss)
    plain = objective(norm_pix_loss=norm_pix_loss)
    losses = [one({**seen, "volume": volume}, PROGRESS).loss for one, volume in ((model, units), (plain, windowed))]
    torch.testing.assert_close(*losses)
    shown = [one.pictures({**seen, "volume": volume}) for one, volume in ((model, units), (plain, windowed))]
    torch.testing.assert_close(*shown)


def test_loss__without_padding_is_the_mean_over_all_hidden_voxels() -> None:
    model, seen = objective(), batch(full=True)
    result = model._reconstruct(seen)
    variance, center = torch.var_mean(
        torch.stack([to_patches(seen["volume"] / 255, 8)[b, result.mask.drop_idx[b]] for b in range(4)]),
        -1,
        keepdim=True,
    )
    torch.testing.assert_close((result.center, result.spread), (center, (variance + 1e-6).sqrt()))
    wanted = (result.prediction - result.target).square().mean()
    torch.testing.assert_close(model(seen, PROGRESS).loss, wanted)


def test_loss__is_the_same_however_volumes_are_spread() -> None:
    model, whole = objective(), batch(4)
    halves = [{name: tensor[part] for name, tensor in whole.items()} for part in (slice(0, 1), slice(1, 4))]
    parts = [model(half, PROGRESS).loss for half in halves]
    torch.testing.assert_close(model(whole, PROGRESS).loss, (parts[0] + 3 * parts[1]) / 4)
    assert not model.compares_images


def test_loss__is_zero_where_all_that_is_hidden_is_padding() -> None:
    model, seen = objective(), batch(1)
    seen["volume.size"] = torch.tensor([[8, 24, 8]])
    seen["noise"] = torch.arange(6.0)[None]  # the second half of the first axis is hidden
    output = model(seen, PROGRESS)
    assert output.loss == 0 and all(value.isfinite() for value in output.metrics.values())
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_hidden_voxels_do_not_reach_the_encoder() -> None:
    model, seen = objective(), batch(full=True)
    result = model._reconstruct(seen)
    hidden = result.mask.is_masked.view(4, 1, 2, 3, 1)
    for axis in (2, 3, 4):
        hidden = hidden.repeat_interleave(8, axis)
    changed = {**seen, "volume": torch.where(hidden, 77, seen["volume"])}
    assert torch.equal(model._reconstruct(changed).prediction, result.prediction)


def test_views__say_what_is_read_and_how() -> None:
    (view,) = views_from(objective(volume_field="npz", volume_array="image").views())
    assert (view.size, view.window, view.field, view.array) == ((16, 24, 8), None, "npz", "image")
    (plain,) = views_from(objective().views())
    assert plain.window is None and plain.return_size and plain.flip == (0.0, 0.0, 0.0)


REFUSED = {
    "ratio": ({}, {"mask_ratio": 0.95}, "mask_ratio 0.95 leaves nothing to see or to predict of 6 patches"),
    "one number": ({"patch_size": 1, "size": [4, 4, 4]}, {}, "norm_pix_loss needs more than one number per cube"),
}


@pytest.mark.parametrize(("backbone", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals__are_one_line(backbone: dict, settings: dict, message: str) -> None:
    with pytest.raises(ObjectiveError, match=message):
        objective(backbone, **settings)


def test_refusals__windows_and_images_are_other_backbones() -> None:
    staged = create_backbone("voxel_swin", kind="voxels", size=[8] * 3, embed_dim=6, depths=[1, 1], num_heads=[1, 1])
    with pytest.raises(ObjectiveError, match=r"leave patches out; .* use backbone\.name=voxel_vit"):
        VolumeMAE(staged, VolumeMAEConfig())
    with pytest.raises(ObjectiveError, match=r"needs voxels; .* use backbone\.kind=voxels"):
        VolumeMAE(create_backbone("vit_tiny_patch16_224", options={"depth": 1}), VolumeMAEConfig())


def test_psnr__is_of_voxels_between_0_and_1() -> None:
    model = objective({"voxel_mean": [0.3], "voxel_std": [0.2]}, norm_pix_loss=False)
    seen = batch(full=True)
    result = model._reconstruct(seen)
    error = ((result.prediction - result.target) * 0.2).square().mean().item()
    assert model(seen, PROGRESS).metrics["masked_psnr_db"].item() == pytest.approx(-10 * math.log10(error), rel=1e-4)


def test_learns__from_real_volumes() -> None:
    if not VOLUMES.is_file():
        pytest.skip(f"needs {VOLUMES}")
    model = objective({"size": [32, 48, 32]}, norm_pix_loss=False, mask_ratio=0.75, volume_array="image")
    stream = Stream(
        open_dataset(VOLUMES),
        views_from(model.views()),
        global_batch_size=8,
        micro_batch_size=8,
        rank=0,
        world_size=1,
        seed=0,
        num_streams=2,
    )
    optimizer = torch.optim.AdamW(model.param_groups(0.05), lr=3e-3)
    losses = []
    for step, made in enumerate(itertools.islice(stream, 40)):
        output = model(stream.finish(made), Progress(step, 40))
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
