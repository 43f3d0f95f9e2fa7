"""Ridge regression on class indicators: a linear classifier without a single step of descent.

The first answer to what a checkpoint is worth, in seconds: one eigendecomposition gives the classifiers of all
penalties. It minimizes squared errors and not the cross-entropy of published linear probes, so that ranks may differ
from theirs. The penalty is chosen on training images only and relative to the features' own scale, and the reported
classifier was fitted to all training images.

Legend: n images, m queries, D width, C classes, P penalties, R = min(n, D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["Path", "relative_path", "ridge_path", "score"]


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Fits and tests the classifier in float64; see the module for what is chosen on what."""
    if len(train.labels) < 2:
        raise EvaluationError(f"ridge needs at least 2 training images, got {len(train.labels)}")
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    num_val = int((fold != NEVER_HELD_OUT).sum())
    penalties = params["penalties"]

    def chosen(x: Tensor, queries: Tensor) -> tuple[Tensor, int, bool, Tensor]:
        """Classes (m,), the cell of the penalty, whether the grid ends there, right answers (P,) of held-out rows."""
        x, queries = x.to(device).double(), queries.to(device).double()
        targets = F.one_hot(train.labels.to(device), num_classes).double()  # (n, C)
        hits, loss = torch.zeros(len(penalties), dtype=torch.int64), torch.zeros(len(penalties), dtype=torch.float64)
        for held_out in range(num_folds):
            is_val = (fold == held_out).to(device)
            path = relative_path(x[~is_val], targets[~is_val], penalties)
            for cell in range(len(penalties)):
                found = path.scores(x[is_val], cell)
                hits[cell] += (found.argmax(1) == targets[is_val].argmax(1)).sum().cpu()
                loss[cell] += (found - targets[is_val]).square().sum().cpu()
        cell, at_edge = choose_cell(hits, loss)
        path = relative_path(x, targets, penalties[cell : cell + 1])
        return path.scores(queries, 0).argmax(1).cpu(), cell, at_edge, hits

    predicted, cell, at_edge, hits = chosen(*standardised(joined(train), joined(test)))
    raw, raw_cell, raw_at_edge, _ = chosen(joined(train), joined(test))
    return Outcome(
        metrics={
            **top1_metrics(predicted, test.labels, num_classes),
            "val_top1": float(hits[cell]) / num_val,
            "top1_raw": float((raw == test.labels).double().mean()),
        },
        details={
            "penalty": penalties[cell],
            "at_grid_edge": at_edge,
            "penalty_raw": penalties[raw_cell],
            "at_grid_edge_raw": raw_at_edge,
            "val_top1_by_penalty": by_setting(penalties, hits, num_val),
            "selection": how_held_out(fold, num_folds),
            "majority_top1": float((test.labels == torch.bincount(train.labels).argmax()).double().mean()),
        },
        per_sample=predicted == test.labels,
    )


class Path(NamedTuple):
    """Linear maps for every penalty."""

    weight: Tensor  # (P, D, C)
    bias: Tensor  # (P, C)

    def scores(self, x: Tensor, cell: int) -> Tensor:
        """What rows (m, D) are predicted to have, (m, C)."""
        return x @ self.weight[cell] + self.bias[cell]


def ridge_path(x: Tensor, targets: Tensor, penalties: Sequence[float]) -> Path:
    """Minimizers of |x W + b - targets|^2 + penalty |W|^2; b is not penalized.

    Centering x and targets removes b. With X^T X = V diag(s) V^T, computed once, each penalty has
    W = V (s + penalty)^-1 V^T X^T Y. With fewer rows than features the same follows of the smaller
    X X^T = U diag(s) U^T: W = X^T U (s + penalty)^-1 U^T Y.

    Args:
        x: (n, D), targets: (n, C), both in float64.
    """
    x_mean, target_mean = x.mean(dim=0), targets.mean(dim=0)
    x, targets = x - x_mean, targets - target_mean
    if len(x) < x.shape[1]:
        values, vectors = torch.linalg.eigh(x @ x.T)
        basis, projected = x.T @ vectors, vectors.T @ targets  # (D, R), (R, C)
    else:
        values, vectors = torch.linalg.eigh(x.T @ x)
        basis, projected = vectors, vectors.T @ (x.T @ targets)
    denominators = values.clamp(min=0)[None] + values.new_tensor(penalties)[:, None]  # (P, R)
    # Without penalty a direction in which nothing varies gets no weight; constant features have no other.
    inverses = torch.where(denominators > 0, 1 / denominators, 0)
    weight = basis @ (inverses[:, :, None] * projected)  # (P, D, C)
    return Path(weight, target_mean - x_mean @ weight)


def relative_path(x: Tensor, targets: Tensor, penalties: Sequence[float]) -> Path:
    """`ridge_path` with penalties in units of the mean eigenvalue of X^T X, hence the same for any scale of `x`."""
    unit = float((x - x.mean(dim=0)).square().sum()) / x.shape[1]
    return ridge_path(x, targets, [penalty * unit for penalty in penalties])
