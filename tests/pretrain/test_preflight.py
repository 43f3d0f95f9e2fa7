"""What is refused because the model or the data say so, before anything of a run is written."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pretrain
from pretrain.cli.main import main
from pretrain.config.load import load_plan
from pretrain.errors import RequestError
from pretrain.training.preflight import look_ahead, size_line


@pytest.fixture
def points(tmp_path: Path) -> Path:
    """Shards of point clouds, without labels."""
    for split in ("train", "test"):
        with tarfile.open(tmp_path / f"{split}-000000.tar", "w") as tar:
            member = tarfile.TarInfo("a.points.npy")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"1234"))
    return tmp_path


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["objective.decoder_heads=5"], "decoder_dim 96 is not a multiple of decoder_heads 5"),
        (["backbone.options={pretrained: true}"], "'pretrained' is set by the platform"),
        (["backbone.options={nonsense: 1}"], "unexpected keyword argument 'nonsense'"),
        (["objective.mask_ratio=0.99"], "leaves nothing to see or to predict"),
        (["data.train={points}"], "data.train={points}: its field points.npy holds "),
        (
            ["evaluation.data={mine: {points}}", "evaluation.tasks=[{protocol: knn, data: mine}]"],
            "evaluation.data.mine={points}: protocol knn: {points}: no field cls",
        ),
        (
            ["stages=[{name: a}, {name: b, objective: {decoder_heads: 7}}]"],
            "stage b: decoder_dim 96 is not a multiple of decoder_heads 7",
        ),
    ],
)
def test_look_ahead__refuses_what_model_and_data_do(
    points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    settings = [text.replace("{points}", str(points)) for text in settings]
    select = ["evaluation.select=null"] if any("evaluation" in text for text in settings) else []
    with pytest.raises(RequestError) as refused:
        look_ahead(load_plan("demo", [*settings, *select]))
    assert said.replace("{points}", str(points)) in str(refused.value)


@pytest.mark.integration
def test_run__what_the_look_refuses_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """The worker looks, since it has torch; neither MLflow nor a log of the failure is begun."""
    command = [sys.executable, "-m", "pretrain", "run", "demo", "train.workers=2"]
    wrong = ["objective.decoder_heads=5", f"storage={tmp_path}/new/runs"]
    done = subprocess.run([*command, *wrong], capture_output=True, text=True)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr == "error: decoder_dim 96 is not a multiple of decoder_heads 5\n"
    assert list(tmp_path.iterdir()) == []


def test_run__on_a_cluster_looks_before_it_connects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cluster may have no place for the workers for hours."""
    wrong = ["objective.decoder_heads=5", f"storage={tmp_path}/runs"]
    assert main(["run", "demo", *wrong, "--address", "127.0.0.1:1"]) == 2
    assert capsys.readouterr().err == "error: decoder_dim 96 is not a multiple of decoder_heads 5\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_run__cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "train.device=cuda", f"storage={tmp_path}/runs"]) == 2
    assert "train.device=cuda: this machine has no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_look_ahead__says_the_size_of_a_large_model_without_its_memory() -> None:
    settings = ["backbone.name=vit_large_patch16_224", "backbone.options={}", "train.zero_stage=0", "train.workers=1"]
    found = look_ahead(load_plan("demo", [*settings, "train.micro_batch_size=null"]))
    activations = found[0].activations if found[0] is not None else None
    assert activations is not None and activations > 1e9
    assert size_line(found) == (
        "302.7 million trained parameters; all weights, gradients and moments take about 4.84 GB per worker, "
        f"activations about {activations / 1e9:.2f} GB"
    )
    assert size_line([None]) == ""


