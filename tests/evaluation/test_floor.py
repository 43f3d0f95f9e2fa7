"""Raw pixels as a floor: once per data and protocol, by the same head, and only where there are pixels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evaluation import EvaluationData, evaluate
from evaluation import floor as pixel_floor
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
