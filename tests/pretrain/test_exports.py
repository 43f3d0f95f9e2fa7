"""Exports: each form is loaded by the program that it is for, and computes what the backbone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from backbones.images.base import ImageEncoder
from backbones.io import load_backbone as load_file
from backbones.io import save_backbone
from backbones.registry import create_backbone
from pretrain.checkpoints.references import load_backbone
from pretrain.cli.main import main
from pretrain.errors import RequestError, RunFailed
from pretrain.exports.export import FORMATS, export
from tests.pretrain.conftest import write_manifest

VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2, "reg_tokens": 2}
IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def published(tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]) -> Callable[..., Path]:
    """`published(name, **settings)`: a checkpoint of that backbone with weights of no pattern."""

    def publish(name: str = "vit_tiny_patch16_224", **settings: Any) -> Path:
        torch.manual_seed(0)
        settings = {"image_size": 32, "patch_size": 8, "options": VIT, **settings} if "vit_" in name else settings
        backbone = create_backbone(name, **settings)
        with torch.no_grad():
            for weight in backbone.network.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        checkpoint = make_checkpoint(tmp_path / "runs" / "run-1", 7)
        save_backbone(checkpoint / "backbone.safetensors", backbone.weights(), backbone.spec)
        write_manifest(checkpoint, 7, "run-1")
        (tmp_path / "runs" / "run-1" / "recipe.yaml").write_text("name: tiny\n")
        return checkpoint

    return publish


def expected(checkpoint: Path) -> tuple[ImageEncoder, dict[str, Tensor]]:
    backbone = load_backbone(checkpoint)
    assert isinstance(backbone, ImageEncoder)
    with torch.inference_mode():
        features = backbone.features(IMAGES)
    named = {"patches": features.patches, "cls": features.cls, "registers": features.registers}
    return backbone, {name: value for name, value in named.items() if value is not None}


def test_export__timm_loads_the_folder_in_a_process_without_pretrain(
    published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The class token is `forward`, the tokens are `forward_features`, the normalization is the backbone's own."""
    checkpoint = published(pixel_mean=[0.4, 0.5, 0.6], pixel_std=[0.2, 0.3, 0.25])
    backbone, features = expected(checkpoint)
    arguments = ["export", "runs:/run-1/7", "--storage", str(tmp_path / "runs"), "--format", "timm"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "is in" in capsys.readouterr().out and sorted(os.listdir(tmp_path / "out")) == [
        "config.json",
        "model.safetensors",
    ]
    torch.save(IMAGES, tmp_path / "images.pt")
    program = """if True:
        import sys, timm, torch
        model = timm.create_model("local-dir:out", pretrained=True).eval()
        images, config = torch.load("images.pt"), timm.data.resolve_model_data_config(model)
        tuned = timm.create_model("local-dir:out", pretrained=True, num_classes=10, in_chans=1)
        assert not {"pretrain", "backbones"} & sys.modules.keys() and model.num_classes == 0
        assert torch.equal(tuned.blocks[1].norm1.weight, model.blocks[1].norm1.weight)
        with torch.inference_mode():
            torch.save([config, model(images), model.forward_features(images)], "found.pt")
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, check=True)
    config, vector, tokens = torch.load(tmp_path / "found.pt")
    assert (config["input_size"], config["mean"], config["std"], config["crop_pct"]) == (
        (3, 32, 32),
        [0.4, 0.5, 0.6],
        [0.2, 0.3, 0.25],
        1.0,
    )
    torch.testing.assert_close(vector, features["cls"])
    with torch.inference_mode():
        torch.testing.assert_close(tokens, backbone.forward_features(IMAGES))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"options": {**VIT, "class_token": False}}),
        ("vit_small_patch16_rope_mixed_224", {"options": {"depth": 1, "embed_dim": 24, "num_heads": 2}}),
        ("eva02_tiny_patch14_224", {"image_size": 28, "options": {"depth": 1, "embed_dim": 24, "num_heads": 2}}),
        ("convnext_atto.d2_in1k", {"image_size": 32, "in_chans": 3}),
    ],
)
def test_export__hf_is_a_timm_folder_with_a_card(
    name: str, settings: dict[str, Any], published: Callable[..., Path], tmp_path: Path
) -> None:
    import timm

    checkpoint = published(name, **settings)
    backbone = load_backbone(checkpoint)
    assert isinstance(backbone, ImageEncoder)
    folder = export(checkpoint, "hf", tmp_path / "new" / "repository")
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward_features(images), backbone.forward_features(images))
        vector = model(images)
        if backbone.has_plain_blocks:
            torch.testing.assert_close(vector, backbone.features(images).pooled)
    assert vector.shape == (2, backbone.embed_dim)
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == name.partition(".")[0] and config["num_classes"] == 0
    assert not {"license", "url", "hf_hub_id", "tag"} & config["pretrained_cfg"].keys()  # of other weights
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n") and "step 7 of the run `run-1`" in card


def test_export__safetensors_is_a_backbone_file(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, _ = expected(published())
    monkeypatch.chdir(tmp_path)
    file = export(tmp_path / "runs" / "run-1", "safetensors", "weights.safetensors")
    assert file == tmp_path / "weights.safetensors"
    with safe_open(file, framework="pt") as opened:
        assert all(torch.equal(opened.get_tensor(name), tensor) for name, tensor in backbone.weights().items())
        assert json.loads(opened.metadata()["pretrain.backbone"]) == backbone.spec
    assert torch.equal(load_file(file).weights()["pos_embed"], backbone.weights()["pos_embed"])


@pytest.mark.parametrize("settings", [{}, {"options": {**VIT, "class_token": False, "reg_tokens": 0}}])
def test_export__torchscript_takes_any_number_of_images(
    settings: dict[str, Any], published: Callable[..., Path], tmp_path: Path
) -> None:
    _, features = expected(published(**settings))
    graph = torch.jit.load(export(tmp_path / "runs" / "run-1", "torchscript", tmp_path / "graph.pt"))
    found = graph(IMAGES)
    assert found.keys() == features.keys()
    for name, tensor in features.items():
        torch.testing.assert_close(found[name], tensor)
    assert graph(IMAGES[:1])["patches"].shape[0] == 1


def test_export__onnx_takes_any_number_of_images(
    published: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, features = expected(published())
    assert main(["export", str(tmp_path / "runs" / "run-1"), "--format", "onnx", str(tmp_path / "graph.onnx")]) == 0
    captured = capfd.readouterr()
    assert captured.err == "" and len(captured.out.splitlines()) == 1
    session = onnxruntime.InferenceSession(str(tmp_path / "graph.onnx"), providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape) for entry in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    assert [entry.name for entry in session.get_outputs()] == ["patches", "cls", "registers"]
    for images in (IMAGES, IMAGES[:1]):
        found = dict(zip(features, session.run(list(features), {"images": images.numpy()}), strict=True))
        for name, tensor in features.items():
            torch.testing.assert_close(torch.from_numpy(found[name]), tensor[: len(images)], atol=1e-4, rtol=1e-4)
    assert sorted(os.listdir(tmp_path)) == ["graph.onnx", "runs"]


@pytest.mark.parametrize("form", FORMATS)
def test_export__refuses_what_is_there_and_leaves_it(
    form: str, published: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = published()
    there = tmp_path / "there"
    there.mkdir()
    (there / "mine.txt").write_text("mine")
    for dest in (there, there / "mine.txt"):
        assert main(["export", str(checkpoint), "--format", form, str(dest)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {dest}: already exists; choose another destination or remove it")
    assert (there / "mine.txt").read_text() == "mine" and os.listdir(there) == ["mine.txt"]


def test_export__wrong_requests_are_one_line(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = str(published())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "onnxscript", None)  # what a missing package looks like to an import
        patch.setattr("pretrain.exports.export.find_spec", lambda name: None if name == "onnxscript" else True)
        assert main(["export", checkpoint, "--format", "onnx", str(tmp_path / "a")]) == 2
    assert capsys.readouterr().err == (
        "error: format onnx needs onnxscript; install with: pip install 'pretrain[onnx]'\n"
    )
    file = f"{checkpoint}/recipe.yaml"
    for arguments, said in (
        (["nowhere", "--format", "timm", "a"], "error: checkpoint nowhere: no such directory"),
        ([checkpoint, "--format", "keras", "a"], "error: Invalid value for '--format': 'keras' is not one of"),
        ([checkpoint, "a"], "error: Missing option '--format'"),
        ([checkpoint, "--format", "timm", f"{file}/a"], f"error: {file}/a: {file} is no folder; choose another"),
        ([checkpoint, "--format", "timm", "s3://bucket/a"], "error: s3://bucket/a: an export is written to a local"),
    ):
        assert main(["export", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(said)
    with pytest.raises(RequestError, match="format keras: unknown; known are timm, hf"):
        export(checkpoint, "keras", tmp_path / "a")


def test_export__what_does_not_compute_the_same_leaves_nothing(
    published: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that timm makes otherwise, as after a change of its code."""
    import timm

    made = timm.create_model

    def other(name: str, **settings: Any) -> Any:
        model = made(name, **settings)
        if name.startswith("local-dir:"):
            torch.nn.init.ones_(model.norm.bias)
        return model

    checkpoint = published()
    monkeypatch.setattr(timm, "create_model", other)
    with pytest.raises(
        RunFailed, match="timm does not rebuild backbone 'vit_tiny_patch16_224': 1 weights differ, such"
    ):
        export(checkpoint, "timm", tmp_path / "out" / "folder")
    assert sorted(os.listdir(tmp_path)) == ["runs"]
