"""Point-MAE: the authors' numbers, and what follows from the paper's formulas."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from backbones import registry
from backbones.errors import BackboneError
from backbones.features import Features, take_tokens
from backbones.io import load_backbone, save_backbone
from backbones.points.base import PointEncoder
from backbones.points.grouping import Groups
from backbones.registry import create_backbone
from objectives import contract
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.parts import chamfer
from objectives.parts.chamfer import chamfer_distance, nearest_distances
from objectives.parts.point_pictures import cloud_pictures
from objectives.point_mae.config import PointMAEConfig
from objectives.point_mae.objective import PointMAE, _by_distance
from pretrain.config.load import load_recipe
from pretrain.training.model import build_objective
from tests.backbones.test_points import GOLDEN, SMALL, golden_clouds
from tests.golden_streams import parameter, uniform
from tests.small_data import clouds

START = Progress(0, 1)
LATE = Progress(999, 1000)


def small(backbone: dict[str, Any] | None = None, **config: Any) -> PointMAE:
    torch.manual_seed(0)
    encoder = create_backbone("point_transformer", kind="points", **SMALL | (backbone or {}))
    light = {"decoder_depth": 1, "decoder_heads": 3, "decoder_drop_path": 0.0}
    return PointMAE(encoder, PointMAEConfig(**light | config))


def batch_of(num: int = 4) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {"points": torch.rand(num, 64, 3, generator=generator) * 2 - 1, "seed": torch.arange(num)}


# The loss


@pytest.mark.parametrize("kind", ["l2", "l1"])
def test_golden__chamfer_distance_and_its_gradient(kind):
    golden = GOLDEN["chamfer"]
    a, b = (uniform(shape, stream) * 2 - 1 for shape, stream in (((2, 5, 3), 1), ((2, 7, 3), 2)))
    a.requires_grad_(True)
    loss = chamfer_distance(a, b, kind)
    assert loss.item() == pytest.approx(golden[kind.upper()], rel=1e-9)
    of_a, of_b = nearest_distances(a, b)
    np.testing.assert_allclose(of_a.detach(), golden["dist1"], rtol=1e-9)
    np.testing.assert_allclose(of_b.detach(), golden["dist2"], rtol=1e-9)
    loss.backward()
    assert a.grad is not None
    assert a.grad.abs().sum().item() == pytest.approx(golden[f"grad_{kind.upper()}_A_abs_sum"], rel=1e-8)
    if kind == "l2":
        assert a.grad.sum().item() == pytest.approx(golden["grad_L2_A_sum"], rel=1e-8)
        assert a.grad[0, 0].tolist() == pytest.approx(golden["grad_L2_A_00"], rel=1e-8)


@pytest.mark.parametrize("block", [2**24, 900, 64])
def test_nearest_distances__are_those_of_a_search_tree_whatever_fits_in_memory(block, monkeypatch):
    monkeypatch.setattr(chamfer, "_BLOCK", block)
    generator = torch.Generator().manual_seed(5)
    a, b = torch.randn(3, 40, 3, generator=generator), torch.randn(3, 25, 3, generator=generator)
    of_a, of_b = nearest_distances(a, b)
    for idx in range(3):
        np.testing.assert_allclose(of_a[idx], cKDTree(b[idx]).query(a[idx])[0] ** 2, rtol=1e-5)
        np.testing.assert_allclose(of_b[idx], cKDTree(a[idx]).query(b[idx])[0] ** 2, rtol=1e-5)


def test_chamfer_distance__equal_sets_have_a_gradient():
    """The square root of the L1 form has none at 0."""
    points = torch.rand(2, 6, 3, requires_grad=True)
    loss = chamfer_distance(points, points.detach(), "l1")
    loss.backward()
    assert loss.item() < 1e-5 and points.grad is not None and points.grad.isfinite().all()
    half = points.detach().bfloat16()
    assert chamfer_distance(half, half).dtype == torch.float32


# The authors' numbers


def golden_weights(objective: PointMAE) -> dict[str, Tensor]:
    """The written weights by our names: convolutions of width 1 are matrices, and one of them is two of ours."""
    official = {name: parameter(tuple(shape), s, kind) for name, shape, s, kind in GOLDEN["point_mae_tiny"]["params"]}
    wide = official.pop("MAE_encoder.encoder.second_conv.0.weight")[..., 0]
    width = wide.shape[1] // 2
    official["of_group.weight"], official["of_point.weight"] = wide[:, :width], wide[:, width:]
    official["of_group.bias"] = official.pop("MAE_encoder.encoder.second_conv.0.bias")
    renamed = (
        ("MAE_encoder.encoder.first_conv.0.", "backbone.tokenizer.lift."),
        ("MAE_encoder.encoder.first_conv.1.", "backbone.tokenizer.norm1."),
        ("MAE_encoder.encoder.first_conv.3.", "backbone.tokenizer.widen."),
        ("of_", "backbone.tokenizer.of_"),
        ("MAE_encoder.encoder.second_conv.1.", "backbone.tokenizer.norm2."),
        ("MAE_encoder.encoder.second_conv.3.", "backbone.tokenizer.project."),
        ("MAE_encoder.pos_embed.", "backbone.position."),
        ("MAE_encoder.blocks.", "backbone."),
        ("MAE_encoder.norm.", "backbone.norm."),
        ("decoder_pos_embed.", "decoder_position."),
        ("MAE_decoder.", ""),
        ("increase_dim.0.", "predict."),
    )
    found = {}
    for name, tensor in official.items():
        prefix, ours = next((pair for pair in renamed if name.startswith(pair[0])), ("", ""))
        found[ours + name[len(prefix) :]] = tensor
    own = dict(objective.named_parameters())
    return {name: tensor.reshape(own[name].shape) for name, tensor in found.items()}


def golden_objective(chamfer_kind: str, dtype: torch.dtype) -> PointMAE:
    sizes = {"embed_dim": 48, "tokenizer_dim": 128}
    objective = small(sizes, chamfer=chamfer_kind).to(dtype)
    weights = golden_weights(objective)
    assert weights.keys() == dict(objective.named_parameters()).keys()
    objective.load_state_dict({name: tensor.to(dtype) for name, tensor in weights.items()}, strict=False)
    return objective


def golden_batch(dtype: torch.dtype) -> dict[str, Tensor]:
    is_masked = torch.tensor(GOLDEN["point_mae_tiny"]["mask"], dtype=torch.bool)
    return {"points": golden_clouds().to(dtype), "is_masked": is_masked, "seed": torch.arange(2)}


@pytest.mark.parametrize("kind", ["l2", "l1"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_golden__loss_and_gradients_of_the_whole_step(mode, kind):
    golden = GOLDEN["point_mae_tiny"]["results"][f"{mode}_cd{kind}"]
    objective = golden_objective(kind, torch.float64).train(mode == "train")
    assert sum(p.numel() for p in objective.parameters()) == GOLDEN["point_mae_tiny"]["n_params"]
    loss = objective(golden_batch(torch.float64), START).loss
    assert loss.item() == pytest.approx(golden["loss"], rel=1e-9)
    loss.backward()
    gradients = {name: p.grad for name, p in objective.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in gradients.items() if gradient is not None}
    assert norms.keys() == gradients.keys()
    assert np.linalg.norm(list(norms.values())) == pytest.approx(golden["grad_norm"], rel=1e-6)
    assert norms["mask_token"] == pytest.approx(golden["grad_norm_mask_token"], rel=1e-8)
    assert norms["backbone.tokenizer.lift.weight"] == pytest.approx(golden["grad_norm_first_conv_w"], rel=1e-8)


def test_golden__what_lies_between():
    golden = GOLDEN["point_mae_tiny"]["intermediate_train"]
    objective, batch = golden_objective("l2", torch.float64), golden_batch(torch.float64)
    groups = objective.backbone.group(batch["points"])
    assert groups.neighborhoods.sum().item() == pytest.approx(golden["neighborhood_sum"], rel=1e-8)
    assert groups.centers.sum().item() == pytest.approx(golden["center_sum"], rel=1e-8)
    tokens = objective.backbone.tokenizer(groups.neighborhoods)
    assert tokens.abs().sum().item() == pytest.approx(golden["tokens_abs_sum"], rel=1e-9)
    assert tokens[0, 0, :4].tolist() == pytest.approx(golden["token_00_first4"], rel=1e-8)
    keep = torch.tensor([row for row in (~batch["is_masked"]).nonzero()[:, 1].view(2, -1).tolist()])
    visible = objective.backbone.features(groups, keep).tokens
    assert visible.abs().sum().item() == pytest.approx(golden["x_vis_abs_sum"], rel=1e-9)
    assert visible[0, 0, :4].tolist() == pytest.approx(golden["x_vis_00_first4"], rel=1e-8)


def test_golden__float32_loss():
    loss = golden_objective("l2", torch.float32)(golden_batch(torch.float32), START).loss
    assert loss.item() == pytest.approx(GOLDEN["point_mae_tiny"]["results"]["float32_train_cdl2"], rel=1e-6)


def test_golden__blocks_are_the_nearest_groups():
    golden = GOLDEN["block_mask"]
    objective = small(masking="block", mask_ratio=golden["mask_ratio"])
    centers = objective.backbone.group(golden_clouds()).centers
    order = _by_distance(centers, torch.full((2, 1), golden["seed_index"]))
    hidden = torch.zeros(2, 8, dtype=torch.int64).scatter(1, order[:, : objective.num_masked], 1)
    assert hidden.tolist() == golden["mask"]


def test_golden__parameter_counts_of_the_paper_s_model():
    with torch.device("meta"):
        objective = PointMAE(create_backbone("point_transformer", kind="points"), PointMAEConfig())
    counts = GOLDEN["point_mae_full_param_counts"]
    assert sum(p.numel() for p in objective.parameters()) == counts["total"]
    decoder = [*objective.blocks.parameters(), *objective.norm.parameters()]
    assert sum(p.numel() for p in decoder) == counts["decoder"]
    assert objective.num_masked == 38  # of 64, not 39


# What follows


@pytest.mark.parametrize("masking", ["random", "block"])
def test_masks__are_of_each_sample_s_seed_and_exact(masking):
    objective, batch = small(masking=masking), batch_of()
    centers = objective.backbone.group(batch["points"]).centers
    mask = objective._mask(batch, centers)
    assert mask.drop_idx.shape == (4, 4) and mask.keep_idx.shape == (4, 4)
    assert torch.cat([mask.keep_idx, mask.drop_idx], 1).sort(1).values.tolist() == [list(range(8))] * 4
    alone = {name: tensor[2:3] for name, tensor in batch.items()}
    assert torch.equal(objective._mask(alone, centers[2:3]).drop_idx[0], mask.drop_idx[2])


def test_loss__of_hidden_groups_alone_counts():
    """In evaluation mode nothing else is shared: the points of visible groups are no target."""
    objective, batch = small().eval(), batch_of()
    result = objective._reconstruct(batch)
    assert result.prediction.shape == result.target.shape == (4, 4, 8, 3)
    everything = result.groups.neighborhoods.gather(1, result.mask.drop_idx[..., None, None].expand(-1, -1, 8, 3))
    assert torch.equal(result.target, everything)


def test_explained__is_0_for_the_centers_and_1_for_the_points():
    objective, batch = small(), batch_of()
    target = objective._reconstruct(batch).target.flatten(0, 1)
    centers = chamfer_distance(torch.zeros(1, 1, 3).expand(len(target), 8, 3), target)
    assert objective._explained(centers, target).item() == pytest.approx(0, abs=1e-6)
    assert objective._explained(torch.tensor(0.0), target).item() == 1
    late = {"explained": 0.001, "effective_rank": 20.0, "patch_cosine": 0.1}
    assert "hidden points are predicted no better than by the centers of their groups" in objective.diagnose(late, LATE)


def test_param_groups__token_biases_and_norms_do_not_decay():
    objective = small()
    names = {id(tensor): name for name, tensor in objective.named_parameters()}
    still = {names[id(p)] for group in objective.param_groups(0.05) if not group["wd_scale"] for p in group["params"]}
    ends = ("bias", "mask_token", "norm.weight", "norm1.weight", "norm2.weight")
    assert still == {name for name in names.values() if name.endswith(ends)}


@pytest.mark.parametrize(
    ("backbone", "config", "message"),
    [
        ({}, {"mask_ratio": 0.05}, r"objective\.mask_ratio 0\.05 leaves nothing .* of 8 groups"),
        ({}, {"decoder_heads": 5}, r"objective\.decoder_heads 5 does not divide the width 24"),
    ],
)
def test_point_mae__wrong_settings_are_one_line(backbone, config, message):
    with pytest.raises(ObjectiveError, match=message):
        small(backbone, **config)


def test_point_mae__images_are_refused():
    images = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options={"depth": 1})
    with pytest.raises(ObjectiveError, match=r"'point_mae' needs point clouds; .* use backbone\.kind=points"):
        PointMAE(images, PointMAEConfig())


def test_cloud_pictures__near_points_hide_far_ones_and_nan_is_left_out():
    colors = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    eye = torch.tensor([0.742, 0.520, 0.423])  # where the first side looks from
    points = torch.stack([0.5 * eye, -0.5 * eye])[None]
    first = cloud_pictures(points, colors, torch.ones(1))[..., :96]
    assert first.shape == (1, 3, 96, 96) and first[0, 0].max() > 0.7
    is_red = first[0, 0] > 0
    assert first[0, 1, is_red].max() == 0  # the green point lies behind the red one
    points[0, 1] = torch.nan
    assert cloud_pictures(points, colors, torch.ones(1)).isfinite().all()


@dataclass(frozen=True)
class MeanPointsConfig:
    kind: str = "points"
    name: str = "mean_points"
    num_points: int = 64
    num_groups: int = 8
    group_size: int = 8
    dim: int = 24


class MeanPoints(PointEncoder):
    """The least that a plug-in's encoder of point clouds has: a group is the mean of its points."""

    Config = MeanPointsConfig

    def __init__(self, config: MeanPointsConfig) -> None:
        super().__init__(config)
        self.embed_dim = config.dim
        self.embed = torch.nn.Linear(6, config.dim)

    def features(self, groups: Groups, keep_idx: Tensor | None = None) -> Features:
        x = torch.cat([groups.neighborhoods.mean(2), groups.centers], dim=-1)  # (B, G, 6)
        tokens = self.embed(x if keep_idx is None else take_tokens(x, keep_idx))
        return Features(tokens, None, None, None, coords=groups.centers)


