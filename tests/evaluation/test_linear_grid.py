"""Grid of linear probes: learning rates, which features heads see, and what chooses the head."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluation.extraction.forward import Layer, Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear_grid.score import features, scaled, score
from evaluation.registry import PROTOCOLS

PARAMS = {**PROTOCOLS["linear_grid"].params, "min_steps": 60, "epochs": 1}


def _split(num_rows: int, seed: int, noise: float = 0.3) -> Pooled:
    """Four layers of which only the third from the end tells the class; width 8."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % 4

    def layer(signal: float) -> Layer:
        told = signal * F.pad(F.one_hot(labels, 4).float(), (0, 4))
        drawn = noise * torch.randn(2, num_rows, 8, generator=generator)
        return Layer(told + drawn[0], drawn[1])

    last, *inner = (layer(signal) for signal in (0, 0, 1, 0))
    return Pooled(last.cls, last.patch_mean, labels, inner=tuple(inner))


def _score(train: Pooled, test: Pooled, **params: Any) -> Any:
    settings = {"num_classes": 4, "params": {**PARAMS, **params}, "seed": 0, "device": torch.device("cpu")}
    return score(train, test, **settings)


def test_scaled__golden(golden: dict[str, Any]) -> None:
    block = golden["A_lr_scaling"]
    assert scaled(block["base"], block["batch"], block["world"]) == pytest.approx(block["scaled"])
    assert tuple(block["base"]) == PARAMS["base_lrs"][:13]


def test_features__are_those_of_dinov2() -> None:
    split = _split(6, 0)
    found = features(split)
    assert {name: x.shape[1] for name, x in found.items()} == {
        "1 layer": 8, "4 layers": 32, "1 layer + mean of patches": 16, "4 layers + mean of patches": 40,
    }  # fmt: skip
    assert split.cls is not None and split.inner[0].cls is not None
    assert torch.equal(found["4 layers"][:, :16], torch.cat((split.cls, split.inner[0].cls), dim=1))
    assert torch.equal(found["4 layers + mean of patches"][:, 32:], split.patch_mean)


def test_features__without_class_token_or_inner_layers() -> None:
    split = Pooled(None, torch.ones(3, 8), torch.zeros(3, dtype=torch.int64))
    assert list(features(split)) == ["1 layer"] and torch.equal(features(split)["1 layer"], split.patch_mean)
    assert list(features(dataclasses.replace(split, inner=(Layer(None, torch.zeros(3, 8)),)))) == [
        "1 layer",
        "2 layers",
    ]


def test_score__finds_the_layer_that_tells_the_class() -> None:
    outcome = _score(_split(120, 0), _split(80, 1))
    assert outcome.details["features"].startswith("4 layers") and outcome.metrics["top1"] > 0.9
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["linear_grid"].metrics}
    assert outcome.per_sample.double().mean() == pytest.approx(outcome.metrics["top1"])


def test_score__test_labels_choose_nothing() -> None:
    train, test = _split(120, 0, noise=0.8), _split(80, 1, noise=0.8)
    honest = _score(train, test)
    wrong = _score(train, dataclasses.replace(test, labels=test.labels.roll(1)))
    for name in ("features", "base_lr", "at_grid_edge", "val_top1_by_features"):
        assert wrong.details[name] == honest.details[name]
    assert wrong.metrics["val_top1"] == honest.metrics["val_top1"]
    assert wrong.metrics["top1"] < honest.metrics["top1"] <= honest.metrics["top1_best_on_test"]


def test_score__too_large_learning_rates_are_the_edge_of_the_grid() -> None:
    details = _score(_split(120, 0, 0.8), _split(80, 1, 0.8), base_lrs=(1e-1, 1e4, 1e5)).details
    assert (details["base_lr"], details["at_grid_edge"], details["selection"]) == (1e-1, True, "5-fold")


def test_score__one_training_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="linear_grid needs at least 2 training images, got 1"):
        _score(_split(1, 0), _split(8, 1))
