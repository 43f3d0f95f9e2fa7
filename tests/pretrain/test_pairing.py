"""A recipe and data of another kind: refused by the names of fields, in one line, before anything starts."""

from __future__ import annotations

import pytest

from data_pipelines.shards.tar_walk import first_fields
from pretrain.config.load import load_recipe
from pretrain.errors import RequestError
from pretrain.photos import load
from tests.small_data import clouds, write_shard
from tests.small_objectives import PHOTOS


def refusal(recipe: str, *settings: str) -> str:
    with pytest.raises(RequestError) as caught:
        load_recipe(recipe, settings)
    (line,) = caught.value.mistakes
    assert "\n" not in line
    return line


def test_pairing__points_recipe_on_photos():
    line = refusal("point_mae_psb", f"data.root={PHOTOS}")
    shards = f"data.train={PHOTOS}/train-*.tar"
    assert f"{shards}: its field jpg holds images, and backbone.kind=points reads point clouds (points.npy" in line
    assert "recipes of images: demo, dino_cifar10" in line and line.endswith("more (pretrain recipes)")


def test_pairing__image_recipe_on_clouds():
    line = refusal("mae_cifar10", f"data.root={clouds()}")
    assert "its field points.npy holds point clouds, and backbone.kind=image reads images (jpg" in line
    assert "recipes of point clouds: point_mae_psb, point_mae_shapenet" in line


def test_pairing__every_part_of_a_mixture():
    mixture = f'data.mixture=[{{"name": "a", "shards": "{clouds()}/train-*.tar", "weight": 1}}]'
    line = refusal("mae_cifar10", f"data.root={PHOTOS}", "data.train=null", mixture)
    assert "data.mixture[0].shards=" in line and "holds point clouds" in line


def test_pairing__a_folder_of_photos_is_not_packed_for_clouds(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"no photo, which nobody is to find out")
    with pytest.raises(RequestError, match=r"data\.root=.*photos: it holds photos, and backbone\.kind=points reads"):
        load("point_mae_psb", [f"data.root={tmp_path / 'photos'}", f"storage={tmp_path / 'runs'}"])
    assert not (tmp_path / "runs").exists()


def test_pairing__what_is_not_known_is_left_to_others(tmp_path):
    """Arrays of any kind, and shards that cannot be read, are no mistake of pairing."""
    write_shard(tmp_path / "train-000000.tar", {"a": {"npz": b"1"}, "b": {"jpg": b"2"}})
    assert first_fields(tmp_path / "train-000000.tar") == {"npz"}
    assert load_recipe("mae_cifar10", [f"data.root={tmp_path}", "evaluation.enabled=false"])
    (tmp_path / "train-000000.tar").write_bytes(b"no tar")
    assert first_fields(tmp_path / "train-000000.tar") == frozenset()
    write_shard(tmp_path / "train-000000.tar", {"a": {"wav": b"1"}})
    line = refusal("mae_cifar10", f"data.root={tmp_path}", "evaluation.enabled=false")
    assert "its samples have wav, and backbone.kind=image reads jpg or jpeg" in line
