"""Few-shot episodes: what is drawn, the scores beside scikit-learn's, and data with too few labels."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.few_shot.score import draws, score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = PROTOCOLS["few_shot"].params


def _split(labels: Any, seed: int) -> Pooled:
    labels = np.asarray(labels)
    rows = np.random.default_rng(seed).standard_normal((len(labels), 8)) + 1.5 * np.eye(8)[labels % 8]
    return Pooled(None, torch.from_numpy(rows).float(), torch.from_numpy(labels))


def _score(train: Pooled, test: Pooled, num_classes: int, seed: int = 0) -> Any:
    return score(train, test, num_classes=num_classes, params=PARAMS, seed=seed, device=CPU)


def test_draws__are_seeded_balanced_and_nested() -> None:
    labels, truth = np.arange(60) % 6, np.arange(18) % 6
    settings: dict[str, Any] = {"num_draws": 4, "seed": 3}
    one = list(draws(labels, truth, np.arange(6), way=None, shot=1, **settings))
    five = list(draws(labels, truth, np.arange(6), way=None, shot=5, **settings))
    for (few, queries), (many, _) in zip(one, five, strict=True):
        assert set(few) <= set(many) and len(queries) == 18
        assert np.bincount(labels[few]).tolist() == [1] * 6 and np.bincount(labels[many]).tolist() == [5] * 6
    assert len({tuple(rows) for rows, _ in five}) == 4
    again = list(draws(labels, truth, np.arange(6), way=None, shot=5, **settings))
    assert all(np.array_equal(a, b) for (a, _), (b, _) in zip(five, again, strict=True))


def test_draws__of_some_classes_test_these_only() -> None:
    labels, truth = np.arange(60) % 6, np.arange(18) % 6
    ways = []
    for rows, queries in draws(labels, truth, np.arange(1, 6), way=3, shot=2, num_draws=8, seed=0):
        assert len(rows) == 6 and set(truth[queries]) == set(labels[rows]) and len(queries) == 9
        ways.append(tuple(sorted(set(labels[rows]))))
    assert len(set(ways)) > 1 and 0 not in np.concatenate(ways)


def test_score__is_the_mean_of_scikit_learns_scores() -> None:
    train, test = _split(np.arange(160) % 8, 0), _split(np.arange(80) % 8, 1)
    outcome = _score(train, test, 8)
    scaler = StandardScaler().fit(train.patch_mean.double().numpy())
    rows, queries = (scaler.transform(split.patch_mean.double().numpy()) for split in (train, test))
    labels, truth = train.labels.numpy(), test.labels.numpy()
    accuracy = []
    for draw in range(10):
        order = np.random.default_rng([0, draw]).permutation(160)
        chosen = np.concatenate([order[labels[order] == one][:5] for one in range(8)])
        machine = LinearSVC(C=1.0, dual=True, random_state=0, max_iter=100_000).fit(rows[chosen], labels[chosen])
        accuracy.append(machine.score(queries, truth))
    assert outcome.metrics["top1_5shot"] == pytest.approx(np.mean(accuracy), abs=0.01)
    assert outcome.metrics["top1_5shot_std"] == pytest.approx(np.std(accuracy, ddof=1), abs=0.01)
    assert outcome.metrics["top1_1shot"] < outcome.metrics["top1_5shot"] < outcome.metrics["top1_10shot"]
    assert outcome.metrics["top1_5way_10shot"] > outcome.metrics["top1_10shot"]  # fewer classes are easier
    assert outcome.details["left_out"] == ["top1_10way_10shot", "top1_10way_20shot"]
    assert outcome.details["ways"]["top1_5shot"] == 8
    assert set(outcome.metrics) < {metric.name for metric in PROTOCOLS["few_shot"].metrics}
    assert _score(train, test, 8, seed=1).metrics != outcome.metrics


def test_score__classes_with_too_few_labels_take_no_part() -> None:
    labels = [0] * 6 + [1] * 6 + [2] * 3 + [3] * 6
    outcome = _score(_split(labels, 0), _split([0, 1, 2, 0, 1, 2, 0], 1), 4)
    assert outcome.details["ways"] == {"top1_1shot": 3, "top1_5shot": 2}  # nothing to test class 3 with
    assert outcome.details["num_scored"] == 5  # of seven: the headline leaves class 2 out


def test_score__too_few_labels_are_refused() -> None:
    with pytest.raises(EvaluationError, match="2 classes with 5 training samples and a test sample; there is 1"):
        _score(_split([0] * 6 + [1] * 4, 0), _split([0, 1], 1), 2)
