"""Logistic regression: golden classifier by both solvers, the choice of C, classes that are missing."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.logreg import score as module
from evaluation.protocols.logreg.score import on_device, score, with_scikit_learn
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = {**PROTOCOLS["logreg"].params, "cs": (1e-4, 1e-2, 1.0)}
SOLVERS = [with_scikit_learn, on_device]


def _noisy(num_rows: int, noise: float, seed: int, num_classes: int = 4) -> Pooled:
    """One-hot labels buried in noise; width 12 of each token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    signal = F.pad(F.one_hot(labels, num_classes).float(), (0, 12 - num_classes))
    return Pooled(
        cls=signal + noise * torch.randn(num_rows, 12, generator=generator),
        patch_mean=torch.randn(num_rows, 12, generator=generator),
        labels=labels,
    )


def _score(train: Pooled, test: Pooled, num_classes: int = 4, **params: Any) -> Any:
    return score(train, test, num_classes=num_classes, params={**PARAMS, **params}, seed=0, device=CPU)


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers__golden(solver: Any, golden: dict[str, Any], golden_splits: tuple[Pooled, Pooled]) -> None:
    """At C = 1, also when it comes from another C."""
    train, test = golden_splits
    block = golden["A_logreg"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # arguments that scikit-learn will no longer take
        *_, found = solver(train.patch_mean, train.labels, [0.01, 1.0], tol=1e-12, max_iter=1000)
    logits = found.logits(test.patch_mean, 4)
    assert logits.argmax(1).tolist() == block["pred"]
    assert float((logits.argmax(1) == test.labels).double().mean()) == block["test_acc"]
    assert float(F.cross_entropy(logits, test.labels)) == pytest.approx(block["test_nll"], abs=1e-6)
    assert float(found.weight.norm()) == pytest.approx(block["coef_norm"], abs=1e-5)
    assert found.weight[0, :3].tolist() == pytest.approx(block["coef_0_0_3"], abs=1e-5)
    bias = found.bias - found.bias.mean()  # a constant added to all changes nothing
    assert bias.tolist() == pytest.approx(block["intercept"], abs=1e-5)


def test_solvers__agree_on_two_classes() -> None:
    split = _noisy(60, 0.8, 0, num_classes=2)
    x = split.patch_mean.double() + F.one_hot(split.labels, 12)
    found = [
        next(iter(solver(x, split.labels, [0.3], tol=1e-10, max_iter=500))).logits(x, 2).softmax(1)
        for solver in SOLVERS
    ]
    assert torch.allclose(*found, atol=1e-6)


def test_score__both_solvers_say_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = _noisy(160, 0.8, 0), _noisy(90, 0.8, 1)
    small = _score(train, test)
    monkeypatch.setattr(module, "LARGEST_FOR_SCIKIT_LEARN", 0)
    large = _score(train, test)
    assert large.metrics["top1"] == pytest.approx(small.metrics["top1"], abs=0.012)
    assert (large.details["C"], large.details["converged"]) == (small.details["C"], True)


def test_score__leaking_features_are_perfect() -> None:
    outcome = _score(_noisy(80, 0.01, 0), _noisy(80, 0.01, 1))
    assert outcome.metrics["top1"] == outcome.metrics["val_top1"] == 1.0
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["logreg"].metrics}


def test_score__constant_features_give_the_majority_class() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2] * 10)
    split = Pooled(cls=torch.full((50, 3), 7.0), patch_mean=torch.zeros(50, 3), labels=labels)
    assert _score(split, split, num_classes=3).metrics["top1"] == 0.6


def test_score__test_labels_choose_nothing() -> None:
    train, test = _noisy(120, 0.8, 0), _noisy(90, 0.8, 1)
    honest = _score(train, test)
    wrong = _score(train, dataclasses.replace(test, labels=test.labels.roll(1)))
    for name in ("C", "val_top1_by_C"):
        assert wrong.details[name] == honest.details[name]
    assert honest.per_sample.double().mean() == pytest.approx(honest.metrics["top1"])
    assert wrong.metrics["top1"] < honest.metrics["top1"] - 0.1


def test_score__says_when_the_grid_ends_too_early_and_descent_does() -> None:
    train, test = _noisy(120, 0.5, 0), _noisy(90, 0.5, 1)
    details = _score(train, test, cs=(1e-9, 1e-1), max_iter=2).details
    assert (details["at_grid_edge"], details["converged"], details["selection"]) == (True, False, "5-fold")
    assert _score(train, test, holdout_from=100).details["selection"] == "held-out 24 of 120"


@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers__a_class_without_training_images_is_never_predicted(solver: Any) -> None:
    train = _noisy(80, 0.1, 0)
    kept = train.labels != 1
    (found,) = solver(train.patch_mean[kept], train.labels[kept], [1.0], tol=1e-6, max_iter=100)
    logits = found.logits(train.patch_mean, 4)
    assert logits.isinf().all(0).tolist() == [False, True, False, False]
    assert set(logits.argmax(1).tolist()) == {0, 2, 3}


def test_score__one_class_is_refused() -> None:
    train = _noisy(10, 0.1, 0, num_classes=1)
    with pytest.raises(EvaluationError, match="logreg needs training images of at least 2 classes, and there is 1"):
        _score(train, train, num_classes=1)
