"""Raw pixels as a floor: once per data and protocol, by the same head, and only where there are pixels."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from evaluation import EvaluationData, evaluate
from evaluation import floor as pixel_floor
from evaluation.floor import floor_of
from evaluation.protocol import floors
from evaluation.registry import PROTOCOLS
from evaluation.results import ResultStore
from pretrain.evaluations import leaderboard


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many splits were turned into pixels."""
    splits: list[int] = []
    original = pixel_floor._split

    def counted(dataset, *arguments):  # type: ignore[no-untyped-def]
        splits.append(dataset.num_samples)
        return original(dataset, *arguments)

    monkeypatch.setattr(pixel_floor, "_split", counted)
    return splits


def test_floor__is_computed_once_for_all_backbones_and_stands_in_the_leaderboard(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path, decoded: list[int]
) -> None:
    store = tmp_path / "runs"
    results = [evaluate(checkpoint(seed), "knn", colours, store=store) for seed in (0, 1)]
    assert decoded == [60, 23]
    assert [result.metrics["top1_pixels"] for result in results] == [1.0, 1.0]  # the color of a picture is its class
    (floor,) = [result for result in ResultStore(store).all() if result.weights_digest == "pixels"]
    assert floor.details["num_test"] == 23 and ResultStore(store).per_sample(floor.key) is not None
    assert "raw pixels" in {place.run for place in leaderboard(store)}


def test_distances__neither_position_nor_order_of_points_counts_but_shape() -> None:
    rng = np.random.default_rng(0)
    ball = rng.normal(size=(300, 3))
    line = ball * [1, 0.01, 0.01]

    def described(cloud: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
        file = io.BytesIO()
        np.save(file, cloud)
        floor = floor_of(PROTOCOLS["svm"], "points")
        assert floor is not None
        return floor.describe(file.getvalue()).numpy()

    assert described(ball).shape == (128,) and described(ball).sum() == pytest.approx(2)
    turned = ball[::-1, [2, 0, 1]] * [1, -1, 1] * 4 + [3, 0, 0]
    np.testing.assert_allclose(described(turned), described(ball), atol=2e-3)  # distances that were on an edge
    assert np.abs(described(line) - described(ball)).sum() > 0.5


def test_floors__are_metrics_without_a_direction_behind_the_name_of_another() -> None:
    of = {name: floors(spec.headline, spec.metrics) for name, spec in PROTOCOLS.items()}
    assert of["knn"] == {"top1_pixels": "raw pixels", "top1_distances": "distances of points"}
    assert of["segmentation"] == of["patch_knn"] == {"miou_position_prior": "position prior"}
    assert of["voxel_segmentation"] == {"dice_position_prior": "position prior"}
    assert of["depth"] == {"rmse_position_prior": "position prior"}
    assert of["discovery"] == {"corloc_whole_image": "the whole image"}
    assert of["masked_reconstruction"] == {"psnr_constant": "best constant", "psnr_neighbors": "mean of neighbors"}
    iou = next(metric for metric in PROTOCOLS["prompt_patch"].metrics if metric.name == "iou")
    assert floors(iou, PROTOCOLS["prompt_patch"].metrics) == {}  # iou_pixels is a score of its own


def test_floor__is_left_out_of_large_data(
    checkpoint: Callable[..., Path],
    colours: EvaluationData,
    tmp_path: Path,
    decoded: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pixel_floor, "MOST_SAMPLES", 59)
    result = evaluate(checkpoint(), "knn", colours, store=tmp_path / "runs")
    assert "top1_pixels" not in result.metrics and not decoded
