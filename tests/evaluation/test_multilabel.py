"""Several classes per image: planted classes, what chooses the penalty, labels that cannot be read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.extraction.forward import Pooled
from evaluation.protocols.multilabel.score import mean_average_precision, score
from evaluation.registry import PROTOCOLS

SPEC = PROTOCOLS["multilabel"]


def _split(num_rows: int, seed: int, noise: float) -> Pooled:
    """Each of 3 classes in about a third of the images, told by a feature of its own."""
    rng = np.random.default_rng(seed)
    labels = rng.random((num_rows, 3)) < 0.35
    rows = np.concatenate((labels + noise * rng.standard_normal((num_rows, 3)), rng.standard_normal((num_rows, 5))), 1)
    return Pooled(None, torch.from_numpy(rows).float(), torch.from_numpy(labels))


def _score(train: Pooled, test: Pooled, **params: Any) -> Any:
    settings = {"num_classes": 3, "params": {**SPEC.params, **params}, "seed": 0, "device": torch.device("cpu")}
    return score(train, test, **settings)


def test_mean_average_precision__by_hand() -> None:
    truth = torch.tensor([[1, 0, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]).bool()
    scores = torch.tensor([[0.9, 1, 0.5], [0.8, 2, 0.5], [0.7, 3, 0.5], [0.1, 4, 0.5]])
    # Of the first class 1/1 and 2/3; the second does not occur; the third is ranked by a constant.
    assert mean_average_precision(scores, truth) == pytest.approx(((1 + 2 / 3) / 2 + 1 / 4) / 2)


def test_score__planted_classes_are_found() -> None:
    outcome = _score(_split(120, 0, 0.05), _split(80, 1, 0.05))
    assert outcome.metrics["map"] == pytest.approx(1, abs=1e-3)
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics}
    hard = _score(_split(120, 0, 0.8), _split(80, 1, 0.8)).metrics
    assert hard["map_ci_low"] < hard["map"] < hard["map_ci_high"] < 1


def test_score__test_labels_choose_nothing() -> None:
    train, test = _split(120, 0, 0.6), _split(80, 1, 0.6)
    honest, wrong = _score(train, test), _score(train, dataclasses.replace(test, labels=test.labels.roll(1, 0)))
    inverse = _score(train, dataclasses.replace(test, labels=~test.labels))
    for name in ("penalty", "at_grid_edge", "val_map_by_penalty", "selection"):
        assert wrong.details[name] == honest.details[name] == inverse.details[name]
    assert wrong.metrics["map"] == pytest.approx(wrong.details["chance"], abs=0.15) and honest.metrics["map"] > 0.7


def test_score__constant_features_are_chance() -> None:
    split = dataclasses.replace(_split(60, 0, 0), patch_mean=torch.ones(60, 4))
    outcome = _score(split, split)
    assert outcome.metrics["map"] == pytest.approx(outcome.details["chance"])


def test_score__no_class_anywhere_is_refused() -> None:
    split = _split(20, 0, 0)
    with pytest.raises(EvaluationError, match=r"multilabel needs test images with a class in labels\.json"):
        _score(split, dataclasses.replace(split, labels=torch.zeros(20, 3, dtype=torch.bool)))


def test_score__one_training_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="multilabel needs at least 2 training images, got 1"):
        _score(_split(1, 0, 0), _split(20, 0, 0))


@pytest.fixture
def mixed(
    tmp_path: Path, png: Callable[..., bytes], write_shards: Callable[..., None]
) -> Callable[[str], EvaluationData]:
    """`mixed(of_last)`: pictures in which each of three colors is or is not; `labels.json` of the last one."""

    def make(of_last: str) -> EvaluationData:
        rng = np.random.default_rng(0)
        root = tmp_path / "mixed"
        for split in ("train", "test"):
            samples = []
            for _ in range(40):
                present = np.flatnonzero(rng.random(3) < 0.4)
                picture = rng.integers(0, 60, (16, 16, 3), np.uint8)
                picture[:, :, present] += 180
                samples.append({"png": png(picture), "labels.json": json.dumps(present.tolist()).encode()})
            if split == "test" and of_last:
                samples[-1]["labels.json"] = of_last.encode()
            write_shards(root, split, samples)
        (root / "dataset.json").write_text(json.dumps({"classes": ["red", "green", "blue"]}))
        return EvaluationData("mixed", root)

    return make


def test_evaluate__reads_lists_of_classes(
    mixed: Callable[[str], EvaluationData], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    data, store = mixed(""), tmp_path / "runs"
    assert evaluate(checkpoint(), "multilabel", data, store=store).metrics["map"] > 0.95
    (data.root / "dataset.json").write_text("{}")
    with pytest.raises(EvaluationError, match=r"dataset\.json must list `classes` for labels\.json"):
        evaluate(checkpoint(), "multilabel", data, store=store)


@pytest.mark.parametrize("content", ["[0, 3]", "[1, 1]", "2", '["red"]', "[true]"])
def test_evaluate__other_lists_are_refused_by_sample(
    content: str, mixed: Callable[[str], EvaluationData], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(
        EvaluationError, match=r"'test0039': labels\.json .* must be a list of different classes 0\.\.2"
    ):
        evaluate(checkpoint(), "multilabel", mixed(content), store=tmp_path / "runs")
