"""Linear probe: golden head, selection that never sees the test, degenerate features."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from evaluation.extraction.images import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear.score import fit_heads, score
from evaluation.registry import PROTOCOLS
from evaluation.selection import NEVER_HELD_OUT

CPU = torch.device("cpu")
PARAMS = PROTOCOLS["linear"].params


def _noisy(num_rows: int, noise: float, seed: int, num_classes: int = 4) -> Pooled:
    """One-hot labels buried in noise; width 12."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num_rows) % num_classes
    signal = F.pad(F.one_hot(labels, num_classes).float(), (0, 12 - num_classes))
    return Pooled(
        cls=signal + noise * torch.randn(num_rows, 12, generator=generator),
        patch_mean=torch.randn(num_rows, 12, generator=generator),
        labels=labels,
    )


def test_fit_heads__golden(golden: dict[str, Any], golden_splits: tuple[Pooled, Pooled]) -> None:
    train, test = golden_splits
    heads = fit_heads(
        train.patch_mean,
        train.labels,
        fold=torch.full((60,), NEVER_HELD_OUT),
        num_folds=1,
        lrs=(0.1,),
        momentum=0.9,
        steps=50,
        batch_size=60,
        num_classes=4,
        seed=0,
    )
    block = golden["A_sgd_head"]
    assert heads.losses[[0, 1, 9, 49], 1, 0].tolist() == pytest.approx(block["loss_step_0_1_9_49"], rel=1e-8)
    assert float(heads.weight[:, :, 1, 0].norm()) == pytest.approx(block["W_norm"], rel=1e-8)
    predicted = heads.logits(test.patch_mean, 1, 0).argmax(dim=1)
    assert float((predicted == test.labels).double().mean()) == block["test_acc"]


def test_fit_heads__heads_are_independent_and_ignore_their_fold() -> None:
    """A head trained beside others equals one trained alone without the rows of its fold."""
    split = _noisy(40, 0.5, seed=0)
    x, y = split.patch_mean.double(), split.labels
    fold = torch.arange(40) % 4
    fit = partial(fit_heads, momentum=0.9, steps=30, num_classes=4, seed=0)
    together = fit(x, y, fold=fold, num_folds=4, lrs=(0.01, 0.1), batch_size=40)
    rest = fold != 2
    alone = fit(
        x[rest],
        y[rest],
        fold=torch.full((30,), NEVER_HELD_OUT),
        num_folds=1,
        lrs=(0.1,),
        batch_size=30,
    )
    assert torch.allclose(together.weight[:, :, 2, 1], alone.weight[:, :, 1, 0], rtol=1e-9, atol=1e-12)
    assert torch.allclose(together.losses[:, 2, 1], alone.losses[:, 1, 0], rtol=1e-9)


def test_score__leaking_features_are_perfect() -> None:
    outcome = score(_noisy(80, 0.01, 0), _noisy(80, 0.01, 1), num_classes=4, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["top1"] == outcome.metrics["val_top1"] == 1.0
    assert outcome.metrics["top1_ci_high"] == pytest.approx(1.0)
    assert {*outcome.metrics, "top1_pixels", "top1_distances"} == {
        metric.name for metric in PROTOCOLS["linear"].metrics
    }


def test_score__constant_features_give_the_majority_class() -> None:
    labels = torch.tensor([0, 1, 1, 1, 2] * 10)
    split = Pooled(cls=torch.full((50, 3), 7.0), patch_mean=torch.zeros(50, 3), labels=labels)
    outcome = score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["top1"] == outcome.details["majority_top1"] == 0.6
    assert outcome.metrics["mean_class_top1"] == pytest.approx(1 / 3)


def test_score__test_labels_do_not_choose_the_head() -> None:
    train, test = _noisy(120, 0.8, 0), _noisy(90, 0.8, 1)
    honest = score(train, test, num_classes=4, params=PARAMS, seed=0, device=CPU)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(3))
    shuffled = score(
        train, dataclasses.replace(test, labels=test.labels[order]), num_classes=4, params=PARAMS, seed=0, device=CPU
    )
    assert shuffled.details["lr"] == honest.details["lr"]
    assert shuffled.details["val_top1_by_lr"] == honest.details["val_top1_by_lr"]
    assert shuffled.metrics["top1"] < honest.metrics["top1"] - 0.1
    assert honest.metrics["top1"] <= honest.metrics["top1_best_on_test"]


def test_score__large_sets_hold_out_one_part() -> None:
    params = {**PARAMS, "holdout_from": 100}
    outcome = score(_noisy(120, 0.5, 0), _noisy(40, 0.5, 1), num_classes=4, params=params, seed=0, device=CPU)
    assert outcome.details["selection"] == "held-out 24 of 120"
    assert outcome.metrics["top1"] > 0.5


def test_score__repeats_exactly_and_depends_on_the_seed_only() -> None:
    train, test = _noisy(300, 0.8, 0), _noisy(90, 0.8, 1)
    torch.manual_seed(1)
    first = score(train, test, num_classes=4, params=PARAMS, seed=0, device=CPU)
    torch.manual_seed(2)
    assert score(train, test, num_classes=4, params=PARAMS, seed=0, device=CPU) == first


def test_score__one_training_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        score(_noisy(1, 0, 0), _noisy(4, 0, 0), num_classes=4, params=PARAMS, seed=0, device=CPU)
