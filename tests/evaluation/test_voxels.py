"""Volumes as a backbone is given them in evaluation, and their labels laid down the same way."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from data_pipelines.errors import DataError
from evaluation.data import LabelMaps
from evaluation.extraction.recipe import Reads, feature_recipe
from evaluation.extraction.voxels import VOXELS
from evaluation.protocol import LABELS, EvaluationError
from evaluation.registry import PROTOCOLS

ARCHITECTURE = {"name": "x", "kind": "voxels", "settings": {"size": [6, 4, 5], "in_chans": 1}}


def _recipe(**settings: Any) -> dict[str, Any]:
    architecture = {**ARCHITECTURE, "settings": {**ARCHITECTURE["settings"], **settings}}  # type: ignore[dict-item]
    return feature_recipe(VOXELS, PROTOCOLS["knn"], architecture, None)


def _npz(**arrays: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


def _npy(values: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def test_prepare__short_axes_get_zeros_and_long_ones_keep_their_middle() -> None:
    volume = np.random.default_rng(0).integers(1, 255, (5, 9, 5), np.uint8)
    prepared = VOXELS.prepare(_npz(image=volume, label=volume, window=np.zeros(2)), _recipe())
    assert isinstance(prepared, dict) and prepared["size"].tolist() == [5, 4, 5]
    shown = prepared["volume"]
    assert shown.dtype == torch.uint8 and shown.shape == (1, 6, 4, 5)
    assert np.array_equal(shown[0, :5].numpy(), volume[:, 2:6])
    assert not shown[0, 5].any()


def test_prepare__channels_and_types() -> None:
    grid = np.random.default_rng(0).random((4, 6, 4, 5)).astype(np.float16)
    prepared = VOXELS.prepare(_npy(grid), _recipe(in_chans=4))
    assert isinstance(prepared, dict) and prepared["volume"].dtype == torch.float32
    assert np.array_equal(prepared["volume"].numpy(), grid.astype(np.float32))
    integers = VOXELS.prepare(_npy(np.ones((2, 2, 2), np.int16)), _recipe())
    assert isinstance(integers, dict) and integers["volume"].dtype == torch.float32


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (_npy(np.zeros((3, 3))), r"array of shape \(3, 3\) is no volume"),
        (_npy(np.zeros((2, 3, 3, 3))), "has 2 channels; the backbone takes 1"),
        (_npy(np.full((3, 3, 3), np.inf)), "values that are not finite"),
        (_npz(a=np.zeros((3, 3, 3)), b=np.zeros((3, 3, 3))), "npz has no array 'image', and several others: a, b; giv"),
    ],
)
def test_prepare__what_is_no_volume_is_refused(content: bytes, message: str) -> None:
    with pytest.raises((EvaluationError, DataError), match=message):
        VOXELS.prepare(content, _recipe())


def test_prepare__reads_the_array_that_the_backbone_was_trained_on() -> None:
    """Where that is not known, "image", or what is no label; arrays that are not read may hold anything."""
    ct, image = np.full((2, 6, 4, 5), [[[[3]]], [[[7]]]], np.uint8)
    trained = _recipe() | {"array": "ct"}

    def first(content: bytes, recipe: dict[str, Any]) -> int:
        return int(VOXELS.prepare(content, recipe)["volume"][0, 0, 0, 0])  # type: ignore[call-overload]

    assert feature_recipe(VOXELS, PROTOCOLS["knn"], ARCHITECTURE, None, Reads(array="ct")) == trained
    assert first(_npz(image=image, ct=ct, patient=np.array(["x"])), trained) == 3
    assert first(_npz(image=image, ct=ct), _recipe()) == 7
    assert first(_npz(label=image, ct=ct), _recipe()) == first(_npz(only=ct), trained) == first(_npy(ct), trained) == 3
    with pytest.raises(EvaluationError, match=r"no array 'ct', which the backbone was trained on, .* image, pet; give"):
        first(_npz(image=image, pet=ct), trained)
    labels = np.zeros((6, 4, 5), np.int64)
    assert VOXELS.lay is not None
    assert VOXELS.lay(labels, _npz(image=np.zeros((1, 1, 1)), ct=ct), trained).shape == (6, 4, 5)


def test_reading__the_field_that_the_backbone_was_trained_on_alone() -> None:
    assert VOXELS.reading(Reads(field="t1.npy")).inputs == ("t1.npy",)
    assert VOXELS.reading(Reads(array="ct")) is VOXELS


def test_recipe__refuses_a_size_and_maps_of_images() -> None:
    with pytest.raises(EvaluationError, match="image_size 32: is of images"):
        feature_recipe(VOXELS, PROTOCOLS["knn"], ARCHITECTURE, 32)
    with pytest.raises(EvaluationError, match="'segmentation' needs maps of 2 axes; backbone 'x' gives 3"):
        feature_recipe(VOXELS, PROTOCOLS["segmentation"], ARCHITECTURE, None)


class _Stored:
    """Stands in for a `Dataset`."""

    def __init__(self, **fields: bytes) -> None:
        self._fields, self.num_samples = fields, 1

    def read(self, sample_idx: int) -> dict[str, Any]:
        return {"__key__": "v7", **{name.replace("_", "."): content for name, content in self._fields.items()}}

    def where(self, sample_idx: int) -> str:
        return "shard, v7"


def _labels(ignore_index: int | None = None, **fields: bytes) -> npt.NDArray[np.int64]:
    stored: Any = _Stored(**fields)
    lay = VOXELS.lay
    assert lay is not None
    maps = LabelMaps(
        stored,
        num_classes=3,
        ignore_index=ignore_index,
        sequences={},
        label=LABELS["seg.npy"],
        lay=lambda labels, sample: lay(
            labels, next(sample[n] for n in ("volume.npy", "npz") if n in sample), _recipe()
        ),
    )
    return maps.read(0)[0]


def test_labels__lie_where_the_volume_does() -> None:
    rng = np.random.default_rng(0)
    volume, labels = rng.integers(1, 255, (5, 9, 5), np.uint8), rng.integers(0, 3, (5, 9, 5), np.uint8)
    expected = np.full((6, 4, 5), -1)
    expected[:5] = labels[:, 2:6]
    assert np.array_equal(_labels(npz=_npz(image=volume, label=labels)), expected)
    assert np.array_equal(_labels(volume_npy=_npy(volume), labels_npy=_npy(labels)), expected)
    assert np.array_equal(_labels(volume_npy=_npy(volume), seg_npy=_npy(labels)), expected)
    expected[expected == 2] = -1
    assert np.array_equal(_labels(2, npz=_npz(image=volume, label=labels)), expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "shard, v7, field npz: npz has no array 'label'; it has image, window"),
        (
            {"label": np.zeros((2, 2, 3), np.uint8)},
            r"sample 'v7': labels of shape \(2, 2, 3\) do not lie on the volume",
        ),
        ({"label": np.full((2, 2, 2), 3, np.uint8)}, "sample 'v7': label 3 in npz, but dataset.json lists 3 classes"),
        ({"label": np.full((2, 2, 2), -1, np.int8)}, "sample 'v7': label -1 in npz, but dataset.json lists 3 classes"),
        ({"label": np.zeros((2, 2, 2))}, r"labels are an array float64 \(2, 2, 2\); they must be whole numbers in 3"),
        ({"label": np.zeros((2, 2), np.uint8)}, r"labels are an array uint8 \(2, 2\); they must be whole numbers in 3"),
    ],
)
def test_labels__what_is_wrong_names_the_sample(arrays: dict[str, npt.NDArray[Any]], message: str) -> None:
    with pytest.raises((EvaluationError, DataError), match=message):
        _labels(npz=_npz(image=np.zeros((2, 2, 2), np.uint8), window=np.zeros(2), **arrays))
