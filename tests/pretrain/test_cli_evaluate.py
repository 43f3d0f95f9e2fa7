"""`pretrain evaluate` on the command line: what it takes, the score, and test samples that say little."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backbones.io import load_backbone, save_backbone
from backbones.registry import create_backbone
from data_pipelines.packing.pack import pack
from evaluation import runner
from evaluation.registry import names
from evaluation.results import ResultStore
from evaluation.suites import protocols_of
from pretrain.cli.main import main
from pretrain.config.schema import EvaluationTask
from pretrain.evaluations import evaluate_tasks
from pretrain.record.events import Evaluated, EvaluationFailed, Warned
from pretrain.record.pictures import Drawn
from tests.pretrain.conftest import write_manifest


@pytest.fixture
def checkpoint(tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]) -> Path:
    """Of a small backbone, the last one of `run-1` in the storage `runs`."""
    where = make_checkpoint(tmp_path / "runs" / "run-1", 7)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2}
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=options)
    save_backbone(where / "backbone.safetensors", backbone.timm_state_dict(), backbone.spec)
    write_manifest(where, 7, "run-1")
    (where.parents[1] / "recipe.yaml").write_text("name: tiny\n")
    return where


def write_photos(folder: Path, count: int) -> None:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for number in range(count):
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(folder / f"{number}.png")


def test_evaluate__a_folder_of_photos_is_packed_once(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was refused with a line about shards; a run takes the same folder."""
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 30)
    arguments = ["evaluate", "run-1", "--data", f"mine={tmp_path / 'photos'}", "--storage", str(tmp_path / "runs")]
    assert main([*arguments, "--protocol", "knn"]) == 0
    packing, packed, header, row = capsys.readouterr().out.splitlines()
    assert packing.startswith("data: packing 60 photos") and "2 classes" in packed
    assert header.split() == ["protocol", "data", "metric", "score", "95", "%", "CI", "no", "backbone", "n", "time"]
    assert row.split()[:3] == ["knn", "mine", "top1"] and "% raw pixels" in row
    assert main([*arguments, "--protocol", "knn"]) == 0
    found, _, row = capsys.readouterr().out.splitlines()
    assert found.startswith("data: the shards of ") and row.endswith("known")


def test_evaluate__photos_that_give_no_score_and_a_run_that_is_not_there(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All that is wrong is said at once, and nothing is packed."""
    write_photos(tmp_path / "flat", 4)
    for name in ("ant", "bee"):
        write_photos(tmp_path / "few" / name, 1)
        write_photos(tmp_path / "many" / name, 30)
    (tmp_path / "empty").mkdir()
    data = [f"--data={name}={tmp_path / name}" for name in ("flat", "few", "many", "empty")]
    arguments = ["evaluate", "runs:/run-2", "--protocol", "segmentation", "--storage", str(tmp_path / "runs")]
    assert main([*arguments, *data[2:], "--data", "many=nowhere"]) == 2
    run, masks, shards, twice = capsys.readouterr().err.splitlines()
    assert run.startswith("error: no run 'run-2' in ") and "did you mean 'run-1'?" in run
    assert "photos have no labels for segmentation" in masks and twice.endswith(
        "many is named twice; give each its own name"
    )
    assert f"pretrain data pack {tmp_path / 'empty'} DEST --split train=0.9,test=0.1" in shards
    assert main(["evaluate", str(checkpoint), *data[:2], "--storage", str(tmp_path / "runs")]) == 2
    flat, few = capsys.readouterr().err.splitlines()
    assert "no folders of classes" in flat and "too few photos to hold some out" in few
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["run-1"]


def test_evaluate__warns_of_test_samples_that_are_in_train(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder with official splits, of which `val` has two pictures of `train`, from packing to the score."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            picture = tmp_path / "photos" / split / ("ant", "bee")[number % 2] / f"{number}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture)
    for number in (0, 1):
        name = f"{('ant', 'bee')[number]}/{number}.png"
        (tmp_path / "photos" / "val" / name).write_bytes((tmp_path / "photos" / "train" / name).read_bytes())
    with pytest.warns(UserWarning, match="2 samples of val have the content of some of train"):
        pack(tmp_path / "photos", tmp_path / "shards", workers=1)
    data = f"photos={tmp_path / 'shards'}"
    arguments = ["evaluate", str(checkpoint), "--protocol", "knn", "--data", data]
    for _ in range(2):  # also when the result is known
        assert main([*arguments, "--storage", str(tmp_path / "runs")]) == 0
        assert capsys.readouterr().err == (
            "warning: 2 of 6 test samples of photos are in its train split, too; scores on them say little\n"
        )


def test_evaluate_tasks__one_that_fails_stops_no_other_and_features_are_taken_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a run does with the tasks of a checkpoint on one data set."""
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 30)
    pack(tmp_path / "photos", tmp_path / "shards", splits={"train": 0.8, "test": 0.2}, workers=1)
    extracted = []
    write = runner.write_features
    monkeypatch.setattr(runner, "write_features", lambda *a, **k: (extracted.append(a), write(*a, **k)))
    tasks = [EvaluationTask(name, "mine") for name in ("linear", "segmentation", "knn")]
    storage = str(tmp_path / "runs")
    found = evaluate_tasks(
        str(checkpoint), 7, tasks, str(tmp_path / "shards"), storage, device="cpu", threads=2, training="/nowhere"
    )
    linear, segmentation, knn, *drawn = found
    pictures = [(event.step, event.data, event.shows) for event in drawn if isinstance(event, Drawn)]
    kinds = ("tokens", "linear_confusion", "knn_confusion", "knn_neighbors")
    assert pictures == [(7, "mine", kind) for kind in kinds] and len(pictures) == len(drawn)
    assert isinstance(linear, Evaluated) and isinstance(knn, Evaluated) and linear.step == knn.step == 7
    assert isinstance(segmentation, EvaluationFailed) and segmentation.task == "segmentation/mine"
    assert "seg.png" in segmentation.error and "\n" not in segmentation.error
    assert len(extracted) == 1


