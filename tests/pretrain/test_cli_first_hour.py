"""`pretrain recipes`, `pretrain init` and `--dry-run`: what somebody asks before the first run."""

from __future__ import annotations

import io
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pretrain.cli.main import main
from pretrain.config.load import load_plan, recipe_content, recipe_names
from pretrain.photos import load
from pretrain.training.preflight import look_ahead


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "my photos" / name).mkdir(parents=True)
        for number in range(15):
            pixels = rng.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "my photos" / name / f"{number}.jpg")
    return tmp_path / "my photos"


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_recipes__one_table_says_what_each_is_meant_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["recipe", "model", "data", "hardware", "time"]
    assert [row.split()[0] for row in rows] == list(recipe_names())
    assert max(map(len, rows)) <= 100
    models = dict(row.split("  ", 1) for row in rows)
    assert models["dinov3_cifar10"].lstrip().startswith("ViT 128 x 4/8, 32 px  ")  # too small to be a ViT-Small
    for column in ("model", "data", "hardware", "time"):  # aligned: two blanks before each column
        assert all(row[header.index(column) - 2 : header.index(column)] == "  " for row in rows)
    assert all(set(recipe_content(name)["suits"]) == {"data", "hardware", "time"} for name in recipe_names())


@pytest.mark.parametrize(("rate", "is_cut"), [(1.0, False), (1e6, True)])
def test_init__says_that_it_stops_before_the_hours_are_over(
    photos: Path,
    tmp_path: Path,
    rate: float,
    is_cut: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of few photos an hour went by in minutes, and nothing said why."""
    monkeypatch.setattr("pretrain.cli.init._rate", lambda *arguments: rate)
    assert main(["init", str(photos), "--hours", "2"]) == 0
    said = "passes over the data, the most that init plans; --hours 2 would allow "
    assert (said in capsys.readouterr().out) == (said in (tmp_path / "mae_my_photos.yaml").read_text()) == is_cut


@pytest.mark.parametrize(("sample", "title", "steps"), [("scans", "MAE", 187), ("grids", "NeRF-MAE", 20)])
def test_init__plans_no_more_passes_than_few_volumes_and_grids_are_worth(
    sample: str, title: str, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour of a few grids was a thousand steps, which learn them by heart; and headers said NERF_MAE."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pretrain.cli.init._rate", lambda *arguments: 1000.0)
    assert main(["init", str(_shards(tmp_path, ARRAYS[sample][0])), "-o", "written.yaml"]) == 0
    recipe = load("written.yaml").recipe
    assert recipe.train.steps == steps and recipe.description == f"{title} on shards, by pretrain init"
    assert (tmp_path / "written.yaml").read_text().startswith(f"# {recipe.name}: {title} on 5 ")


def test_init__writes_a_recipe_that_fits_and_runs(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", str(photos), "--hours", "0.02"]) == 0
    said = capsys.readouterr().out
    written = tmp_path / "mae_my_photos.yaml"
    text = written.read_text()
    assert f"30 photos of {photos} (0 MB, 2 classes, shorter side 36 px)" in said and "samples/s, measured" in said
    assert "# Time:      about" in text and "# share of patches" in text and "cores," in text
    recipe = load("mae_my_photos.yaml").recipe
    assert (recipe.backbone.image_size, recipe.backbone.patch_size) == (32, 4)
    assert recipe.data.root is not None and recipe.data.root.startswith(
        str(tmp_path / "runs" / "shards" / "my_photos-")
    )
    assert [task.protocol for task in recipe.evaluation.tasks] == ["linear", "knn"]
    assert files(tmp_path) >= {"mae_my_photos.yaml"} and not list(tmp_path.glob(".init-*"))

    assert main(["init", str(photos)]) == 2  # never over another file
    assert "exists already; name another file with --output" in capsys.readouterr().err
    assert written.read_text() == text


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _clouds(rng: np.random.Generator, number: int) -> dict[str, bytes]:
    return {"points.npy": _npy(rng.normal(size=(300 + number, 3)).astype(np.float32)), "cls": b"%d" % (number % 2)}


def _scans(rng: np.random.Generator, number: int) -> dict[str, bytes]:
    units = (rng.random((2, 20, 24, 18 + number)) * [[[[2000]]], [[[1]]]] - [[[[1000]]], [[[0]]]]).astype(np.float32)
    return {"volume.npy": _npy(units), "seg.npy": _npy((units[0] > 0).astype(np.uint8))}


def _grids(rng: np.random.Generator, number: int) -> dict[str, bytes]:
    return {"grid.npy": _npy(rng.integers(0, 255, (4, 40, 36, 33 + number), np.uint8))}


def _archives(rng: np.random.Generator, number: int) -> dict[str, bytes]:
    file = io.BytesIO()
    np.savez(file, image=rng.integers(0, 255, (36, 40, 34), np.uint8), window=np.zeros(2))
    return {"npz": file.getvalue()}


ARRAYS: dict[str, tuple[Callable[[np.random.Generator, int], dict[str, bytes]], str, dict[str, Any], list[str]]] = {
    "clouds": (
        _clouds,
        "clouds of 302 points",
        {"objective.name": "point_mae", "backbone.num_points": 300, "backbone.num_groups": 18},
        ["svm", "knn"],
    ),
    "scans": (
        _scans,
        "volumes of 20 x 24 x 20 voxels",
        {
            "objective.name": "volume_mae",
            "backbone.size": [20, 24, 20],
            "backbone.patch_size": 4,
            "backbone.in_chans": 2,
        },
        ["voxel_segmentation", "masked_reconstruction"],
    ),
    "grids": (
        _grids,
        "radiance grids of 40 x 36 x 35 voxels",
        {"objective.name": "nerf_mae", "backbone.size": [32, 32, 32]},
        ["masked_reconstruction"],
    ),
    "archives": (
        _archives,
        "volumes of 36 x 40 x 34 voxels",
        {"objective.name": "volume_mae", "objective.volume_array": "image", "backbone.size": [40, 40, 40]},
        ["masked_reconstruction"],
    ),
}


def _shards(folder: Path, sample: Callable[[np.random.Generator, int], dict[str, bytes]]) -> Path:
    rng, shards = np.random.default_rng(0), folder / "shards"
    shards.mkdir()
    (shards / "dataset.json").write_text('{"classes": ["one", "other"]}')
    for split in ("train", "test"):
        with tarfile.open(shards / f"{split}-000000.tar", "w") as tar:
            for number in range(5):
                for field, data in sample(rng, number).items():
                    member = tarfile.TarInfo(f"k{number}.{field}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return shards


@pytest.mark.parametrize("case", ARRAYS)
def test_init__writes_the_recipe_that_fits_clouds_volumes_and_grids(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the number of points, the sizes and the values of some samples; it loads, and the model fits the data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    sample, text, settings, protocols = ARRAYS[case]
    shards = _shards(tmp_path, sample)
    assert main(["init", "shards", "--hours", "0.001"]) == 0
    said = capsys.readouterr().out
    assert f"data      5 {text} in shards of {shards}" in said and "measured on 4 samples" in said
    plan = load_plan(f"{settings['objective.name']}_shards.yaml")
    for key, value in settings.items():
        section, name = key.split(".")
        assert getattr(getattr(plan.recipe, section), name) == value, key
    assert [task.protocol for task in plan.recipe.evaluation.tasks] == protocols
    title = {"point_mae": "Point-MAE", "nerf_mae": "NeRF-MAE", "volume_mae": "MAE"}[settings["objective.name"]]
    assert plan.recipe.description == f"{title} on shards, by pretrain init"
    look_ahead(plan)
    if case == "scans":
        mean, std = plan.recipe.backbone.voxel_mean, plan.recipe.backbone.voxel_std
        assert mean == pytest.approx([0, 0.5], abs=20) and std == pytest.approx([577, 0.289], rel=0.05)
    assert main(["init", "shards", "--model", "vit_small_patch16_224", "-o", "other.yaml"]) == 2
    said = f"--model vit_small_patch16_224: is of photos, and DATA shards is for {settings['objective.name']}; leave "
    assert said in capsys.readouterr().err and not (tmp_path / "other.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["photoss"], "DATA photoss: no such directory"),
        (
            ["my photos", "--objective", "meo"],
            "expected one of dino, dinov3, gmml, mae, selfpatch, sit; did you mean 'mae'?",
        ),
        (["my photos", "--hours", "nan"], "--hours nan: expected a number above 0 and below 10000"),
        (["my photos", "-o", "recipe.txt"], "expected a name that ends in .yaml"),
        (["."], "holds folders that look like splits"),
    ],
)
def test_init__wrong_requests_leave_nothing(
    photos: Path, tmp_path: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if arguments == ["."]:
        (photos.parent / "train").mkdir()
        (photos.parent / "val").mkdir()
        for split in ("train", "val"):
            (photos.parent / split / "a.jpg").write_bytes((photos / "cat" / "0.jpg").read_bytes())
    before = files(tmp_path)
    assert main(["init", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("folder", "said"),
    [
        ("my photos/cat/0.jpg", "is a file; expected the folder of photos or shards"),
        ("my photo", "no such directory; did you mean '{}/my photos'?"),
        ("texts", "no shards (.tar) and no photos (.jpg .jpeg .png .webp) in it"),
        (
            "clouds",
            "no shards (.tar) and no photos (.jpg .jpeg .png .webp) in it; point clouds and volumes are packed first: "
            "pretrain data pack {}/clouds shards/",
        ),
        ("${y}", "what has ${ in its own name has to be renamed, or reached through a link"),
        ("x${y", "what has ${ in its own name has to be renamed, or reached through a link"),
    ],
)
def test_init_and_run__say_the_same_of_data_that_are_none(
    photos: Path, tmp_path: Path, folder: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "texts" / "more").mkdir(parents=True)
    (tmp_path / "texts" / "more" / "around").symlink_to("..")
    (tmp_path / "texts" / "self").symlink_to("self")
    (tmp_path / "clouds" / "chair").mkdir(parents=True)
    (tmp_path / "clouds" / "chair" / "0.ply").touch()
    shutil.copytree(photos / "cat", tmp_path / "${y}")
    shutil.copytree(photos / "cat", tmp_path / "x${y")
    before = files(tmp_path)
    assert main(["init", folder]) == main(["run", "mae_photos", f"data.root={folder}"]) == 2
    of_init, of_run = capsys.readouterr().err.splitlines()
    said = said.replace("{}", str(tmp_path))
    assert of_init == f"error: DATA {folder}: {said}"
    assert of_run.startswith(f"error: command line: data.root={folder}: ") and of_run.endswith(said)
    assert files(tmp_path) == before


def test_dry_run__says_what_would_happen_and_leaves_nothing(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(tmp_path)
    wanted = ["train.epochs=10", "train.global_batch_size=8", "optimizer.warmup_steps=2"]
    assert main(["run", "mae_photos", f"data.root={photos}", *wanted, "--dry-run"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert files(tmp_path) == before
    train = int(said.split("2 classes: train ")[1].split(",")[0])
    assert f"{-(-10 * train // 8)} steps of 8" in said and "adamw, peak lr" in said
    assert f"would be packed, once, in {tmp_path}/runs/shards/my_photos-" in said
    assert "million trained parameters" in said and "linear/photos, knn/photos" in said and "mlflow.db" in said

    assert main(["run", "mae_photos", f"data.root={photos}", "train.steps=0", "--dry-run"]) == 2
    assert main(["run", "demo", "--dry-run"]) == 0
    demo = " ".join(capsys.readouterr().out.split())
    assert "740 samples of" in demo and "steps 0, 350, 700" in demo and "60.5 epochs" in demo
    assert files(tmp_path) == before
    assert load_plan("demo").total_steps == 700
