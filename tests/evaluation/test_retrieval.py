"""Retrieval by class: the golden average precision, planted neighbors, ties, classes with one image."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.retrieval.score import average_precision, score
from evaluation.registry import PROTOCOLS

SPEC = PROTOCOLS["retrieval"]


def _noisy(labels: torch.Tensor, noise: float, seed: int = 0) -> Pooled:
    generator = torch.Generator().manual_seed(seed)
    told = F.one_hot(labels).float()
    rows = told + noise * torch.randn(told.shape, generator=generator)
    return Pooled(torch.randn(len(labels), 4, generator=generator), rows, labels)


def _score(test: Pooled, train: Pooled | None = None, seed: int = 0) -> Any:
    settings = {"num_classes": 12, "params": SPEC.params, "seed": seed, "device": torch.device("cpu")}
    return score(test if train is None else train, test, **settings)


@pytest.mark.parametrize(
    ("difficulty", "wanted", "junk"),
    [("E", ["easy"], ["junk", "hard"]), ("M", ["easy", "hard"], ["junk"]), ("H", ["hard"], ["junk", "easy"])],
)
def test_average_precision__golden(golden: dict[str, Any], difficulty: str, wanted: list[str], junk: list[str]) -> None:
    block = golden["H_retrieval"]
    for ranks, truth, expected in zip(
        block["ranks_by_query"], block["gnd"], block["result"][difficulty]["ap"], strict=True
    ):
        ignored = {image for kind in junk for image in truth[kind]}
        relevant = {image for kind in wanted for image in truth[kind]}
        is_relevant = [image in relevant for image in ranks if image not in ignored]
        assert float(average_precision(torch.tensor([is_relevant]))) == pytest.approx(expected, abs=1e-9)


def test_score__images_of_a_class_find_each_other() -> None:
    outcome = _score(dataclasses.replace(_noisy(torch.arange(40) % 8, 0.01), cls=None))
    assert outcome.metrics["map_trapz"] == outcome.metrics["recall_1"] == 1.0
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics} - {"map_trapz_cls"}


def test_score__is_of_each_image_in_its_place() -> None:
    """Half of the images are as their class, the others are noise."""
    test = _noisy(torch.arange(60) % 3, 0.01)
    test.patch_mean[30:] = torch.randn(30, 3, generator=torch.Generator().manual_seed(1))
    outcome = _score(dataclasses.replace(test, cls=None))
    assert outcome.per_sample[:30].min() > outcome.per_sample[30:].mean() + 0.1
    assert outcome.metrics["map_trapz"] == pytest.approx(float(outcome.per_sample.mean()))
    assert outcome.metrics["map_trapz_ci_low"] < outcome.metrics["map_trapz"] < outcome.metrics["map_trapz_ci_high"]
    assert outcome.metrics["recall_1"] < outcome.metrics["recall_5"] <= outcome.metrics["recall_10"]


def test_score__equal_features_are_ranked_by_chance_and_not_by_their_order() -> None:
    test = _noisy(torch.arange(400) // 40, 0.0)
    same = dataclasses.replace(test, cls=None, patch_mean=torch.ones(400, 12))
    outcome = _score(same)
    assert outcome.details["chance"] == pytest.approx(39 / 399)
    assert outcome.metrics["map_trapz"] == pytest.approx(0.11, abs=0.02)


def test_score__labels_of_train_are_not_read_and_those_of_test_choose_nothing() -> None:
    test = _noisy(torch.arange(60) % 3, 0.5)
    train = dataclasses.replace(_noisy(torch.arange(60) % 3, 0.5, 1), labels=torch.zeros(60, dtype=torch.int64))
    honest = _score(test, train)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    wrong = _score(dataclasses.replace(test, labels=test.labels[order]), train)
    assert wrong.metrics["map_trapz"] == pytest.approx(wrong.details["chance"], abs=0.08)
    assert wrong.metrics["map_trapz"] < honest.metrics["map_trapz"] - 0.1


def test_score__an_image_alone_in_its_class_asks_nothing() -> None:
    test = _noisy(torch.tensor([0, 0, 0, 1, 2, 2]), 0.01)
    outcome = _score(dataclasses.replace(test, cls=None))
    assert outcome.details["num_scored"] == 5 and outcome.metrics["map_trapz"] == 1.0 and outcome.per_sample is None
    with pytest.raises(EvaluationError, match="retrieval needs a class with at least 2 test images"):
        _score(_noisy(torch.arange(4), 0.1))