def test_plugin__an_encoder_of_point_clouds_is_one_more_name_of_the_kind(monkeypatch, tmp_path):
    """A third party's encoder is found by name, trained by Point-MAE, saved, and loaded."""
    entry = EntryPoint("mean_points", "their.models:MeanPoints", "pretrain.backbones")
    load = EntryPoint.load
    monkeypatch.setattr(EntryPoint, "load", lambda self: MeanPoints if self.name == entry.name else load(self))
    monkeypatch.setattr(registry, "plugins", lambda: {"mean_points": entry})
    assert registry.names_of_kind("points") == ("mean_points", "point_transformer")
    assert registry.config_class("points", "mean_points") is MeanPointsConfig
    recipe = tmp_path / "theirs.yaml"
    recipe.write_text(
        "objective: {name: point_mae, decoder_depth: 1, decoder_heads: 3, decoder_drop_path: 0.0}\n"
        "backbone: {kind: points, name: mean_points, dim: 48}\n"
        f"data: {{train: {clouds()}/train-*.tar}}\n"
        "optimizer: {lr: 1.0e-3}\n"
        "train: {steps: 4, global_batch_size: 4, checkpoint_every: 4}\n"
        "evaluation: {enabled: false}\n"
    )
    loaded = load_recipe(str(recipe))
    assert loaded.backbone == MeanPointsConfig(dim=48)
    objective = build_objective(loaded)
    assert isinstance(objective.backbone, MeanPoints)
    for check in contract.CHECKS:
        check(objective, batch_of())
    save_backbone(tmp_path / "backbone.safetensors", objective.backbone.weights(), objective.backbone.spec)
    again = load_backbone(tmp_path)
    assert torch.equal(again.tokens(golden_clouds()).tokens, objective.backbone.tokens(golden_clouds()).tokens)
    monkeypatch.setattr(registry, "plugins", dict)
    with pytest.raises(BackboneError, match=r"'mean_points' of kind 'points' is not installed here"):
        load_backbone(tmp_path)
