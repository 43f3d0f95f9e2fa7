"""`evaluate` on a tiny random backbone: keys, caching, failures; and on the real data of the package."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed

from backbones.images.vit import ViTBackbone
from backbones.io import load_backbone
from data_pipelines.decode import decode_image
from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.index import scan_shard, sidecar
from data_pipelines.views.crops import eval_view
from evaluation import EvaluationData, EvaluationError, EvaluationResult, evaluate
from evaluation.protocols.linear.score import batch_rows
from evaluation.registry import PROTOCOLS
from evaluation.threads import Threads
from pretrain.config.checks.evaluation import evaluation_data_problem
from tests.evaluation.conftest import TINY

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def quick_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few steps: these tests are about what surrounds the heads."""
    for name in ("linear", "segmentation"):
        params = MappingProxyType({**PROTOCOLS[name].params, "min_steps": 30, "epochs": 1})
        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], params=params))


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Batch sizes of every call of a backbone, in order."""
    sizes: list[int] = []
    original = ViTBackbone.features

    def counted(self: ViTBackbone, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert not self.training and torch.is_inference_mode_enabled()
        sizes.append(len(x))
        return original(self, x, *args, **kwargs)

    monkeypatch.setattr(ViTBackbone, "features", counted)
    return sizes


def _data(colours: EvaluationData, halves: EvaluationData, protocol: str) -> EvaluationData:
    return halves if protocol == "segmentation" else colours


@pytest.mark.parametrize("protocol", ["linear", "knn", "segmentation"])
def test_evaluate__second_call_is_cached_and_extracts_nothing(
    tmp_path: Path,
    checkpoint: Make,
    colours: EvaluationData,
    halves: EvaluationData,
    forwards: list[int],
    protocol: str,
) -> None:
    data, weights = _data(colours, halves, protocol), checkpoint()
    first = evaluate(weights, protocol, data, store=tmp_path, batch_size=16)
    of_images = tuple(metric for metric in PROTOCOLS[protocol].metrics if metric.name != "top1_distances")
    assert tuple(first.metrics) == tuple(metric.name for metric in of_images) and first.described == of_images
    assert all(0 <= value <= 1 for value in first.metrics.values())
    assert not first.cached and sum(forwards) == first.details["num_train"] + first.details["num_test"]
    forwards.clear()
    again = evaluate(weights, protocol, data, store=tmp_path, batch_size=3)
    assert again == dataclasses.replace(first, cached=True)
    assert forwards == []
    stored = json.loads((tmp_path / "evaluations" / f"{first.key}.json").read_text())
    assert stored["metrics"] == first.metrics and stored["cached"] is False


def test_evaluate__colours_are_easy_and_squares_are_found(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, halves: EvaluationData
) -> None:
    weights = checkpoint()
    assert evaluate(weights, "linear", colours, store=tmp_path).metrics["top1"] == 1.0
    assert evaluate(weights, "knn", colours, store=tmp_path).metrics["top1"] == 1.0
    dense = evaluate(weights, "segmentation", halves, store=tmp_path)
    assert dense.metrics["miou"] > dense.metrics["miou_position_prior"] + 0.1


def test_evaluate__linear_and_knn_share_one_extraction(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, forwards: list[int]
) -> None:
    weights = checkpoint()
    linear = evaluate(weights, "linear", colours, store=tmp_path)
    num_forwards = len(forwards)
    knn = evaluate(weights, "knn", colours, store=tmp_path)
    assert len(forwards) == num_forwards
    assert (linear.details["features_cached"], knn.details["features_cached"]) == (False, True)
    assert linear.key != knn.key


@pytest.mark.parametrize("protocol", ["linear", "knn", "ridge", "segmentation"])
def test_evaluate__neither_batch_size_nor_threads_decide_anything(
    tmp_path: Path, checkpoint: Make, noise: EvaluationData, halves: EvaluationData, protocol: str
) -> None:
    weights, data = checkpoint(), _data(noise, halves, protocol)
    results = [
        evaluate(
            weights, protocol, data, store=tmp_path / str(size), batch_size=size, threads=Threads(number), device="cpu"
        )
        for size, number in ((1, 1), (7, 3), (64, 2))
    ]
    counts = (results[0].details["num_train"], results[0].details["num_test"])
    assert all(any(count % size for count in counts) for size in (7, 64))
    assert 0 < results[0].metrics[PROTOCOLS[protocol].headline.name] < 1
    assert results[0].metrics == results[1].metrics == results[2].metrics
    assert len({result.key for result in results}) == 1


def test_evaluate__features_in_half_precision_are_half_the_bytes_and_another_result(
    tmp_path: Path, checkpoint: Make, noise: EvaluationData
) -> None:
    weights, data = checkpoint(), noise
    single = evaluate(weights, "knn", data, store=tmp_path / "single")
    half = evaluate(weights, "knn", data, store=tmp_path / "half", half_features=True)
    assert half.key != single.key and half.details["half_features"] and "half_features" not in single.details
    stored = [
        {path.name: np.load(path) for path in (tmp_path / name / "features").glob("*/*.npy")}
        for name in ("single", "half")
    ]
    assert [stored[number]["test.patch_mean.npy"].dtype for number in (0, 1)] == [np.float32, np.float16]
    assert stored[1]["train.labels.npy"].dtype == np.int64
    np.testing.assert_allclose(stored[1]["test.cls.npy"], stored[0]["test.cls.npy"], rtol=1e-3, atol=1e-6)
    assert half.metrics["top1"] == pytest.approx(single.metrics["top1"], abs=0.1)  # 2 of 23 images

    def enlarge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["norm.weight"] *= 1e5

    with pytest.raises(EvaluationError, match="is beyond half precision; keep features in single precision"):
        evaluate(checkpoint(edit=enlarge), "knn", data, store=tmp_path / "half", half_features=True)


def test_evaluate__key_follows_weights_and_not_the_path(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData
) -> None:
    first = evaluate(checkpoint(seed=0), "knn", colours, store=tmp_path)
    copy = tmp_path / "elsewhere"
    shutil.copytree(tmp_path / "checkpoint-0", copy)
    assert evaluate(copy, "knn", colours, store=tmp_path).cached
    assert evaluate(copy / "backbone.safetensors", "knn", colours, store=tmp_path).cached
    other = evaluate(checkpoint(seed=1), "knn", colours, store=tmp_path)
    assert not other.cached and other.key != first.key and other.weights_digest != first.weights_digest


def test_evaluate__key_follows_size_seed_and_data_rules(
    tmp_path: Path, checkpoint: Make, halves: EvaluationData
) -> None:
    weights = checkpoint()
    first = evaluate(weights, "segmentation", halves, store=tmp_path)
    assert evaluate(weights, "segmentation", halves, store=tmp_path, image_size=16).cached  # the backbone's own size
    wide = evaluate(weights, "segmentation", halves, store=tmp_path, image_size=(16, 32))
    assert wide.details["patch_grid"] == [2, 4]
    seeded = evaluate(weights, "segmentation", halves, store=tmp_path, seed=1)
    description = json.loads((halves.root / "dataset.json").read_text())
    (halves.root / "dataset.json").write_text(json.dumps({**description, "classes": ["ground", "square", "other"]}))
    third_class = evaluate(weights, "segmentation", halves, store=tmp_path)
    results = (first, wide, seeded, third_class)
    assert len({result.key for result in results}) == 4 and not any(result.cached for result in results)


def test_evaluate__two_at_once_compute_once(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, forwards: list[int]
) -> None:
    weights = checkpoint()
    results: list[EvaluationResult] = []
    threads = [
        threading.Thread(target=lambda: results.append(evaluate(weights, "knn", colours, store=tmp_path)))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(result.cached for result in results) == [False, True]
    assert results[0].metrics == results[1].metrics
    assert sum(forwards) == 83


def test_evaluate__corrupt_features_are_extracted_again(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, forwards: list[int]
) -> None:
    weights = checkpoint()
    linear = evaluate(weights, "linear", colours, store=tmp_path)
    (array,) = tmp_path.glob("features/*/train.cls.npy")
    content = array.read_bytes()
    array.write_bytes(content[:-4] + b"\0\0\x80\x7f")  # the last number becomes infinite
    forwards.clear()
    evaluate(weights, "knn", colours, store=tmp_path)
    assert sum(forwards) == 83
    assert evaluate(weights, "linear", colours, store=tmp_path, force=True).metrics == linear.metrics


@pytest.mark.parametrize("step", [0, 17, 29])
def test_evaluate__a_probe_that_was_interrupted_ends_as_if_it_had_not_been(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, forwards: list[int], step: int
) -> None:
    """T4, T7: its features are there, and it begins anew, with the same batches and learning rates."""
    weights = checkpoint()
    whole = evaluate(weights, "linear", colours, store=tmp_path / "whole")

    def until(*arguments: Any) -> Iterator[torch.Tensor]:
        yield from batch_rows(*arguments)[:step]
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("evaluation.protocols.linear.score.batch_rows", until)
        with pytest.raises(KeyboardInterrupt):
            evaluate(weights, "linear", colours, store=tmp_path / "runs")
    forwards.clear()
    again = evaluate(weights, "linear", colours, store=tmp_path / "runs")
    assert forwards == [] and again.metrics == whole.metrics
    chosen = ("lr", "val_top1_by_lr", "test_top1_by_lr")
    assert [again.details[name] for name in chosen] == [whole.details[name] for name in chosen]


def test_evaluate__force_computes_again_on_the_same_features(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, forwards: list[int]
) -> None:
    weights = checkpoint()
    first = evaluate(weights, "linear", colours, store=tmp_path)
    forwards.clear()
    second = evaluate(weights, "linear", colours, store=tmp_path, force=True)
    assert forwards == [] and not second.cached and second.metrics == first.metrics


def test_evaluate__weights_with_nan_fail_clearly_and_leave_nothing(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, halves: EvaluationData
) -> None:
    weights = checkpoint(edit=lambda tensors: tensors["norm.weight"].fill_(float("nan")))
    for protocol, data in (("linear", colours), ("segmentation", halves)):
        with pytest.raises(EvaluationError, match=r"features are not finite .* first 'train0000'"):
            evaluate(weights, protocol, data, store=tmp_path)
    left = [path for path in tmp_path.glob("*/*") if path.parent.name in ("features", "evaluations")]
    assert [path.name for path in left if not path.name.startswith(".")] == []


def test_evaluate__a_backbone_without_cls_uses_its_patches(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData
) -> None:
    weights = checkpoint(class_token=False)
    knn = evaluate(weights, "knn", colours, store=tmp_path)
    assert knn.details["top1_by_k"].keys() == {"joined", "patch_mean"} and "top1_cls" not in knn.metrics
    assert knn.metrics["top1"] > 0.9
    assert evaluate(weights, "linear", colours, store=tmp_path).metrics["top1"] > 0.9


def test_evaluate__registers_are_no_patches(tmp_path: Path, checkpoint: Make, halves: EvaluationData) -> None:
    assert evaluate(checkpoint(reg_tokens=4), "segmentation", halves, store=tmp_path).details["patch_grid"] == [2, 2]


def test_evaluate__registers_are_in_no_mean(tmp_path: Path, checkpoint: Make, colours: EvaluationData) -> None:
    """T12: the mean of patches is of the patches, whatever tokens stand before them."""
    weights = checkpoint(reg_tokens=4)
    evaluate(weights, "knn", colours, store=tmp_path)
    (taken,) = (tmp_path / "features").glob("*/test.patch_mean.npy")
    backbone: Any = load_backbone(weights).eval()
    sample = open_dataset(str(colours.root / "test-*.tar")).read(0)
    picture = torch.from_numpy(decode_image(sample["png"]).copy()).permute(2, 0, 1)[None]
    with torch.inference_mode():
        tokens = backbone.vit.forward_features(backbone.preprocess(picture))  # (1, 1 + 4 + 4, D)
    assert tokens.shape[1] == 9
    assert np.allclose(np.load(taken)[0], tokens[0, 5:].mean(dim=0), atol=1e-5)


def test_evaluate__classes_may_be_left_out_of_dataset_json(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData
) -> None:
    (colours.root / "dataset.json").unlink()
    assert evaluate(checkpoint(), "knn", colours, store=tmp_path).metrics["top1"] == 1.0


def test_evaluate__global_random_state_is_left_alone_by_heads(
    tmp_path: Path, checkpoint: Make, halves: EvaluationData
) -> None:
    weights = checkpoint()
    evaluate(weights, "segmentation", halves, store=tmp_path)
    before = torch.random.get_rng_state()
    evaluate(weights, "segmentation", halves, store=tmp_path, force=True)
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("protocol", "change", "message"),
    [
        ("knn", {"root": "nowhere"}, "evaluation data 'colours': no directory nowhere"),
        ("knn", {"remove": "test-000000.tar"}, r"evaluation data 'colours': no test-\*\.tar in "),
        ("segmentation", {}, r"no field seg\.png in every sample; every sample has cls, png"),
        ("knn", {"classes": ["red", "green"]}, r"sample 'train0002': class 2 is outside 0\.\.1"),
        ("knn", {"classes": "red"}, "`classes` in dataset.json must be a list of names"),
        ("knn", {"image_size": 20}, "image_size height 20 is not a multiple of the backbone's patch size 8"),
        ("knn", {"image_size": (16, 24)}, r"image_size \(16, 24\): protocol 'knn' takes square"),
    ],
)
def test_evaluate__wrong_requests_say_what_is_wrong(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, protocol: str, change: dict[str, Any], message: str
) -> None:
    data = colours
    if "root" in change:
        data = dataclasses.replace(colours, root=Path(change["root"]))
    if "remove" in change:
        (colours.root / change["remove"]).unlink()
    if "classes" in change:
        (colours.root / "dataset.json").write_text(json.dumps({"classes": change["classes"]}))
    with pytest.raises((EvaluationError, DataError), match=message):
        evaluate(checkpoint(), protocol, data, store=tmp_path, image_size=change.get("image_size"))


def test_evaluate__counts_test_samples_that_are_in_train(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, write_shards: Callable[..., None]
) -> None:
    train, test = (open_dataset(colours.root / f"{split}-000000.tar") for split in ("train", "test"))
    mixed = [*(test.read(n) for n in range(9)), *(train.read(n) for n in (3, 4, 5))]
    weights = checkpoint()
    assert evaluate(weights, "knn", colours, store=tmp_path).details["num_test_in_train"] == 0
    write_shards(colours.root, "test", [{name: sample[name] for name in ("png", "cls")} for sample in mixed])
    assert evaluate(weights, "knn", colours, store=tmp_path).details["num_test_in_train"] == 3


def test_evaluate__val_is_tested_on_where_there_is_no_test(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData
) -> None:
    weights = checkpoint()
    before = evaluate(weights, "knn", colours, store=tmp_path)
    (colours.root / "test-000000.tar").rename(colours.root / "val-000000.tar")
    assert evaluate(weights, "knn", colours, store=tmp_path).metrics == before.metrics


def test_evaluate__a_shard_that_was_changed_in_place_is_not_known(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData
) -> None:
    weights, shard = checkpoint(), colours.root / "test-000000.tar"
    Path(sidecar(str(shard))).write_bytes(scan_shard(shard).to_bytes())
    assert not evaluate(weights, "knn", colours, store=tmp_path).cached
    assert evaluate(weights, "knn", colours, store=tmp_path).cached
    content = bytearray(shard.read_bytes())
    content[600] ^= 1
    shard.write_bytes(content)
    later = shard.stat().st_mtime_ns + 10**9
    os.utime(shard, ns=(later, later))
    with pytest.raises(DataError, match="was changed after the index beside it was written"):
        evaluate(weights, "knn", colours, store=tmp_path)


def test_evaluate__labels_of_other_classes_are_refused_by_name(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, write_shards: Callable[..., None]
) -> None:
    """Test shards packed without green, so that their blue is class 1, put beside train shards."""
    sample = open_dataset(colours.root / "test-000000.tar").read(2)
    mixed = [{"png": sample["png"], "cls": b"1", "json": b'{"class_name": "blue"}'}]
    write_shards(colours.root, "test", mixed)
    with pytest.raises(EvaluationError, match=r"test0000.*class 1, but its class_name 'blue' is class 2"):
        evaluate(checkpoint(), "knn", colours, store=tmp_path)


def test_evaluate__dense_labels_need_classes(tmp_path: Path, checkpoint: Make, halves: EvaluationData) -> None:
    (halves.root / "dataset.json").unlink()
    with pytest.raises(EvaluationError, match=r"dataset\.json must list `classes` for dense labels"):
        evaluate(checkpoint(), "segmentation", halves, store=tmp_path)


def test_extract__images_are_squeezed_not_cropped(
    tmp_path: Path, checkpoint: Make, halves: EvaluationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = set()
    original = ViTBackbone.preprocess

    def seen(self: ViTBackbone, images: torch.Tensor) -> torch.Tensor:
        shapes.add(tuple(images.shape[1:]))
        assert images.float().amax() > 150  # the bright square is inside, wherever it was
        return original(self, images)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # threads keep the order
    monkeypatch.setattr(ViTBackbone, "preprocess", seen)
    evaluate(checkpoint(), "segmentation", halves, store=tmp_path, image_size=(8, 24), batch_size=1)
    assert shapes == {(3, 8, 24)}


@pytest.mark.parametrize("size", [8, 24, 40])
def test_evaluate__positions_follow_the_size_of_the_images(
    tmp_path: Path, checkpoint: Make, colours: EvaluationData, size: int
) -> None:
    """T13: a table of 2 x 2 positions becomes one of 1 x 1, 3 x 3 or 5 x 5, as timm resamples it."""
    weights = checkpoint()
    evaluate(weights, "knn", colours, store=tmp_path / "runs", image_size=size)
    (found,) = (tmp_path / "runs").glob("features/*/train.patch_mean.npy")
    tensors = dict(load_backbone(weights).weights())
    side = size // 8
    tensors["pos_embed"] = resample_abs_pos_embed(tensors["pos_embed"], [side, side], num_prefix_tokens=1)
    network = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, num_classes=0, **TINY)
    network.load_state_dict(tensors)
    pixels = decode_image(colours.open(PROTOCOLS["knn"]).train.read(0)["png"])
    batch = load_backbone(weights).preprocess(eval_view(pixels, size)[None])
    with torch.inference_mode():
        wanted = network.eval().forward_features(batch)[0, 1:].mean(dim=0)
    assert np.load(found)[0] == pytest.approx(wanted.numpy(), abs=1e-4)


def test_evaluate__demo_photos_and_chairs(tmp_path: Path, checkpoint: Make, demo_data: Path) -> None:
    """A random backbone on the real data of the package is above chance; 16 px photos keep it quick."""
    weights = checkpoint()
    grocery = EvaluationData("grocery", demo_data / "grocery")
    linear = evaluate(weights, "linear", grocery, store=tmp_path)
    knn = evaluate(weights, "knn", grocery, store=tmp_path)
    assert linear.metrics["top1_ci_low"] > 0.05 and knn.metrics["top1_ci_low"] > 0.05  # 20 balanced classes
    assert linear.details["selection"] == "5-fold"
    chair = evaluate(weights, "segmentation", EvaluationData("chair", demo_data / "chair"), store=tmp_path)
    assert chair.metrics["miou_position_prior"] > 0.45 and chair.details["num_test"] == 60


def test_evaluation_data__is_where_its_folder_is_and_whole(demo_data: Path, tmp_path: Path) -> None:
    """Never in another folder that its name matches as a pattern, and with every shard that is listed."""
    folder = tmp_path / "[2024] {chairs}"
    shutil.copytree(demo_data / "chair", folder)
    data = EvaluationData("chair", folder)
    assert (
        data.open(PROTOCOLS["segmentation"]).digest
        == EvaluationData("x", demo_data / "chair").open(PROTOCOLS["segmentation"]).digest
    )
    listed = sorted(folder.glob("train-*.tar"))
    assert len(listed) > 1
    listed[0].unlink()
    with pytest.raises(DataError, match=rf"1 of the {len(listed)} shards that .* lists are missing: {listed[0].name}"):
        data.open(PROTOCOLS["segmentation"])
    assert "lists are missing" in str(evaluation_data_problem(folder))
