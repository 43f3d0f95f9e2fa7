"""Random encoders of points and voxels evaluated on real data, and the numbers computed again from what is stored."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from backbones.io import load_backbone, save_backbone
from backbones.registry import create_backbone
from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import open_dataset
from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.protocols.voxel_segmentation import score as voxel_segmentation
from evaluation.registry import PROTOCOLS
from pretrain.embeddings.embed import embed
from pretrain.evaluations import evaluate as evaluate_by_hand
from pretrain.evaluations import leaderboard

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
POINTS: dict[str, Any] = {"num_points": 128, "num_groups": 16, "group_size": 8, "embed_dim": 24, "depth": 1}
VOXELS: dict[str, Any] = {"size": [48, 64, 48], "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}


@pytest.fixture(autouse=True)
def quick_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    quick = {"linear": {"min_steps": 30, "epochs": 1}, "few_shot": {"draws": 3}}
    quick["voxel_segmentation"] = {"min_steps": 40, "epochs": 1, "lrs": (0.3, 1.0), "folds": 2}
    for name, settings in quick.items():
        params = MappingProxyType({**PROTOCOLS[name].params, **settings})
        monkeypatch.setitem(PROTOCOLS, name, dataclasses.replace(PROTOCOLS[name], params=params))


@pytest.fixture(autouse=True)
def weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of weights serves as a checkpoint, which a run would have published with a manifest."""
    for place in ("pretrain.checkpoints.references.resolve", "pretrain.embeddings.embed.resolve"):
        monkeypatch.setattr(place, lambda reference, storage: Path(reference))


