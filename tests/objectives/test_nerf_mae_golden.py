"""Against the numbers of the authors' code, see `tests/golden/nerf_mae.json`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbones.registry import create_backbone
from backbones.voxels.base import alpha_of_density
from backbones.voxels.patches import padded_to
from backbones.voxels.positions import sincos_positions_3d
from data_pipelines.views.kinds.volumes import Placement, VolumeView
from objectives.base import Progress
from objectives.nerf_mae.config import NeRFMAEConfig
from objectives.nerf_mae.objective import NeRFMAE, covered_tokens, voxel_loss
from tests.golden_streams import parameter, uniform

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "nerf_mae.json").read_text())
PROGRESS = Progress(1, 4)
# The authors' names of the parts of a block and of what is around the stages -> ours.
NAMES = {
    "patch_partition.0.": "backbone.patch_embed.",
    "patch_partition.2.": "backbone.patch_norm.",
    "mlp.3.": "mlp.2.",
    "transp_conv.": "up.",
    "conv_block.conv3.": "match.",
    "conv_block.": "",
    "out.conv.": "decoder.predict.",
}


def our_name(official: str, num_stages: int) -> str:
    """The name of a parameter here."""
    for theirs, ours in NAMES.items():
        official = official.replace(theirs, ours)
    first, *rest = official.split(".")
    if first == "stages":
        stage, number = int(rest[0]), int(rest[1])
        if stage > 0 and number == 0:
            return ".".join(["backbone.layers", str(stage), "merge", *rest[2:]])
        return ".".join(["backbone.layers", str(stage), "blocks", str(number - (stage > 0)), *rest[2:]])
    if first.startswith("decoder") and first != "decoder":
        return ".".join(["decoder.blocks", str(num_stages - int(first[-1])), *rest])
    return official


def golden_objective(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> NeRFMAE:
    config = case["config"]
    backbone = create_backbone(
        "voxel_swin",
        kind="voxels",
        size=[config["resolution"]] * 3,
        embed_dim=config["embed_dim"],
        depths=config["depths"],
        num_heads=config["num_heads"],
        drop_path=0.0,
    )
    objective = NeRFMAE(backbone, NeRFMAEConfig(mask_per="batch")).to(dtype)
    weights = {
        our_name(name, len(config["depths"])): parameter(tuple(shape), stream, kind)
        for name, shape, stream, kind in case["params"]
    }
    trained = dict(objective.named_parameters())
    assert weights.keys() == trained.keys()
    with torch.no_grad():
        for name, tensor in weights.items():
            trained[name].copy_(tensor.reshape(trained[name].shape))
    return objective


def scene(size: tuple[int, int, int], stream: int) -> Tensor:
    alpha = uniform(size, stream + 1)
    alpha = torch.where(alpha < 0.5, 0.0, (alpha - 0.5) / 0.5)
    return torch.cat([uniform((4, *size), stream)[:3], alpha[None]])


def batch_of(scenes: list[Tensor], resolution: int, num_blocks: int, stream: int) -> dict[str, Tensor]:
    return {
        "grid": torch.cat([padded_to(each[None], [resolution] * 3) for each in scenes]),
        "grid.size": torch.tensor([each.shape[1:] for each in scenes]),
        "seed": torch.arange(len(scenes)),
        "noise": uniform((num_blocks,), stream).expand(len(scenes), -1),
    }


def test_golden__density_to_alpha() -> None:
    golden = GOLDEN["density_to_alpha"]
    found = alpha_of_density(torch.tensor(golden["density"], dtype=torch.float64), "log_density")
    assert found.tolist() == pytest.approx(golden["instant_ngp_exp"], rel=1e-8)
    found = alpha_of_density(torch.tensor(golden["scannet_density"], dtype=torch.float64), "relu_density")
    assert found.tolist() == pytest.approx(golden["scannet_relu"], rel=1e-8)


def test_golden__augmentation() -> None:
    grid, golden = uniform((4, 3, 4, 2), 3).numpy(), GOLDEN["augment"]
    view = VolumeView("grid", size=(4, 3, 2))
    turned = view.cut(grid, Placement((3, 4, 2), (4, 3, 2), True, (), (0, 0, 0)))
    assert list(turned.shape) == golden["rot_shape"]
    for row, wanted in zip(turned[0, :, :, 0].tolist(), golden["rot_first"], strict=True):
        assert row == pytest.approx(wanted)
    for axis in (0, 1):
        mirrored = VolumeView("grid", size=(3, 4, 2)).cut(
            grid, Placement((3, 4, 2), (3, 4, 2), False, (axis,), (0,) * 3)
        )
        assert (mirrored == torch.from_numpy(grid).flip(axis + 1).numpy()).all()


def test_golden__positions() -> None:
    golden = GOLDEN["pos_embed_dim24_grid4"]
    table = sincos_positions_3d(24, (4, 4, 4)).view(golden["shape"])
    assert table[0, 1, 2, 3].tolist() == pytest.approx(golden["at_1_2_3"], abs=1e-6)
    assert table[0, 3, 0, 0].tolist() == pytest.approx(golden["at_3_0_0"], abs=1e-6)


def test_golden__padding() -> None:
    golden, grid = GOLDEN["pad"], torch.rand(1, 4, *_pad_shape(GOLDEN["pad"]["mask_sum"]))
    padded = padded_to(grid, golden["out_shape"][2:])
    assert list(padded.shape) == golden["out_shape"]
    x, y, z = grid.shape[2:]
    assert torch.equal(padded[:, :, :x, :y, :z], grid) == golden["origin_kept"]
    assert padded.count_nonzero() == grid.count_nonzero()


def _pad_shape(count: float) -> tuple[int, int, int]:
    """Sides of at most 5 whose four channels have so many numbers."""
    voxels = int(count) // 4
    return next((x, y, voxels // (x * y)) for x in (5, 4, 3, 2) for y in (4, 3, 2) if voxels % (x * y) == 0)


def test_golden__relative_positions() -> None:
    golden = GOLDEN["rel_pos"]
    backbone = create_backbone("voxel_swin", kind="voxels", size=[32] * 3, embed_dim=24, depths=[1], num_heads=[1])
    attention = backbone.layers[0].blocks[0].attn
    index = attention.relative_position_index
    assert attention.relative_position_bias_table.shape == (golden["table_rows"], 1)
    assert "relative_position_index" not in " ".join(backbone.state_dict())
    found = {f"index_{i}_{j}": index[i, j].item() for i, j in ((0, 63), (63, 0), (0, 1), (0, 4), (0, 16))}
    assert found == {key: golden[key] for key in found}
    assert (index.diagonal() == golden["diag"]).all()


def test_golden__window_mask() -> None:
    golden = GOLDEN["window_mask"]
    noise = uniform((8,), 900)
    assert noise.tolist() == pytest.approx(golden["draws"])
    blocks = (noise < golden["p"]).view(1, 2, 2, 2)
    assert blocks[0].int().tolist() == golden["windows"]
    tokens = covered_tokens(blocks, 4, (8, 8, 8))
    assert tokens.shape == (1, 8, 8, 8) and tokens.sum() == golden["masked_tokens"]
    beyond = covered_tokens(blocks, 4, (9, 8, 11))
    assert beyond.sum() == golden["masked_tokens"] and not beyond[:, 8:].any() and not beyond[..., 8:].any()


def test_golden__loss_of_given_predictions() -> None:
    golden = GOLDEN["loss_only"]
    target = uniform((2, 4, 8, 8, 8), 4)
    alpha = uniform((2, 8, 8, 8), 5)
    target[:, 3] = torch.where(alpha < 0.6, 0.0, (alpha - 0.6) / 0.4)
    is_valid = torch.ones(2, 8, 8, 8, dtype=torch.bool)
    is_valid[1, 6:], is_valid[1, :, :, 5:] = False, False
    target = target * is_valid[:, None]
    blocks = torch.zeros(2, 2, 2, 2, dtype=torch.bool)
    for place in ((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0), (1, 1, 1)):
        blocks[(slice(None), *place)] = True
    prediction = (uniform((2, 4, 8, 8, 8), 6) * 4 - 2).requires_grad_()
    parts = voxel_loss(prediction, target, covered_tokens(blocks, 4, (8, 8, 8)) & is_valid)
    assert parts.num_occupied.sum() == golden["n_occupied"] and parts.num_scored.sum() == golden["n_alpha_voxels"]
    rgb, alpha_loss = parts.rgb_error.sum() / parts.num_occupied.sum(), parts.alpha_error.sum() / parts.num_scored.sum()
    assert rgb.item() == pytest.approx(golden["loss_rgb"], rel=1e-9)
    assert alpha_loss.item() == pytest.approx(golden["loss_alpha"], rel=1e-9)
    for loss, wanted in (
        (rgb, "grad_rgb_abs_sum"),
        (alpha_loss, "grad_alpha_abs_sum"),
        (rgb + alpha_loss, "grad_abs_sum"),
    ):
        (gradient,) = torch.autograd.grad(loss, prediction, retain_graph=True)
        assert gradient.abs().sum().item() == pytest.approx(golden[wanted], rel=1e-9)


def _activations(objective: NeRFMAE, batch: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What stages and decoder give, by the authors' names."""
    kept: dict[str, Tensor] = {}
    for number, layer in enumerate(objective.backbone.layers):
        layer.register_forward_hook(lambda _, __, out, name=f"stage{number}": kept.__setitem__(name, out.detach()))
    objective.decoder.register_forward_hook(lambda _, __, out: kept.__setitem__("pred", out.detach()))
    objective(batch, PROGRESS)
    yield from kept.items()