def test_run__a_koleo_group_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And sizes of other views than the usual ones; each mistake with its stage."""
    data = Path(pretrain.__file__).parent / "demo_data" / "grocery"
    wrong = ["stages[1].objective.koleo_group=24", "stages[2].objective.mix_share=[0.5]"]
    wrong += ["stages[2].objective.mix_global=[60]", "stages[2].objective.mix_local=[24]"]
    request = ["run", "dinov3_cifar10", f"data.root={data}", f"storage={tmp_path}/runs", *wrong]
    for address in ("--dry-run", "--address=127.0.0.1:1"):
        assert main([*request, address]) == 2
        group, size = capsys.readouterr().err.splitlines()
        assert group == (
            "error: stage gram: objective.koleo_group=24: it has to be a multiple of the 32 images of a micro-batch "
            "that divides the 64 of all ranks"
        )
        assert size.startswith("error: stage highres: objective 'dinov3' needs images of 60 px: ")
    assert list(tmp_path.iterdir()) == []


def test_look_ahead__labels_of_volumes_are_an_array_of_the_npz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    image = np.zeros((9, 9, 9), np.uint8)
    for name, arrays in (("bare", {"image": image}), ("labelled", {"image": image, "label": image})):
        (tmp_path / name).mkdir()
        file = io.BytesIO()
        np.savez(file, **arrays)
        for split in ("train", "test"):
            with tarfile.open(tmp_path / name / f"{split}-000000.tar", "w") as tar:
                member = tarfile.TarInfo("a.npz")
                member.size = len(file.getvalue())
                tar.addfile(member, io.BytesIO(file.getvalue()))
    root = f"data.root={tmp_path / 'labelled'}"
    labelled = load_plan("volume_mae_hippocampus", [root])
    with pytest.raises(RequestError, match=r"protocol voxel_segmentation: dataset\.json must list `classes` for dense"):
        look_ahead(labelled)
    (tmp_path / "labelled" / "dataset.json").write_text('{"classes": ["ground", "organ"]}')
    look_ahead(labelled)
    with pytest.raises(RequestError) as refused:
        look_ahead(load_plan("volume_mae_hippocampus", [root, "objective.norm_pix_loss=true"]))
    assert str(refused.value).startswith(
        "evaluation.tasks[1].protocol=masked_reconstruction: protocol 'masked_reconstruction' needs a decoder of "
        "hidden voxels beside the backbone, and this objective has none; "
    )
    with pytest.raises(RequestError, match=r"which patches of 6 voxels \(backbone.patch_size\) do not tile"):
        look_ahead(load_plan("volume_mae_hippocampus", [root, "backbone.patch_size=6", "backbone.size=[36,48,36]"]))
    with pytest.raises(RequestError) as refused:
        look_ahead(load_plan("volume_mae_hippocampus", [f"data.root={tmp_path / 'bare'}"]))
    said = str(refused.value)
    assert "protocol voxel_segmentation: " in said and "no array 'label' with labels; it has image" in said


def _npz_shards(folder: Path, **arrays: np.ndarray) -> Path:
    """Shards whose samples are npz files, of which a name says nothing; without labels."""
    folder.mkdir()
    file = io.BytesIO()
    np.savez(file, **arrays)
    for split in ("train", "test"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            member = tarfile.TarInfo("a.npz")
            member.size = len(file.getvalue())
            tar.addfile(member, io.BytesIO(file.getvalue()))
    return folder


SCAN, GRID = np.zeros((40, 48, 40), np.uint8), np.zeros((4, 32, 32, 32), np.uint8)
MISPAIRED: dict[str, tuple[str, dict[str, np.ndarray], str, str]] = {
    "clouds of a scan": ("point_mae_psb", {"image": SCAN}, "array of shape (40, 48, 40) is no cloud", "volume_mae_"),
    "grids of a scan": ("nerf_mae_synthetic", {"image": SCAN}, "has 1 channel of field npz, and ", "volume_mae_"),
    "scans of a grid": ("volume_mae_hippocampus", {"image": GRID}, "has 4 channels of field npz, and ", "nerf_mae_"),
    "photos of a scan": ("mae_cifar10", {"image": SCAN}, "has 40 channels of field npz, and ", "volume_mae_"),
    "scans of a cloud": ("volume_mae_hippocampus", {"image": np.zeros((900, 3))}, "is no volume", "point_mae_psb"),
    "photos of two arrays": ("mae_cifar10", {"image": SCAN, "label": SCAN}, "npz has several arrays", "volume_mae_"),
}


@pytest.mark.parametrize("case", MISPAIRED)
def test_look_ahead__arrays_whose_field_says_nothing_are_looked_into(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names field, data and fitting recipes before Ray starts; workers would fail at the first step."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    recipe, arrays, said, fitting = MISPAIRED[case]
    root = _npz_shards(tmp_path / "shards", **arrays)
    with pytest.raises(RequestError) as refused:
        look_ahead(load_plan(recipe, [f"data.root={root}", "evaluation.enabled=false"]))
    (line,) = str(refused.value).splitlines()
    assert line.startswith(f"data.train={root}/train-*.tar: objective ") and said in line
    assert "field npz" in line and "; recipes of " in line and fitting in line.partition("; recipes of ")[2]


def test_look_ahead__evaluation_data_without_the_array_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the run would train, and each of its evaluations fail."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    root = _npz_shards(tmp_path / "shards", ct=SCAN, label=SCAN)
    (root / "dataset.json").write_text('{"classes": ["ground", "organ"]}')
    other = _npz_shards(tmp_path / "others", image=SCAN, pet=SCAN, label=SCAN)
    (other / "dataset.json").write_text('{"classes": ["ground", "organ"]}')
    small = ["backbone.depth=1", "objective.decoder_depth=1", "train.global_batch_size=2"]
    settings = [f"data.root={root}", "objective.volume_array=ct", *small]
    look_ahead(load_plan("volume_mae_hippocampus", settings))
    with pytest.raises(RequestError) as refused:
        look_ahead(load_plan("volume_mae_hippocampus", [*settings, f"evaluation.data.volumes={other}"]))
    said = [line for line in str(refused.value).splitlines() if "protocol voxel_segmentation: " in line]
    assert len(said) == 1 and said[0].startswith(f"evaluation.data.volumes={other}: protocol voxel_segmentation: ")
    assert said[0].endswith(
        "field npz: npz has no array 'ct', which the backbone was trained on, and several others: image, pet, label; "
        "give the one to be read that name"
    )


def test_look_ahead__a_damaged_first_sample_counts_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    root = _npz_shards(tmp_path / "shards", image=np.full(SCAN.shape, np.nan, np.float32))
    settings = [f"data.root={root}", "evaluation.enabled=false"]
    look_ahead(load_plan("volume_mae_hippocampus", [*settings, "data.max_corrupt_fraction=0.5"]))
    with pytest.raises(RequestError, match=r"field npz: 76800 of 76800 voxels are not finite$"):
        look_ahead(load_plan("volume_mae_hippocampus", settings))
