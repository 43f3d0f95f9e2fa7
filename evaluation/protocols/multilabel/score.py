"""Images that belong to several classes: one linear classifier per class, by ridge regression in closed form.

Each ranks the test images by how likely its class is in them; the score is the mean over classes of scikit-learn's
average precision. Classes that no test image has are left out. The penalty is the one whose classifiers rank held-out
training images best; the reported ones were fitted to all of them.

Legend: n images, C classes, P penalties.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, jackknife_interval
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.protocols.ridge.score import relative_path
from evaluation.selection import by_setting, choose_cell, hold_out, how_held_out, random_folds

__all__ = ["mean_average_precision", "score"]


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Fits and tests the classifiers in float64; see the module for what is chosen on what.

    Raises:
        EvaluationError: no training image, or no test image, has a class, or there is one training image only.
    """
    if len(train.labels) < 2:
        raise EvaluationError(f"multilabel needs at least 2 training images, got {len(train.labels)}")
    for split, name in ((train, "training"), (test, "test")):
        if not split.labels.any():
            raise EvaluationError(f"multilabel needs {name} images with a class in labels.json, and there is none")
    x, queries = (rows.to(device).double() for rows in standardised(joined(train), joined(test)))
    targets = train.labels.to(device).double()  # (n, C)
    fold = random_folds(len(targets), num_folds=params["folds"], seed=seed)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    penalties = params["penalties"]
    found, loss = torch.zeros(2, len(penalties), dtype=torch.float64)
    for held_out in range(num_folds):
        is_val = (fold == held_out).to(device)
        path = relative_path(x[~is_val], targets[~is_val], penalties)
        for cell in range(len(penalties)):
            scores = path.scores(x[is_val], cell)
            found[cell] += mean_average_precision(scores.cpu(), train.labels[is_val.cpu()]) / num_folds
            loss[cell] += (scores - targets[is_val]).square().sum().cpu()
    cell, at_edge = choose_cell(found, loss)
    scores = relative_path(x, targets, [penalties[cell]]).scores(queries, 0).cpu()
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    is_in = torch.zeros(min(params["blocks"], len(scores)), len(scores))  # (blocks, n)
    is_in[torch.arange(len(scores)) % len(is_in), order] = 1

    def of_kept(kept: Tensor) -> Tensor:
        """mAP of some of the test images, (..., n) 1 for those."""
        rows = kept.reshape(-1, len(scores)) > 0
        values = [mean_average_precision(scores[some], test.labels[some]) for some in rows]
        return torch.tensor(values, dtype=torch.float64).reshape(kept.shape[:-1])

    low, high = jackknife_interval(is_in, of_kept)
    return Outcome(
        metrics={
            "map": mean_average_precision(scores, test.labels),
            "map_ci_low": low,
            "map_ci_high": high,
            "val_map": float(found[cell]),
        },
        details={
            "penalty": penalties[cell],
            "at_grid_edge": at_edge,
            "val_map_by_penalty": by_setting(penalties, found),
            "selection": how_held_out(fold, num_folds),
            "classes_scored": int(test.labels.any(dim=0).sum()),
            "chance": float(test.labels.double().mean(dim=0)[test.labels.any(dim=0)].mean()),  # mAP of any constant
        },
    )


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Mean over the classes that occur of the average precision; 0 where none does.

    Args:
        scores: (n, C), higher for images that are more likely to have the class; truth: (n, C) bool.
    """
    from sklearn.metrics import average_precision_score  # here, since it takes a second to import

    occurring = truth.any(dim=0).nonzero().flatten().tolist()
    values = [float(average_precision_score(truth[:, one].numpy(), scores[:, one].numpy())) for one in occurring]
    return sum(values) / len(values) if values else 0.0