@pytest.mark.parametrize(("dtype", "loss_rel", "norm_rel"), [("float64", 1e-9, 1e-8), ("float32", 1e-5, 1e-4)])
def test_golden__two_scenes_of_32_voxels(dtype: str, loss_rel: float, norm_rel: float) -> None:
    case, golden = GOLDEN["nerf_mae_tiny"], GOLDEN["nerf_mae_tiny"]["results"][dtype]
    objective = golden_objective(case, getattr(torch, dtype))
    assert sum(p.numel() for p in objective.parameters()) == case["n_params"]
    if dtype == "float64":  # the authors' table is computed in float64
        objective.backbone.positions = exact_positions(24, 8)
    scenes = [scene((28, 32, 20), 50), scene((32, 24, 30), 60)]
    batch = batch_of(scenes, 32, 8, 900)
    batch["grid"] = batch["grid"].to(getattr(torch, dtype))
    output = objective(batch, PROGRESS)
    assert output.loss.item() == pytest.approx(golden["loss"], rel=loss_rel)
    assert output.metrics["rgb_loss"].item() == pytest.approx(golden["loss_rgb"], rel=loss_rel)
    assert output.metrics["alpha_loss"].item() == pytest.approx(golden["loss_alpha"], rel=loss_rel)
    output.loss.backward()
    norms = {name: p.grad.norm().item() for name, p in objective.named_parameters()}
    assert math.hypot(*norms.values()) == pytest.approx(golden["grad_norm"], rel=norm_rel)
    assert norms["mask_token"] == pytest.approx(golden["grad_norm_mask_token"], rel=norm_rel)
    assert norms["backbone.patch_embed.weight"] == pytest.approx(golden["grad_norm_patch_conv"], rel=norm_rel)
    found = dict(_activations(objective, batch))
    assert found.keys() == golden["activations"].keys()
    for name, (shape, total, absolute) in golden["activations"].items():
        assert list(found[name].shape) == shape
        assert found[name].abs().sum().item() == pytest.approx(absolute, rel=norm_rel)
        assert found[name].sum().item() == pytest.approx(total, rel=norm_rel, abs=norm_rel * absolute)


