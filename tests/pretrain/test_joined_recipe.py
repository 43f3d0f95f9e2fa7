"""A recipe of two data sets side by side: what is checked of it before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_pipelines.streaming.joined import Joined
from pretrain.config.data import open_data
from pretrain.config.load import load_plan, load_recipe
from pretrain.errors import RequestError
from pretrain.training.preflight import look_ahead
from tests.small_data import volumes
from tests.small_objectives import PHOTOS


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").symlink_to(PHOTOS)
    (tmp_path / "volumes").symlink_to(volumes())
    return tmp_path


def test_join__a_sample_has_the_fields_of_both(root):
    recipe = load_recipe("uni4eye_hippocampus", [f"data.root={root}", "evaluation.enabled=false"])
    data = open_data(recipe.data)
    assert isinstance(data, Joined) and {"jpg", "npz"} <= data.fields
    (look,) = look_ahead(load_plan("uni4eye_hippocampus", [f"data.root={root}", "evaluation.enabled=false"]))
    assert look is not None and look.tokens_per_step == 8 * (64 + 150)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.mixture[0].weight=1"], "data.mixture[0].weight=1.0: has no effect with data.mixture_by=join"),
        (["data.mixture_by=share"], "data.mixture[0].weight=null: give one of weight"),
        (["data.mixture_by=joined"], "data.mixture_by=joined: expected one of share, join"),
        (
            ["data.mixture=[]", "data.train=x.tar"],
            "data.mixture_by=join: joins the parts of data.mixture, and there is",
        ),
    ],
)
def test_join__settings_that_do_not_go_together(root, settings, said):
    with pytest.raises(RequestError) as caught:
        load_recipe("uni4eye_hippocampus", [f"data.root={root}", "evaluation.enabled=false", *settings])
    assert any(said in line for line in caught.value.mistakes), caught.value.mistakes


def test_join__a_part_without_its_field_is_refused(root):
    (root / "images").unlink()
    (root / "images").symlink_to(volumes())
    with pytest.raises(RequestError, match=r"data\.mixture: objective uni4eye: view 'image': no field jpg") as refused:
        look_ahead(load_plan("uni4eye_hippocampus", [f"data.root={root}", "evaluation.enabled=false"]))
    assert str(refused.value).endswith("; recipes of volumes: volume_mae_hippocampus")


def test_join__shards_of_one_kind_alone_name_the_recipes_for_them(root):
    settings = ["data.mixture=[]", "data.mixture_by=share", "evaluation.enabled=false"]
    with pytest.raises(RequestError) as photos:
        load_recipe("uni4eye_hippocampus", [f"data.root={root}/images", f"data.train={PHOTOS}/train-*.tar", *settings])
    assert "its field jpg holds images, and " in str(photos.value) and "; recipes of images: " in str(photos.value)
    plan = load_plan("uni4eye_hippocampus", [f"data.root={root}", f"data.train={root}/volumes/train-*.tar", *settings])
    with pytest.raises(RequestError) as scans:
        look_ahead(plan)
    (line,) = str(scans.value).splitlines()
    assert "no field jpg" in line and line.endswith("; recipes of volumes: volume_mae_hippocampus")


def test_join__an_image_under_another_name_is_no_matter_of_recipes(root):
    settings = [f"data.root={root}", "evaluation.enabled=false", "objective.image_field=left.jpg"]
    with pytest.raises(RequestError, match=r"view 'image': no field left\.jpg") as refused:
        look_ahead(load_plan("uni4eye_hippocampus", settings))
    assert "recipes of" not in str(refused.value)


@pytest.mark.parametrize("recipe", ["uni4eye_hippocampus", "volume_mae_hippocampus"])
def test_window__of_the_objective_is_now_of_the_backbone(root, recipe):
    with pytest.raises(RequestError) as refused:
        load_recipe(recipe, [f"data.root={root}", "objective.window=[0,255]"], check_files=False)
    assert "objective.window=[0,255]: unknown setting; did you mean 'backbone.voxel_window'?" in str(refused.value)
