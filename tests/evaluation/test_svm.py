"""Linear SVM: scikit-learn's own answer, the choice of C, and inputs that cannot be used."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.svm.score import score
from evaluation.registry import PROTOCOLS
from evaluation.selection import stratified_folds

CPU = torch.device("cpu")
PARAMS = PROTOCOLS["svm"].params


def _split(num_rows: int, seed: int, num_classes: int = 4, noise: float = 1.2) -> Pooled:
    """Features [max, mean] of which the first two columns tell the class, and the scales differ a hundredfold."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num_rows) % num_classes
    angle = 2 * np.pi * labels / num_classes
    rows = np.stack((np.cos(angle), np.sin(angle)), axis=1) + noise * 0.3 * rng.standard_normal((num_rows, 2))
    rest = rng.standard_normal((num_rows, 6)) * 50 + 7
    both = torch.from_numpy(np.concatenate((rows, rest), axis=1)).float()
    return Pooled(cls=None, patch_mean=both[:, 4:], labels=torch.from_numpy(labels), patch_max=both[:, :4])


def _score(train: Pooled, test: Pooled, num_classes: int = 4, **params: Any) -> Any:
    return score(train, test, num_classes=num_classes, params={**PARAMS, **params}, seed=0, device=CPU)


def _rows(split: Pooled) -> Any:
    assert split.patch_max is not None
    return torch.cat((split.patch_max, split.patch_mean), dim=1).double().numpy()


def test_score__is_what_scikit_learn_says() -> None:
    train, test = _split(120, 0), _split(80, 1)
    outcome = _score(train, test)
    c = outcome.details["C"]
    pipeline = make_pipeline(StandardScaler(), LinearSVC(C=c, dual=True, random_state=0, max_iter=100_000))
    expected = pipeline.fit(_rows(train), train.labels.numpy()).score(_rows(test), test.labels.numpy())
    assert outcome.metrics["top1"] == pytest.approx(expected, abs=1 / 80)
    plain = LinearSVC(random_state=0).fit(_rows(train), train.labels.numpy())
    assert outcome.metrics["top1_c1"] == pytest.approx(plain.score(_rows(test), test.labels.numpy()), abs=0.05)
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["svm"].metrics} - {"top1_distances"}
    assert outcome.metrics["top1_ci_low"] < outcome.metrics["top1"] < outcome.metrics["top1_ci_high"]


def test_score__c_is_chosen_by_folds_of_train() -> None:
    train = _split(120, 0)
    outcome = _score(train, _split(80, 1))
    fold = stratified_folds(train.labels, num_folds=3, seed=0).numpy()
    splits = [((fold != held_out).nonzero()[0], (fold == held_out).nonzero()[0]) for held_out in range(3)]
    rows = StandardScaler().fit_transform(_rows(train))
    for c, found in outcome.details["val_top1_by_C"].items():
        machine = LinearSVC(C=float(c), dual=True, random_state=0, max_iter=100_000)
        predicted = cross_val_predict(machine, rows, train.labels.numpy(), cv=splits)
        assert found == pytest.approx((predicted == train.labels.numpy()).mean(), abs=1.5 / 120)
    best = max(outcome.details["val_top1_by_C"].values())
    assert outcome.details["val_top1_by_C"][str(outcome.details["C"])] == best == outcome.metrics["val_top1"]
    assert outcome.details["selection"] == "3-fold"
    assert _score(train, _split(80, 1), holdout_from=100).details["selection"] == "held-out 40 of 120"


def test_score__test_labels_choose_nothing() -> None:
    train, test = _split(120, 0), _split(80, 1)
    shuffled = Pooled(None, test.patch_mean, test.labels.roll(1), test.patch_max)
    honest, wrong = _score(train, test), _score(train, shuffled)
    assert (honest.details["C"], honest.details["val_top1_by_C"]) == (
        wrong.details["C"],
        wrong.details["val_top1_by_C"],
    )
    assert wrong.metrics["top1"] < honest.metrics["top1"] - 0.4


def test_score__says_when_the_grid_ends_too_early() -> None:
    assert _score(_split(120, 0, noise=2.5), _split(80, 1), cs=(1e-9, 1e-8, 1e-7, 0.01)).details["at_grid_edge"] is True


def test_score__a_class_without_training_samples_is_never_right() -> None:
    train, test = _split(90, 0), _split(40, 1)
    kept = train.labels != 3
    assert train.patch_max is not None
    some = Pooled(None, train.patch_mean[kept], train.labels[kept], train.patch_max[kept])
    outcome = _score(some, test)
    assert outcome.metrics["top1"] <= 0.75


def test_score__one_class_is_refused() -> None:
    train = _split(10, 0, num_classes=1)
    with pytest.raises(EvaluationError, match="svm needs training samples of at least 2 classes, and there is 1"):
        _score(train, train, num_classes=1)