def exact_positions(dim: int, side: int) -> Tensor:
    """The table in float64, by loops."""
    m = dim // 3
    rows = []
    for place in [(x, y, z) for x in range(side) for y in range(side) for z in range(side)]:
        row = []
        for axis in (1, 0, 2):
            angles = [place[axis] * 10000 ** (-2 * q / m) for q in range(m // 2)]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.slow
def test_golden__one_scene_of_128_voxels() -> None:
    golden = GOLDEN["nerf_mae_tiny_b"]
    objective = golden_objective(golden)
    batch = batch_of([scene((128, 112, 64), 50).float()], 128, 512, 901)
    output = objective(batch, PROGRESS)
    assert output.loss.item() == pytest.approx(golden["loss"], rel=1e-5)
    assert output.metrics["rgb_loss"].item() == pytest.approx(golden["loss_rgb"], rel=1e-5)
    assert output.metrics["alpha_loss"].item() == pytest.approx(golden["loss_alpha"], rel=1e-5)
    output.loss.backward()
    norms = [p.grad.norm().item() for p in objective.parameters()]
    assert math.hypot(*norms) == pytest.approx(golden["grad_norm"], rel=1e-4)


@pytest.mark.parametrize(("name", "depths"), [("swin_s", [2, 2, 18, 2]), ("swin_t", [2, 2, 6, 2])])
def test_golden__numbers_of_parameters(name: str, depths: list[int]) -> None:
    golden = GOLDEN["nerf_mae_full_param_counts"][name]
    with torch.device("meta"):
        objective = NeRFMAE(create_backbone("voxel_swin", kind="voxels", depths=depths), NeRFMAEConfig())
    sizes = {part: sum(p.numel() for p in getattr(objective, part).parameters()) for part in ("backbone", "decoder")}
    assert sizes["backbone"] == golden["encoder"]
    assert sizes["decoder"] == golden["decoder"]