def _checkpoint(folder: Path, kind: str, name: str, **settings: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = create_backbone(name, kind=kind, **settings)
    folder.mkdir(parents=True, exist_ok=True)
    save_backbone(folder / "backbone.safetensors", encoder.weights(), encoder.spec)
    return folder


@pytest.fixture
def points(tmp_path: Path) -> Path:
    return _checkpoint(tmp_path / "points", "points", "point_transformer", **POINTS, num_heads=2, tokenizer_dim=16)


@pytest.fixture
def voxels(tmp_path: Path) -> Path:
    return _checkpoint(tmp_path / "voxels", "voxels", "voxel_vit", **VOXELS)


def _part_of(name: str, dest: Path, write_shards: Callable[..., None], **numbers: int) -> EvaluationData:
    """The first samples of each split of a real data set."""
    if not (REAL / name).is_dir():
        pytest.skip(f"no real data in {REAL / name}")
    for split, number in numbers.items():
        dataset = open_dataset(str(REAL / name / f"{split}-*.tar"))
        samples = [dataset.read(idx) for idx in range(number)]
        write_shards(dest, split, [{f: s[f] for f in s if f != "__key__"} for s in samples])
    description = json.loads((REAL / name / "dataset.json").read_text())
    (dest / "dataset.json").write_text(json.dumps({"classes": description["classes"]}))
    return EvaluationData(name, dest)


@pytest.fixture
def psb(tmp_path: Path, write_shards: Callable[..., None]) -> EvaluationData:
    return _part_of("points_psb", tmp_path / "psb", write_shards, train=240, test=120)


@pytest.fixture
def hippocampus(tmp_path: Path, write_shards: Callable[..., None]) -> EvaluationData:
    return _part_of("volumes_hippocampus", tmp_path / "hippocampus", write_shards, train=16, test=5)


def _stored(store: Path) -> dict[str, npt.NDArray[Any]]:
    (entry,) = (store / "features").glob("*/meta.json")
    return {file.stem: np.load(file) for file in entry.parent.glob("*.npy")}


def test_points__a_random_encoder_is_above_chance_in_all_that_suits(
    tmp_path: Path, points: Path, psb: EvaluationData
) -> None:
    results = evaluate_by_hand(points, data={"psb": psb.root}, storage=tmp_path / "runs")
    assert [result.protocol for result in results] == ["few_shot", "knn", "linear", "svm"]
    low = {result.protocol: result.metrics[f"{PROTOCOLS[result.protocol].headline.name}_ci_low"] for result in results}
    assert min(low.values()) > 1 / 23, low
    svm = results[-1]
    arrays = _stored(tmp_path / "runs")
    assert "train.cls" not in arrays
    rows, queries = (
        np.concatenate((arrays[f"{split}.patch_max"], arrays[f"{split}.patch_mean"]), axis=1).astype(np.float64)
        for split in ("train", "test")
    )
    scaler = StandardScaler().fit(rows)
    machine = LinearSVC(C=svm.details["C"], dual=True, random_state=0)
    machine.fit(scaler.transform(rows), arrays["train.labels"])
    expected = machine.score(scaler.transform(queries), arrays["test.labels"])
    assert svm.metrics["top1"] == pytest.approx(expected, abs=2 / 120)
    (place,) = [place for place in leaderboard(tmp_path / "runs") if place.protocol == "few_shot"]
    assert (
        place.metric.name == "top1_5shot" and place.interval and 100 < place.num_test <= 120
    )  # of classes with labels enough


def test_points__nearest_neighbors_see_maximum_and_mean(tmp_path: Path, points: Path, psb: EvaluationData) -> None:
    result = evaluate(points, "knn", psb, store=tmp_path)
    arrays = _stored(tmp_path)
    rows, queries = (
        np.concatenate((arrays[f"{split}.patch_max"], arrays[f"{split}.patch_mean"]), axis=1).astype(np.float64)
        for split in ("train", "test")
    )
    scaler = StandardScaler().fit(rows)
    rows, queries = (one / np.linalg.norm(one, axis=1, keepdims=True) for one in map(scaler.transform, (rows, queries)))
    similarity = queries @ rows.T
    votes = np.zeros((len(queries), 23))
    for query, nearest in enumerate(np.argsort(-similarity, axis=1)[:, :20]):
        np.add.at(votes[query], arrays["train.labels"][nearest], np.exp(similarity[query, nearest] / 0.07))
    expected = (votes.argmax(axis=1) == arrays["test.labels"]).mean()
    assert result.metrics["top1"] == pytest.approx(expected, abs=1 / 120)


def test_voxels__a_random_encoder_segments_above_chance(
    tmp_path: Path, voxels: Path, hippocampus: EvaluationData, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions: list[npt.NDArray[Any]] = []
    original = voxel_segmentation.confusion_matrix

    def counted(predicted: torch.Tensor, truth: torch.Tensor, num_classes: int) -> torch.Tensor:
        predictions.append(predicted.numpy().reshape(VOXELS["size"]))
        return original(predicted, truth, num_classes)

    monkeypatch.setattr(voxel_segmentation, "confusion_matrix", counted)
    (result,) = evaluate_by_hand(voxels, data={"hippocampus": hippocampus.root}, storage=tmp_path / "runs")
    assert result.protocol == "voxel_segmentation"  # there are no classes of volumes
    predicted, truth = [], []
    assert len(predictions) == result.details["num_test"]
    test = open_dataset(str(hippocampus.root / "test-*.tar"))
    for idx, volume in enumerate(predictions):
        label = np.load(io.BytesIO(test.read(idx)["npz"]))["label"]
        shown = tuple(map(slice, np.minimum(label.shape, VOXELS["size"])))
        starts = [max(0, have - want) // 2 for have, want in zip(label.shape, VOXELS["size"], strict=True)]
        seen = label[tuple(slice(start, start + want) for start, want in zip(starts, VOXELS["size"], strict=True))]
        predicted.append(volume[shown].ravel())
        truth.append(seen.ravel())
    expected = f1_score(np.concatenate(truth), np.concatenate(predicted), average=None, labels=[1, 2]).mean()
    assert result.metrics["dice"] == pytest.approx(expected, rel=1e-9)
    shares = np.bincount(np.concatenate(truth), minlength=3)[1:] / sum(map(len, truth))
    assert result.metrics["dice"] > 2 * (2 * shares / (shares + 1 / 3)).mean()  # of a guess among three classes
    assert result.details["patch_grids"] == [[6, 8, 6]] and "image_size" not in result.details


def test_voxels__of_stages_all_are_read(tmp_path: Path, hippocampus: EvaluationData) -> None:
    settings = {"size": [32, 48, 32], "in_chans": 1, "patch_size": 4, "embed_dim": 12, "depths": [1, 1, 1]}
    folder = _checkpoint(tmp_path / "swin", "voxels", "voxel_swin", **settings, num_heads=[1, 2, 4])
    result = evaluate(folder, "voxel_segmentation", hippocampus, store=tmp_path)
    assert result.details["patch_grids"] == [[8, 12, 8], [4, 6, 4], [2, 3, 2]]
    arrays = _stored(tmp_path)
    shapes = {name: array.shape[1:] for name, array in arrays.items() if name.startswith("test.") and array.ndim > 1}
    assert shapes == {
        "test.stage00": (8, 12, 8, 12),
        "test.stage01": (4, 6, 4, 24),
        "test.patches": (2, 3, 2, 48),
    }


def test_voxels__the_mean_is_of_tokens_with_data(
    tmp_path: Path, voxels: Path, write_shards: Callable[..., None]
) -> None:
    volume = np.random.default_rng(0).integers(0, 255, (20, 64, 48), np.uint8)  # two tokens and a half of six
    for split in ("train", "test"):
        write_shards(tmp_path / "short", split, [{"volume.npy": _npy(volume), "cls": label} for label in (b"0", b"1")])
    evaluate(voxels, "knn", EvaluationData("short", tmp_path / "short"), store=tmp_path)
    encoder = load_backbone(voxels)
    padded = torch.zeros(1, 1, 48, 64, 48, dtype=torch.uint8)
    padded[0, 0, :20] = torch.from_numpy(volume)
    with torch.no_grad():
        tokens = encoder.tokens(padded).tokens.unflatten(1, (6, 8, 6))
        found = encoder.tokens({"volume": padded, "size": torch.tensor([[20, 64, 48]])})
    mean = torch.from_numpy(_stored(tmp_path)["test.patch_mean"])[:1]
    torch.testing.assert_close(mean, tokens[:, :3].flatten(1, 3).mean(1))
    torch.testing.assert_close(found.pooled, mean)
    assert not torch.allclose(mean, tokens.flatten(1, 3).mean(1), atol=1e-3)


def test_voxels__pooled_features_serve_classification(
    tmp_path: Path, voxels: Path, write_shards: Callable[..., None]
) -> None:
    rng = np.random.default_rng(0)
    for split, number in (("train", 24), ("test", 12)):
        samples = []
        for idx in range(number):
            file = io.BytesIO()
            np.save(file, rng.integers(0, 60, (20, 18, 22), np.uint8) + np.uint8(90 * (idx % 2)))
            samples.append({"volume.npy": file.getvalue(), "cls": str(idx % 2).encode()})
        write_shards(tmp_path / "bright", split, samples)
    data = EvaluationData("bright", tmp_path / "bright")
    assert evaluate(voxels, "knn", data, store=tmp_path).metrics["top1"] == 1.0
    assert evaluate(voxels, "svm", data, store=tmp_path).metrics["top1"] == 1.0


def _npy(values: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (np.zeros((100, 3), np.float32), "the cloud has 100 points; the backbone takes 128"),
        (np.full((200, 3), np.nan, np.float32), "the cloud has positions that are not finite"),
    ],
)
def test_points__a_bad_cloud_is_one_line_that_names_it(
    tmp_path: Path, points: Path, write_shards: Callable[..., None], cloud: npt.NDArray[Any], message: str
) -> None:
    good = _npy(np.random.default_rng(0).random((200, 3)))
    for split in ("train", "test"):
        clouds = [good, good, _npy(cloud) if split == "test" else good]
        write_shards(tmp_path / "bad", split, [{"points.npy": one, "cls": b"0"} for one in clouds])
    with pytest.raises((DataError, EvaluationError), match=rf"test0002.*: {message}") as caught:
        evaluate(points, "knn", EvaluationData("bad", tmp_path / "bad"), store=tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, r"train0001.*npz has no array 'label'; it has image"),
        (np.zeros((4, 4, 5), np.uint8), r"'train0001': labels of shape \(4, 4, 5\) do not lie on the volume of shape"),
        (np.full((4, 4, 4), 7, np.uint8), r"'train0001': label 7 in npz, but dataset\.json lists 2 classes"),
    ],
)
def test_voxels__bad_labels_are_one_line_that_names_the_sample(
    tmp_path: Path, voxels: Path, write_shards: Callable[..., None], label: npt.NDArray[Any] | None, message: str
) -> None:
    def npz(**arrays: npt.NDArray[Any]) -> bytes:
        file = io.BytesIO()
        np.savez(file, **arrays)  # type: ignore[arg-type]
        return file.getvalue()

    image, root = np.ones((4, 4, 4), np.uint8), tmp_path / "bad"
    good = npz(image=image, label=image)
    bad = npz(image=image) if label is None else npz(image=image, label=label)
    write_shards(root, "train", [{"npz": good}, {"npz": bad}])
    write_shards(root, "test", [{"npz": good}])
    (root / "dataset.json").write_text(json.dumps({"classes": ["ground", "thing"]}))
    with pytest.raises((EvaluationError, DataError), match=message) as caught:
        evaluate(voxels, "voxel_segmentation", EvaluationData("bad", root), store=tmp_path)
    assert "\n" not in str(caught.value)