def test_evaluate_tasks__of_a_suite_leave_out_what_is_nothing_for_data_and_fail_by_broken_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    _write_shards(tmp_path / "shards", {"train": ["cls", "png"], "test": ["cls", "png"]})  # of one class
    tasks = [EvaluationTask("svm", "mine", suite="quick"), EvaluationTask("svm", "mine")]
    where = (str(tmp_path / "shards"), str(tmp_path / "runs"))
    options: dict[str, Any] = {"device": "cpu", "threads": 1, "training": "/nowhere"}
    of_suite, named = evaluate_tasks(str(checkpoint), 7, tasks, *where, **options)
    assert isinstance(of_suite, EvaluationFailed) and isinstance(named, EvaluationFailed)
    assert of_suite.left_out and of_suite.error == "svm needs training samples of at least 2 classes, and there is 1"
    assert not named.left_out and named.error == f"EvaluationError: {of_suite.error}"

    weights = load_file(checkpoint / "backbone.safetensors")
    with safe_open(checkpoint / "backbone.safetensors", "pt") as file:
        metadata = file.metadata()
    weights["norm.weight"] = weights["norm.weight"] * float("nan")
    save_file(weights, checkpoint / "backbone.safetensors", metadata)
    write_manifest(checkpoint, 7, "run-1")
    (broken,) = evaluate_tasks(str(checkpoint), 7, tasks[:1], *where, **options)
    assert isinstance(broken, EvaluationFailed) and not broken.left_out and "not finite" in broken.error


def test_evaluate_tasks__a_picture_that_cannot_be_drawn_is_one_line_and_costs_no_score_and_no_other_picture(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 10)
    pack(tmp_path / "photos", tmp_path / "shards", splits={"train": 0.5, "test": 0.5}, workers=1)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr("evaluation.pictures.draw.token_sheet", fail)
    arguments = (str(checkpoint), 7, [EvaluationTask("knn", "mine")], str(tmp_path / "shards"), str(tmp_path / "runs"))
    scored, *drawn, warned = evaluate_tasks(*arguments, device="cpu", threads=1, training="/nowhere")
    assert isinstance(scored, Evaluated) and isinstance(warned, Warned) and warned.about == "pictures"
    assert warned.text == "a picture of mine is not drawn: MemoryError: at all"
    assert [event.shows for event in drawn if isinstance(event, Drawn)] == ["knn_confusion", "knn_neighbors"]


def test_evaluate_tasks__of_a_checkpoint_that_was_deleted_meanwhile_say_so(tmp_path: Path) -> None:
    tasks = [EvaluationTask(name, "mine") for name in ("linear", "knn")]
    gone = tmp_path / "step-00000004"
    found = evaluate_tasks(str(gone), 4, tasks, "/nowhere", str(tmp_path), device="cpu", threads=1, training="/nowhere")
    assert [event.error for event in found if isinstance(event, EvaluationFailed)] == [
        f"its checkpoint {gone} is gone"
    ] * 2


