"""Groups of points and their encoder: the authors' numbers, and what holds for every cloud."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from backbones.errors import BackboneError
from backbones.io import load_backbone, save_backbone
from backbones.points import grouping
from backbones.points.config import PointTransformerConfig
from backbones.points.grouping import farthest_points, group, nearest_points
from backbones.points.transformer import PointTransformer
from backbones.registry import create_backbone, from_config, from_spec, kinds, names_of_kind
from tests.golden_streams import uniform

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "point_mae.json").read_text())
SMALL = {"num_points": 64, "num_groups": 8, "group_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL |= {"tokenizer_dim": 8, "drop_path": 0.0}


def golden_clouds() -> Tensor:
    """(2, 64, 3) float32."""
    columns = [uniform((64,), 10 + 3 * b + c) * 2 - 1 for b in range(2) for c in range(3)]
    return torch.stack(columns).view(2, 3, 64).mT.contiguous().float()


def encoder(**settings: Any) -> PointTransformer:
    torch.manual_seed(0)
    made = create_backbone("point_transformer", kind="points", **SMALL | settings)
    assert isinstance(made, PointTransformer)
    return made


def test_uniform__is_the_written_one():
    check = GOLDEN["uniform_check"]
    assert (uniform((5,), 7) * 999983).round().long().tolist() == check["ints_s7"]
    assert uniform((5,), 0).tolist() == pytest.approx(check["U_5_s0"], abs=1e-9)


def test_golden__groups_of_two_clouds():
    clouds, golden = golden_clouds(), GOLDEN["fps_knn"]
    assert clouds[0, :2].tolist() == [pytest.approx(point) for point in golden["first_points"]]
    chosen = farthest_points(clouds, 8)
    assert chosen.tolist() == golden["fps_idx"]
    centers = clouds.gather(1, chosen[..., None].expand(-1, -1, 3))
    near = nearest_points(centers, clouds, 8)
    assert near.tolist() == golden["knn_idx"]
    groups = group(clouds, 8, 8)
    assert torch.equal(groups.centers, centers)
    assert groups.neighborhoods.norm(dim=-1).sum().item() == pytest.approx(golden["knn_dist_sum"], rel=1e-6)


def test_golden__groups_of_1024_points():
    cloud = torch.stack([uniform((1024,), 100 + c) * 2 - 1 for c in range(3)], dim=1).float()[None]
    golden = GOLDEN["fps_knn_1024"]
    chosen = farthest_points(cloud, 64)
    assert chosen[0].tolist() == golden["fps_idx"]
    near = nearest_points(cloud[:, chosen[0]], cloud, 32)
    assert near[0, 0].tolist() == golden["knn_idx_group0"] and near.sum().item() == golden["knn_idx_sum"]
    total = group(cloud, 64, 32).neighborhoods.abs().sum().item()
    assert total == pytest.approx(golden["neighborhood_abs_sum"], rel=1e-6)


def test_golden__points_near_the_origin_are_left_out_and_ties_go_to_the_lowest_index():
    golden = GOLDEN["fps_origin_skip"]
    assert farthest_points(torch.tensor([golden["points"]]), 3)[0].tolist() == golden["fps_idx"]
    axis = torch.tensor([-1.0, 1.0, 3.0])
    lattice = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), dim=-1).reshape(1, 27, 3)
    assert farthest_points(lattice, 8)[0].tolist() == GOLDEN["fps_ties"]["fps_idx_lowest_index_rule"]
    assert farthest_points(torch.zeros(1, 5, 3), 3).tolist() == [[0, 0, 0]]  # all are near it


def test_farthest_points__are_those_of_a_plain_search():
    clouds = torch.randn(3, 40, 3, generator=torch.Generator().manual_seed(3))
    for cloud, chosen in zip(clouds.numpy(), farthest_points(clouds, 12).tolist(), strict=True):
        for count in range(1, 12):
            to_chosen = np.linalg.norm(cloud[:, None] - cloud[None, chosen[:count]], axis=-1).min(1)
            assert to_chosen[chosen[count]] == pytest.approx(to_chosen.max(), rel=1e-6)


def test_nearest_points__blocks_change_nothing(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    queries, points = torch.randn(2, 9, 3, generator=generator), torch.randn(2, 50, 3, generator=generator)
    points[:, 25:] = points[:, :25]  # every point twice: of equally near ones the lowest index first
    whole = nearest_points(queries, points, 7)
    monkeypatch.setattr(grouping, "_BLOCK", 2 * 50 * 2)
    assert torch.equal(nearest_points(queries, points, 7), whole)
    near, other = whole[..., 0], whole[..., 1]
    assert torch.equal(near + 25, other)
    distances = (queries[:, :, None] - points[:, None]).square().sum(-1)
    assert torch.equal(distances.gather(-1, whole), distances.gather(-1, whole).sort(-1).values)


def test_group__is_exact_where_a_cloud_lies_far_from_the_origin():
    clouds = golden_clouds()
    moved = group(clouds + 100, 8, 8).neighborhoods
    assert (moved - group(clouds, 8, 8).neighborhoods).abs().max() < 1e-3  # float32 has 7 digits; 2ab would leave none
    assert group(clouds.bfloat16(), 8, 8).centers.dtype == torch.float32


def test_golden__parameter_counts_of_the_paper_s_encoder():
    counts = GOLDEN["point_mae_full_param_counts"]
    with torch.device("meta"):
        made = from_config(PointTransformerConfig())
    assert sum(p.numel() for p in made.parameters()) == counts["encoder"]
    assert sum(p.numel() for p in made.tokenizer.parameters()) == counts["tokenizer"]


def test_tokens__are_one_per_group_and_do_not_depend_on_the_order_of_points():
    made = encoder().eval()
    clouds = golden_clouds()
    features = made.tokens(clouds)
    assert features.tokens.shape == (2, 8, 24) and features.coords.shape == (2, 8, 3)
    assert features.cls is None and features.grid is None
    order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(63)])  # the first point stays first
    torch.testing.assert_close(made.tokens(clouds[:, order]).tokens, features.tokens)
    with_colors = torch.cat([clouds, torch.rand(2, 64, 3)], dim=2)
    assert torch.equal(made.tokens(with_colors).tokens, features.tokens)


def test_features__groups_that_are_left_out_do_not_take_part():
    made = encoder().eval()
    groups = made.group(golden_clouds())
    keep = torch.tensor([[0, 3, 5], [7, 1, 2]])
    kept = made.features(groups, keep)
    changed = groups.neighborhoods.clone()
    changed[0, 1] += 1.0
    again = made.features(groups._replace(neighborhoods=changed), keep)
    assert kept.tokens.shape == (2, 3, 24) and torch.equal(kept.tokens, again.tokens)
    assert not torch.allclose(kept.tokens, made.features(groups).tokens.gather(1, keep[..., None].expand(-1, -1, 24)))


def test_point_transformer__is_saved_loaded_and_found_by_name(tmp_path):
    made = encoder()
    made.tokens(golden_clouds())  # training moves the running statistics
    save_backbone(tmp_path / "backbone.safetensors", made.weights(), made.spec)
    loaded = load_backbone(tmp_path)
    assert isinstance(loaded, PointTransformer) and loaded.spec == made.spec
    assert torch.equal(loaded.tokens(golden_clouds()).tokens, made.eval().tokens(golden_clouds()).tokens)
    assert isinstance(from_spec(made.spec), PointTransformer)
    assert "points" in kinds() and names_of_kind("points") == ("point_transformer",)
    depths = made.layer_ids()
    assert depths.keys() == dict(made.named_parameters()).keys() and set(depths.values()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_groups": 65}, r"num_groups 65 is more than num_points 64; lower it"),
        ({"group_size": 65}, r"group_size 65 is more than num_points 64; lower it"),
        ({"num_heads": 5}, r"embed_dim 24 is not a multiple of num_heads 5"),
        ({"width": 5}, r"unexpected keyword argument 'width'"),
    ],
)
def test_point_transformer__wrong_settings_are_one_line(settings, message):
    with pytest.raises(BackboneError, match=message) as caught:
        encoder(**settings)
    assert "\n" not in str(caught.value)


def test_create_backbone__other_names_of_points_are_named():
    with pytest.raises(
        BackboneError, match=r"unknown backbone 'point_transfrmer' of kind 'points'; known are .*did you"
    ):
        create_backbone("point_transfrmer", kind="points")
    with pytest.raises(BackboneError, match=r"a cloud of 7 points is too small"):
        encoder().tokens(torch.rand(1, 7, 3))
