"""Linear support vector machine on frozen features: how encoders of point clouds are compared since ModelNet40.

Features are those of `evaluation.pooling.joined`, of point clouds [maximum, mean] of the tokens, standardised by the
training samples. The classifier is scikit-learn's `LinearSVC` (one class against the rest, squared hinge loss). C is
chosen by cross-validation on training samples, of a large set on one held-out part, and the reported machine has been
fitted on all of them. Papers on point clouds differ in C and often do not name it (Point-M2AE takes 0.012, ReCon 0.075,
on features as they are); so C = 1 on these, the library's default, stands beside it under another name.

Legend: n samples, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["score", "svm_predictions"]

# Below so many rows per feature liblinear's dual solver is the quicker one; the primal one, which scikit-learn would
# take from one row per feature on, took minutes on 781 rows of 768 features at C = 1 where the dual took 5 s.
ROWS_PER_FEATURE = 10


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Fits and tests the machine on the CPU, whatever `device` is; see the module for what is chosen on what."""
    if len(train.labels.unique()) < 2:
        raise EvaluationError("svm needs training samples of at least 2 classes, and there is 1")
    x_train, x_test = standardised(joined(train), joined(test))
    cs = params["cs"]
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    num_val = int((fold != NEVER_HELD_OUT).sum())
    hits = torch.zeros(len(cs), dtype=torch.int64)
    for held_out in range(num_folds):
        is_val = fold == held_out
        rows, labels = x_train[~is_val], train.labels[~is_val]
        for cell, c in enumerate(cs):
            predicted = svm_predictions(rows, labels, x_train[is_val], c=c, seed=seed)
            hits[cell] += (predicted == train.labels[is_val]).sum()
    cell, at_edge = choose_cell(hits, torch.arange(len(cs)))  # of equal ones the smallest C, the widest margin
    predicted = svm_predictions(x_train, train.labels, x_test, c=cs[cell], seed=seed)
    as_they_are = svm_predictions(joined(train), train.labels, joined(test), c=1.0, seed=seed)
    return Outcome(
        metrics={
            **top1_metrics(predicted, test.labels, num_classes),
            "val_top1": float(hits[cell]) / num_val,
            "top1_c1": float((as_they_are == test.labels).double().mean()),
        },
        details={
            "C": cs[cell],
            "at_grid_edge": at_edge,
            "val_top1_by_C": by_setting(cs, hits, num_val),
            "selection": how_held_out(fold, num_folds),
        },
        per_sample=predicted == test.labels,
    )


def svm_predictions(x: Tensor, y: Tensor, queries: Tensor, *, c: float, seed: int) -> Tensor:
    """Classes (m,) int64 of `queries` (m, D) by a machine that was fitted on rows `x` (n, D) of classes `y` (n,)."""
    from sklearn.svm import LinearSVC  # here, since it takes a second to import, and cached scores need none

    machine = LinearSVC(C=c, dual=len(x) < ROWS_PER_FEATURE * x.shape[1], random_state=seed)
    with warnings.catch_warnings():
        # At large C the last digits of the margin take more rounds than liblinear allows; they move no prediction.
        warnings.filterwarnings("ignore", message="Liblinear failed to converge")
        warnings.filterwarnings("ignore", message="The number of unique classes")  # of one label per class
        machine.fit(_doubles(x), y.cpu().numpy())
    return torch.from_numpy(machine.predict(_doubles(queries)).astype(np.int64))


def _doubles(rows: Tensor) -> npt.NDArray[np.float64]:
    return rows.cpu().numpy().astype(np.float64)
