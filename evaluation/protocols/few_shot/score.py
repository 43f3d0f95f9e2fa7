"""Classification of frozen features from a few labels per class: a way x shot episode, drawn several times.

Each draw takes `way` classes (or all) and `shot` training samples of each, fits a linear SVM with C = 1 on these and
classifies all test samples of these classes. Draws with more labels contain those with fewer. There is nothing to
choose, so no labels are spent on it. Features are standardised by all training samples, of which no label is needed for
that. A class takes part where it has labels enough; an episode for which there are too few classes is left out.

Published few-shot numbers of point encoders come from fine-tuning on the same sort of episodes (5 or 10 ways, 10 or 20
shots, 10 draws), with 20 test samples of each class; these here leave the encoder frozen and cannot be compared.

Reported are the mean over the draws, their standard deviation (of the choice of labels), and of the headline the Wilson
interval of the mean (of the choice of test samples). The two spreads are different things and stay apart.

Legend: n samples, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, wilson_interval
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.protocols.svm.score import svm_predictions

__all__ = ["draws", "score"]

Ids = npt.NDArray[np.int64]


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Fits and tests on the CPU, whatever `device` is; `seed` decides the draws."""
    x_train, x_test = standardised(joined(train), joined(test))
    labels, truth = train.labels.numpy(), test.labels.numpy()
    metrics: dict[str, float] = {}
    ways: dict[str, int] = {}
    for name, way, shot in params["episodes"]:
        classes = _with_labels(labels, truth, shot)
        if len(classes) < (way or 2):
            continue
        ways[name] = way or len(classes)
        accuracy = []
        for rows, queries in draws(labels, truth, classes, way=way, shot=shot, num_draws=params["draws"], seed=seed):
            predicted = svm_predictions(x_train[rows], train.labels[rows], x_test[queries], c=params["c"], seed=seed)
            accuracy.append(float((predicted == test.labels[queries]).double().mean()))
        metrics |= {name: float(np.mean(accuracy)), f"{name}_std": float(np.std(accuracy, ddof=1))}
    headline = params["headline"]
    shot = next(shot for name, _, shot in params["episodes"] if name == headline)
    classes = _with_labels(labels, truth, shot)
    if headline not in metrics:
        raise EvaluationError(
            f"few_shot needs at least 2 classes with {shot} training samples and a test sample; there "
            f"{'is' if len(classes) == 1 else 'are'} {len(classes)}"
        )
    num_scored = int(np.isin(truth, classes).sum())
    low, high = wilson_interval(metrics[headline] * num_scored, num_scored)
    left_out = [name for name, _, _ in params["episodes"] if name not in ways]
    return Outcome(
        metrics={**metrics, f"{headline}_ci_low": low, f"{headline}_ci_high": high},
        details={"ways": ways, "draws": params["draws"], "left_out": left_out, "num_scored": num_scored},
    )


def draws(
    labels: Ids, truth: Ids, classes: Ids, *, way: int | None, shot: int, num_draws: int, seed: int
) -> Iterator[tuple[Ids, Ids]]:
    """Rows of `labels` to fit on and rows of `truth` to test on, once for each draw.

    Args:
        labels, truth: classes of the training and of the test samples.
        classes: those that may be drawn.
    """
    for draw in range(num_draws):
        rng = np.random.default_rng([seed, draw])
        order = rng.permutation(len(labels))  # first, so that fewer labels are a part of more
        chosen = classes if way is None else np.sort(rng.permutation(classes)[:way])
        rows = np.concatenate([order[labels[order] == one][:shot] for one in chosen])
        yield rows, np.isin(truth, chosen).nonzero()[0]


def _with_labels(labels: Ids, truth: Ids, shot: int) -> Ids:
    """Classes with at least `shot` training samples and one to test on, ascending."""
    classes, counts = np.unique(labels, return_counts=True)
    return classes[(counts >= shot) & np.isin(classes, truth)]
