"""What is refused before Ray starts because the model or the data say so; nothing is left of it."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest
import torch

from pretrain import driver
from pretrain.cli.main import main
from pretrain.config.load import load_plan
from pretrain.training.preflight import look_ahead


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
        (["data.train={points}"], "data.train={points}: objective mae: "),
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
def test_run__what_model_and_data_refuse_starts_nothing(
    points: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    settings: list[str],
    said: str,
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(driver._Driver, "drive", lambda self: pytest.fail("Ray would start"))
    settings = [text.replace("{points}", str(points)) for text in settings]
    select = ["evaluation.select=null"] if any("evaluation" in text for text in settings) else []
    assert main(["run", "demo", *settings, *select, f"storage={tmp_path}/runs"]) == 2
    assert said.replace("{points}", str(points)) in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_run__cuda_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", "train.device=cuda", f"storage={tmp_path}/runs"]) == 2
    assert "train.device=cuda: this machine has no GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_look_ahead__says_the_size_of_a_large_model_without_its_memory() -> None:
    settings = ["backbone.name=vit_large_patch16_224", "backbone.options={}", "train.zero_stage=0"]
    line = look_ahead(load_plan("demo", settings))
    assert line == (
        "302.7 million trained parameters; all weights, gradients and moments take about 4.84 GB per worker, besides "
        "activations"
    )