def test_points__a_protocol_of_maps_is_refused_before_anything_is_read(tmp_path: Path, points: Path) -> None:
    with pytest.raises(EvaluationError, match="'segmentation' needs 'patches' features; backbone 'point_transformer'"):
        evaluate(points, "segmentation", EvaluationData("nowhere", tmp_path / "nowhere"), store=tmp_path)


def test_by_hand__the_recipe_beside_a_checkpoint_says_which_array_of_an_npz(
    tmp_path: Path, write_shards: Callable[..., None]
) -> None:
    """Features of {image, ct} by a checkpoint trained on ct are those of what has ct alone; so are embeddings."""
    backbone = _checkpoint(tmp_path / "voxels", "voxels", "voxel_vit", **VOXELS | {"size": [16, 16, 16]})
    trained = shutil.copytree(backbone, tmp_path / "trained")
    (trained / "recipe.yaml").write_text("objective: {name: volume_mae, volume_array: ct}\n")
    for name, others in (("both", {"image": np.zeros((16, 16, 16))}), ("alone", {})):
        rng = np.random.default_rng(0)
        for split in ("train", "test"):
            scans = [{"ct": rng.random((16, 16, 16), np.float32)} for _ in range(12)]
            samples = [{"npz": _npz(**scan, **others), "cls": b"%d" % (idx % 2)} for idx, scan in enumerate(scans)]
            write_shards(tmp_path / name, split, samples)

    def features(checkpoint: Path, data: str) -> npt.NDArray[Any]:
        store = tmp_path / f"{checkpoint.name} {data}"
        evaluate_by_hand(checkpoint, ["knn"], {"x": tmp_path / data}, storage=store)
        return _stored(store)["test.patch_mean"]

    assert np.array_equal(features(trained, "both"), features(backbone, "alone"))
    assert np.ptp(features(backbone, "both"), axis=0).max() == 0
    store = tmp_path / "trained both"
    embedded = embed(trained, tmp_path / "both", tmp_path / "vectors", form="npy", storage=store)
    assert embedded.num_known == embedded.num_samples == 24
    (tmp_path / "voxels" / "recipe.yaml").write_text("objective: {name: volume_mae, volume_field: scan.npz}\n")
    with pytest.raises(DataError, match=r"no field scan\.npz"):
        features(backbone, "both")


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()
