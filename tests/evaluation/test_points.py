"""Point clouds as a backbone is given them in evaluation."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from backbones.features import Features
from data_pipelines.errors import DataError
from evaluation.extraction.forward import Pooled, pooled_batches
from evaluation.extraction.points import POINTS
from evaluation.extraction.recipe import feature_recipe
from evaluation.pooling import joined
from evaluation.protocol import EvaluationError
from evaluation.registry import PROTOCOLS
from evaluation.threads import Threads


def _recipe(num_points: int) -> dict[str, Any]:
    return feature_recipe(POINTS, PROTOCOLS["knn"], {"name": "x", "settings": {"num_points": num_points}}, None)


def _npy(values: npt.NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def _farthest(xyz: npt.NDArray[np.float64], num: int) -> list[int]:
    """Section by section what the text says: point 0, then always the farthest; never one at the center."""
    chosen = [0]
    while len(chosen) < num:
        distance = [
            -1.0 if np.sum(point**2) <= 1e-3 else min(np.sum((point - xyz[other]) ** 2) for other in chosen)
            for point in xyz
        ]
        chosen.append(int(np.argmax(distance)))
    return chosen


def test_prepare__is_the_unit_sphere_and_then_the_farthest_points() -> None:
    cloud = np.random.default_rng(0).normal(size=(60, 3)) * [3, 1, 0.2] + 5
    cloud[7] = cloud.mean(axis=0)  # comes to lie near the center
    prepared = POINTS.prepare(_npy(cloud), _recipe(20))
    centered = cloud - cloud.mean(axis=0)
    expected = centered / np.linalg.norm(centered, axis=1).max()
    chosen = _farthest(expected, 20)
    assert isinstance(prepared, torch.Tensor) and prepared.dtype == torch.float32
    np.testing.assert_allclose(prepared.numpy(), expected[chosen], atol=1e-5)


def test_prepare__half_precision_is_widened_first() -> None:
    cloud = np.random.default_rng(1).normal(size=(100, 3)).astype(np.float16)
    wide = POINTS.prepare(_npy(cloud.astype(np.float32)), _recipe(30))
    assert torch.equal(POINTS.prepare(_npy(cloud), _recipe(30)), wide)


def test_prepare__features_of_points_stay_as_they_are_and_with_them() -> None:
    cloud = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    prepared = POINTS.prepare(_npy(cloud), _recipe(40))
    assert sorted(map(tuple, prepared[:, 3:].tolist())) == sorted(map(tuple, cloud[:, 3:].tolist()))


@pytest.mark.parametrize(
    ("cloud", "message"),
    [
        (np.zeros((9, 3)), "the cloud has 9 points; the backbone takes 10"),
        (np.zeros((20, 2)), r"array of shape \(20, 2\) is no cloud"),
        (np.zeros(20), r"array of shape \(20,\) is no cloud"),
        (np.full((20, 3), np.nan), "positions that are not finite"),
        (np.full((20, 3), 2.0), "all 20 points of the cloud are at one place"),
    ],
)
def test_prepare__what_is_no_cloud_is_refused(cloud: npt.NDArray[Any], message: str) -> None:
    with pytest.raises((EvaluationError, DataError), match=message):
        POINTS.prepare(_npy(cloud), _recipe(10))


def test_recipe__says_the_pooling_and_refuses_a_size() -> None:
    assert _recipe(10)["pooling"] == ["max", "mean"]
    with pytest.raises(EvaluationError, match="image_size 32: is of images"):
        feature_recipe(POINTS, PROTOCOLS["knn"], {"name": "x", "settings": {}}, 32)
    with pytest.raises(EvaluationError, match="'segmentation' needs 'patches' features; backbone 'x' gives 'pooled'"):
        feature_recipe(POINTS, PROTOCOLS["segmentation"], {"name": "x", "settings": {}}, None)


class _Clouds:
    num_samples = 5

    def __init__(self) -> None:
        self.clouds = np.random.default_rng(3).normal(size=(5, 30, 3)).astype(np.float32)

    def read(self, sample_id: int, /) -> dict[str, Any]:
        return {"__key__": f"c{sample_id}", "points.npy": _npy(self.clouds[sample_id])}

    def where(self, sample_id: int, /) -> str:
        return f"c{sample_id}"

    def require_field(self, *candidates: str) -> str:
        return "points.npy"


class _Coordinates:
    """An encoder whose tokens are the points."""

    def tokens(self, batch: torch.Tensor) -> Features:
        return Features(batch, cls=None, registers=None, grid=None, coords=batch)


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_pooled_batches__maximum_and_mean_over_the_tokens(batch_size: int) -> None:
    clouds, encoder, recipe = _Clouds(), _Coordinates(), _recipe(30)
    settings: dict[str, Any] = {"batch_size": batch_size, "device": torch.device("cpu"), "threads": Threads(1)}
    batches = list(pooled_batches(clouds, encoder, POINTS, recipe, lambda idx, _: idx, **settings))  # type: ignore[arg-type]
    assert [note for _, _, notes in batches for note in notes] == list(range(5))
    found = {name: torch.cat([pooled[name] for _, pooled, _ in batches]) for name in ("patch_max", "patch_mean")}
    centered = clouds.clouds - clouds.clouds.mean(axis=1, keepdims=True)
    sphere = centered / np.linalg.norm(centered, axis=2).max(axis=1)[:, None, None]
    np.testing.assert_allclose(found["patch_max"].numpy(), sphere.max(axis=1), atol=1e-5)
    np.testing.assert_allclose(found["patch_mean"].numpy(), sphere.mean(axis=1), atol=1e-5)


def test_joined__is_maximum_then_mean() -> None:
    split = Pooled(cls=None, patch_mean=torch.zeros(4, 2), labels=torch.zeros(4), patch_max=torch.ones(4, 2))
    assert joined(split).tolist() == [[1, 1, 0, 0]] * 4
