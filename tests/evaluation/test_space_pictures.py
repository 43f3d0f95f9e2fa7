"""Clouds and volumes as pictures: where colors are, what hides what, and that padding decides nothing."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from backbones.features import Features
from backbones.io import save_backbone
from backbones.registry import create_backbone
from evaluation.data import EvaluationData
from evaluation.extraction.recipe import Reads
from evaluation.pictures.draw import draw
from evaluation.pictures.sheets import CAPTION, MOST_BYTES
from evaluation.pictures.space import BACK, TILE_PX, cloud_views, middle_slices, token_colors
from evaluation.threads import Threads
from pretrain.cli.main import main
from pretrain.evaluations import evaluate as evaluate_by_hand
from tests.small_data import clouds, volumes

KINDS: dict[str, dict[str, Any]] = {
    "points": {
        "name": "point_transformer",
        **{"num_points": 64, "num_groups": 8, "group_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
        "tokenizer_dim": 16,
    },
    "voxels": {"name": "voxel_vit", "size": [8, 8, 8], "patch_size": 4, "embed_dim": 24, "depth": 1, "num_heads": 2},
}


def test_cloud_views__points_have_the_color_of_the_nearest_token_and_near_ones_hide_far_ones() -> None:
    rng = np.random.default_rng(0)
    cloud = rng.normal(0, 0.05, (1, 200, 3)).astype(np.float32)
    cloud[0, :100, 1] += 0.9  # up
    cloud[0, 100:, 1] -= 0.9
    centers = np.array([[[0, 0.9, 0], [0, -0.9, 0]]], np.float32)
    colors = np.array([[[1, 0, 0], [0, 0, 1]]], np.float32)
    views = cloud_views(cloud, centers, colors)
    assert views.shape == (2, TILE_PX, TILE_PX, 3)
    for view in views:
        is_drawn = (view != BACK).any(-1)
        upper, lower = view[: TILE_PX // 2], view[TILE_PX // 2 :]
        assert (upper[is_drawn[: TILE_PX // 2]] == (255, 0, 0)).all() and is_drawn[: TILE_PX // 2].any()
        assert (lower[is_drawn[TILE_PX // 2 :]] == (0, 0, 255)).all() and is_drawn[TILE_PX // 2 :].any()
    gray = cloud_views(np.array([[[0, 0, 1], [0, 0, -1], [0, 0, 0.5]]], np.float32), centers, None)
    shades = [np.unique(view[(view != BACK).any(-1)][:, 0]).tolist() for view in gray]
    assert [len(found) for found in shades] == [3, 3] and min(map(min, shades)) > BACK


def test_middle_slices__across_each_axis_with_nothing_behind_shorter_ones() -> None:
    volume = np.zeros((1, 2, 3, 4, 3), np.float32)
    volume[0, 1] = 0.25  # the middle of the first axis
    volume[0, :, 1] += 0.5
    across = middle_slices(volume)
    assert across.shape == (3, 4, 4, 3)
    assert (across[0, :3, :4] >= 0.25).all() and (across[0, 3:] == 0).all()
    assert (across[1, :2, :4] >= 0.5).all() and (across[1, 2:] == 0).all()
    assert across[2, 1, 1, 0] == 0.75 and (across[2, :, 3:] == 0).all()


def test_token_colors__padding_is_black_and_decides_nothing() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(2, 8, 6)
    is_valid = torch.ones(2, 8, dtype=torch.bool)
    is_valid[1, 5:] = False
    other = tokens.where(is_valid[..., None], 100 * torch.randn(2, 8, 6))
    found, others = (
        token_colors(Features(some, None, None, (2, 2, 2), is_valid=is_valid), 3) for some in (tokens, other)
    )
    assert found[1] == others[1]
    for row, same in zip(found[0], others[0], strict=True):
        np.testing.assert_array_equal(row, same)
        assert (row[1, 5:] == 0).all() and row[0].any()
    assert found[0][1][:, 3].tolist() == [[1, 0, 0]] * 2, "the chosen token is marked"
    whole = token_colors(Features(tokens, None, None, (2, 2, 2)), 3)
    assert whole[0][0][1, 5:].any()


def test_evaluate__draws_by_hand_what_a_run_would_keep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pretrain.checkpoints.references.resolve", lambda reference, storage: Path(reference))
    torch.manual_seed(0)
    encoder = create_backbone(kind="points", **KINDS["points"])
    save_backbone(tmp_path / "backbone.safetensors", encoder.weights(), encoder.spec)
    said: list[str] = []
    dest, storage = tmp_path / "new" / "pictures", tmp_path / "runs"
    for data in (clouds(), clouds()):
        evaluate_by_hand(tmp_path, ["knn"], {"own": data}, storage=storage, pictures=dest, said=said.append)
    files = ["own-clouds.png", "own-knn_confusion.png"]
    assert sorted(path.name for path in dest.iterdir()) == files
    assert said == [f"picture {dest / name}" for name in files] * 2, "of a known result as well"


def test_main__pictures_in_a_place_that_is_no_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert main(["evaluate", "nowhere", "--pictures", str(tmp_path / "file")]) == 2
    assert "is no folder" in capsys.readouterr().err and [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("kind", "shows", "tiles"), [("points", "clouds", (4, 8)), ("voxels", "slices", (4, 9))])
def test_draw__tokens_of_clouds_and_volumes(tmp_path: Path, kind: str, shows: str, tiles: tuple[int, int]) -> None:
    torch.manual_seed(0)
    encoder = create_backbone(kind=kind, **KINDS[kind])
    save_backbone(tmp_path / "backbone.safetensors", encoder.weights(), encoder.spec)
    data = EvaluationData("own", clouds() if kind == "points" else volumes())
    settings: dict[str, Any] = {"image_size": None, "reads": Reads(), "device": "cpu", "threads": Threads(1)}
    found = dict(draw(tmp_path, data, [], store=tmp_path, **settings))
    assert list(found) == [shows] and len(found[shows]) <= MOST_BYTES
    with Image.open(io.BytesIO(found[shows])) as picture:
        assert (picture.height, picture.width) == (tiles[0] * (TILE_PX + 2), tiles[1] * (TILE_PX + 2))
        assert picture.info[CAPTION].count(" to ") >= 2
        rows = np.array(picture.convert("RGB")).reshape(tiles[0], TILE_PX + 2, -1, 3)
    assert all(len(np.unique(row.reshape(-1, 3), axis=0)) > 3 for row in rows), "no row is flat"
    assert dict(draw(tmp_path, data, [], store=tmp_path, **settings)) == found