def test_compare__says_which_of_two_checkpoints_is_better(
    checkpoint: Path,
    make_checkpoint: Callable[[Path, int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A backbone that sees nothing beside one that does, on photos of two colors; and what cannot be compared."""
    storage = tmp_path / "runs"
    blind = make_checkpoint(storage / "run-2", 7)
    backbone = load_backbone(checkpoint)
    tensors = {name: tensor.clone() for name, tensor in backbone.weights().items()}
    tensors["patch_embed.proj.weight"].zero_()
    save_backbone(blind / "backbone.safetensors", tensors, backbone.spec)
    write_manifest(blind, 7, "run-2")
    for number, name in enumerate(("ant", "bee")):
        write_photos(tmp_path / "photos" / name, 60)
        for path in (tmp_path / "photos" / name).iterdir():
            pixels = np.array(Image.open(path)) // 2
            pixels[..., number] += 120
            Image.fromarray(pixels).save(path)
    place = ["--storage", str(storage)]
    assert main(["compare", str(blind), "run-1", *place]) == 2
    assert "no evaluation of" in capsys.readouterr().err
    for reference in (str(blind), "run-1"):
        data = ["--data", f"mine={tmp_path / 'photos'}", "--protocol", "knn"]
        assert main(["evaluate", reference, *data, *place]) == 0
    capsys.readouterr()
    assert main(["compare", str(blind), "run-1", *place]) == 0
    header, row = capsys.readouterr().out.splitlines()
    assert header.split()[:3] == ["task", "first", "second"]
    assert row.startswith("knn/mine top1") and row.rstrip().endswith("better") and "points [" in row
    store, digest = ResultStore(storage), json.loads(next((storage / "evaluations").glob("*.json")).read_text())
    others = [
        store.publish(replace(result, key=f"other-{number}", data_digest="0123456789"))
        for number, result in enumerate(list(store.all()))
    ]
    assert main(["compare", str(blind), "run-1", *place]) == 0
    tasks = [row.split()[0] for row in capsys.readouterr().out.splitlines() if row.startswith("knn")]
    assert tasks == sorted(["knn/mine:01234567", f"knn/mine:{digest['data_digest'][:8]}"])
    for other in others:
        (storage / "evaluations" / f"{other.key}.json").unlink()
    assert main(["compare", "run-1", "run-1", *place]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith("within noise")
    for kept in (storage / "evaluations").glob("*.npz"):  # as results of an older version
        kept.unlink()
    assert main(["compare", str(blind), "run-1", *place]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines()[1].rstrip().endswith("not known") and "evaluate --again" in told.err
    for reference in (str(blind), "run-1"):
        assert main(["evaluate", reference, *data, "--again", *place]) == 0
    capsys.readouterr()
    assert main(["compare", str(blind), "run-1", *place]) == 0
    assert capsys.readouterr().out.splitlines()[1].rstrip().endswith("better")


def test_evaluate__a_device_that_is_not_there_is_refused_in_one_line(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 30)
    arguments = ["evaluate", "run-1", "--data", f"mine={tmp_path / 'photos'}", "--storage", str(tmp_path / "runs")]
    assert main([*arguments, "--protocol", "knn", "--device", "gpu7"]) == 2
    assert "--device gpu7: " in capsys.readouterr().err
    assert main([*arguments, "--protocol", "knn", "--device", "meta"]) == 2
    assert "--device meta: " in capsys.readouterr().err
    real = torch.ones

    def fail(*size: int, device: str) -> None:
        raise RuntimeError(
            "CUDA error: invalid device ordinal\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "ones", lambda *size, **given: (fail if "device" in given else real)(*size, **given))
        assert main([*arguments, "--protocol", "knn", "--device", "cuda:9"]) == 2
    assert "--device cuda:9: CUDA error: invalid device ordinal; cpu is always there" in capsys.readouterr().err


def test_evaluate__weights_of_others_are_graded_as_they_are_and_other_models_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A state dict of a timm model as torch writes it; the same again is known; one of another model is refused."""
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 12)
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False)
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    place = ["--data", f"mine={tmp_path / 'photos'}", "--protocol", "knn", "--storage", str(tmp_path / "runs")]
    reference = f"timm:test_vit@{tmp_path / 'theirs.pth'}"
    assert main(["evaluate", reference, *place]) == 0
    first = capsys.readouterr().out.splitlines()[-1].split()
    assert main(["evaluate", reference, *place]) == 0
    again = capsys.readouterr().out.splitlines()[-1].split()
    assert again[:4] == first[:4] and again[-1] == "known"
    (made,) = (tmp_path / "runs" / "backbones").iterdir()
    graded = load_backbone(made)
    pictures = torch.zeros(1, 3, 160, 160)
    with torch.inference_mode():
        assert torch.equal(graded.features(pictures).tokens, model.eval().forward_features(pictures)[:, 1:])
    assert main(["evaluate", str(made / "backbone.safetensors"), *place]) == 0  # a file of ours, by itself
    assert capsys.readouterr().out.splitlines()[-1].split()[-1] == "known"

    registers = {**model.state_dict(), "reg_token": torch.zeros(1, 4, 64)}
    torch.save(registers, tmp_path / "other.pth")
    assert main(["evaluate", f"timm:test_vit@{tmp_path / 'other.pth'}", *place]) == 2
    assert "1 tensors are not of this model, and are in the file: reg_token" in capsys.readouterr().err
    for name in ("head.norm.weight", "head_dist.weight"):  # of other classifiers than that of this model
        torch.save({**model.state_dict(), name: torch.zeros(64)}, tmp_path / "other.pth")
        assert main(["evaluate", f"timm:test_vit@{tmp_path / 'other.pth'}", *place]) == 2
        assert f"1 tensors are not of this model, and are in the file: {name}" in capsys.readouterr().err
    torch.save({"patch_embed.proj.weight": registers["patch_embed.proj.weight"]}, tmp_path / "half.pth")
    assert main(["evaluate", f"timm:test_vit@{tmp_path / 'half.pth'}", *place]) == 2
    assert "tensors are missing in the file" in capsys.readouterr().err
    assert main(["evaluate", f"timm:test_vit@{tmp_path / 'none.pth'}", *place]) == 2
    assert "no such file" in capsys.readouterr().err


def test_evaluate__a_suite_runs_what_fits_backbone_and_labels(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("ant", "bee"):
        write_photos(tmp_path / "photos" / name, 30)
    place = ["--data", f"mine={tmp_path / 'photos'}", "--storage", str(tmp_path / "runs")]
    assert main(["evaluate", "run-1", "--suite", "quick", *place]) == 0
    told = capsys.readouterr()
    rows = [line.split()[:2] for line in told.out.splitlines() if " mine " in line]
    assert rows == [["knn", "mine"], ["ridge", "mine"], ["spectrum", "mine"]]
    assert "1/3: knn on mine" in told.err
    assert main(["evaluate", "run-1", "--suite", "quick", "--protocol", "knn", *place]) == 2
    assert "--suite quick beside --protocol knn: give one of them" in capsys.readouterr().err


def test_evaluate__what_data_are_too_few_for_is_left_out_unless_it_was_named(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stopped all that came after it, whose data were good; labels of one split alone are none."""
    _write_shards(tmp_path / "shards", {"train": ["cls", "png"], "test": ["cls", "png"]})
    place = ["--data", f"mine={tmp_path / 'shards'}", "--storage", str(tmp_path / "runs")]
    assert main(["evaluate", "run-1", "--suite", "full", *place]) == 0
    told = capsys.readouterr()
    found = [line.split()[0] for line in told.out.splitlines() if " mine " in line]
    assert {"knn", "ridge", "spectrum", "token_health"} < set(found) and "svm" not in found
    assert "warning: svm on mine is left out: svm needs training samples of at least 2 classes" in told.err
    assert main(["evaluate", "run-1", "--protocol", "svm", "--protocol", "knn", *place]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "error: svm needs training samples of at least 2 classes" in told.err

    _write_shards(tmp_path / "half", {"train": ["cls", "png"], "test": ["png"]})
    place[1] = f"mine={tmp_path / 'half'}"
    assert main(["evaluate", "run-1", "--suite", "quick", *place]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if " mine " in line] == ["spectrum"]


def _write_shards(folder: Path, fields: Mapping[str, Sequence[str]]) -> None:
    """A shard of 6 images of noise per split, all of class 0, with those fields."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    (folder / "dataset.json").write_text('{"classes": ["ant", "bee"]}')
    for split, names_of_split in fields.items():
        with tarfile.open(folder / f"{split}-000000.tar", "w") as shard:
            for number in range(6):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(picture, "PNG")
                for field in names_of_split:
                    content = {"cls": b"0", "png": picture.getvalue()}[field]
                    member = tarfile.TarInfo(f"{split}{number}.{field}")
                    member.size = len(content)
                    shard.addfile(member, io.BytesIO(content))


def test_suites__have_no_name_that_no_protocol_has() -> None:
    for kind in ("image", "points"):
        quick, standard, full = (set(protocols_of(suite, kind)) for suite in ("quick", "standard", "full"))
        assert quick < standard <= full and set(names()) - full == {"finetune"}
        assert ("svm" in quick) == (kind == "points")
