"""Ridge regression: golden classifiers in both forms, the choice of the penalty, degenerate features."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.ridge.score import ridge_path, score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = PROTOCOLS["ridge"].params


def _noisy(num_rows: int, noise: float, seed: int, num_classes: int = 4, scale: float = 1.0) -> Pooled:
    """One-hot labels buried in noise; width 12 of each token."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    signal = F.pad(F.one_hot(labels, num_classes).float(), (0, 12 - num_classes))
    return Pooled(
        cls=scale * (signal + noise * torch.randn(num_rows, 12, generator=generator)),
        patch_mean=scale * torch.randn(num_rows, 12, generator=generator),
        labels=labels,
    )


def _score(train: Pooled, test: Pooled, num_classes: int = 4, **params: Any) -> Any:
    return score(train, test, num_classes=num_classes, params={**PARAMS, **params}, seed=0, device=CPU)


def test_ridge_path__golden(golden: dict[str, Any], golden_splits: tuple[Pooled, Pooled]) -> None:
    train, test = golden_splits
    blocks = golden["A_ridge"]["by_alpha"]
    path = ridge_path(train.patch_mean, F.one_hot(train.labels, 4).double(), [float(alpha) for alpha in blocks])
    for cell, block in enumerate(blocks.values()):
        predicted = path.scores(test.patch_mean, cell).argmax(1)
        assert predicted.tolist() == block["pred"]
        assert float((predicted == test.labels).double().mean()) == pytest.approx(block["acc"], abs=1e-9)
        assert float(path.weight[cell].norm()) == pytest.approx(block["coef_norm"], abs=1e-8)
        assert path.bias[cell].tolist() == pytest.approx(block["intercept"], abs=1e-8)


@pytest.mark.parametrize("num_rows", [5, 40])
def test_ridge_path__is_the_solution_of_its_equations(num_rows: int) -> None:
    """With fewer rows than features it takes the smaller matrix, which must change nothing."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, targets = drawn(num_rows, 12) + 3, drawn(num_rows, 2)
    path = ridge_path(x, targets, [0.7])
    residual = path.scores(x, 0) - targets
    assert residual.sum(0).abs().max() < 1e-10  # of the bias
    assert (x.T @ residual + 0.7 * path.weight[0]).abs().max() < 1e-9  # of the weights


def test_ridge_path__the_order_of_the_training_images_decides_nothing() -> None:
    """T3, at one penalty; folds are drawn by place, so that they may choose a neighboring one."""
    train, test = _noisy(60, 0.8, 0), _noisy(40, 0.8, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    x, targets = train.patch_mean.double(), torch.eye(4, dtype=torch.float64)[train.labels]
    queries = test.patch_mean.double()
    found, permuted = (ridge_path(x[rows], targets[rows], [0.7]).scores(queries, 0) for rows in (slice(None), order))
    assert torch.allclose(found, permuted, rtol=1e-9, atol=1e-12)


def test_score__leaking_features_are_perfect() -> None:
    outcome = _score(_noisy(80, 0.01, 0), _noisy(80, 0.01, 1))
    assert outcome.metrics["top1"] == outcome.metrics["val_top1"] == outcome.metrics["top1_raw"] == 1.0
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["ridge"].metrics}


def test_score__penalties_follow_the_scale_of_the_features() -> None:
    train, test = _noisy(120, 0.6, 0), _noisy(90, 0.6, 1)
    large = _score(_noisy(120, 0.6, 0, scale=1024), _noisy(90, 0.6, 1, scale=1024))
    assert large.metrics["top1_raw"] == _score(train, test).metrics["top1_raw"] > 0.5


def test_score__constant_features_give_the_majority_class() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2] * 10)
    split = Pooled(cls=torch.full((50, 3), 7.0), patch_mean=torch.zeros(50, 3), labels=labels)
    outcome = _score(split, split, num_classes=3)
    assert outcome.metrics["top1"] == outcome.metrics["top1_raw"] == outcome.details["majority_top1"] == 0.6


def test_score__test_labels_choose_nothing() -> None:
    train, test = _noisy(120, 0.8, 0), _noisy(90, 0.8, 1)
    honest = _score(train, test)
    wrong = _score(train, dataclasses.replace(test, labels=test.labels.roll(1)))
    for name in ("penalty", "penalty_raw", "val_top1_by_penalty"):
        assert wrong.details[name] == honest.details[name]
    assert honest.per_sample.double().mean() == pytest.approx(honest.metrics["top1"])
    assert wrong.metrics["top1"] < honest.metrics["top1"] - 0.1


def test_score__says_when_the_grid_ends_too_early() -> None:
    train, test = _noisy(60, 2.0, 0), _noisy(60, 2.0, 1)
    assert _score(train, test, penalties=(1e-9, 1.0)).details["at_grid_edge"] is True
    assert _score(train, test).details["selection"] == "5-fold"
    assert _score(train, test, holdout_from=60).details["selection"] == "held-out 12 of 60"


def test_score__one_training_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        _score(_noisy(1, 0, 0), _noisy(4, 0, 0))
