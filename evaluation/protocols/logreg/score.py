"""Logistic regression on frozen features: the linear probe without a learning rate or an order of batches.

Cross-entropy with a penalty of the squared weights, minimized by L-BFGS until it no longer falls. Features are
standardised, so that encoders whose features differ in scale are given the same choice of penalties; the regression
of DINOv3 is on the CLS token as it is. C, the weight of the errors, is chosen on training images only, and the reported
classifier was fitted to all of them. It is scikit-learn's; of so many features that its float64 would be slow, the same
problem is solved in float32 on the device.

Legend: n images, m queries, D width, K classes that occur in training.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics, top_k_accuracy
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["Classifier", "on_device", "score", "with_scikit_learn"]

LARGEST_FOR_SCIKIT_LEARN = 10**8  # numbers in x: 0.8 GB in float64


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Fits and tests the classifier; see the module for what is chosen on what."""
    if len(train.labels.unique()) < 2:
        raise EvaluationError("logreg needs training images of at least 2 classes, and there is 1")
    x_train, x_test = standardised(joined(train), joined(test))
    cs, stop = params["cs"], {"tol": params["tol"], "max_iter": params["max_iter"]}
    if x_train.numel() <= LARGEST_FOR_SCIKIT_LEARN:
        fitted = with_scikit_learn
    else:
        fitted, x_train, x_test = on_device, x_train.to(device), x_test.to(device)
    y_train = train.labels.to(x_train.device)
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed).to(x_train.device)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    num_val = int((fold != NEVER_HELD_OUT).sum())
    hits, loss = torch.zeros(len(cs), dtype=torch.int64), torch.zeros(len(cs), dtype=torch.float64)
    for held_out in range(num_folds):
        is_val = fold == held_out
        for cell, classifier in enumerate(fitted(x_train[~is_val], y_train[~is_val], cs, **stop)):
            logits = classifier.logits(x_train[is_val], num_classes)
            hits[cell] += (logits.argmax(1) == y_train[is_val]).sum().cpu()
            loss[cell] += F.cross_entropy(logits, y_train[is_val], reduction="sum").cpu()
    cell, at_edge = choose_cell(hits, loss)
    (classifier,) = fitted(x_train, y_train, [cs[cell]], **stop)
    logits = classifier.logits(x_test, num_classes).cpu()
    predicted = logits.argmax(1)
    return Outcome(
        metrics={**top1_metrics(predicted, test.labels, num_classes), "val_top1": float(hits[cell]) / num_val},
        details={
            "C": cs[cell],
            "at_grid_edge": at_edge,
            "val_top1_by_C": by_setting(cs, hits, num_val),
            "selection": how_held_out(fold, num_folds),
            "converged": classifier.converged,
            **({"top5": top_k_accuracy(logits, test.labels, 5)} if num_classes > 5 else {}),
        },
        per_sample=predicted == test.labels,
    )


class Classifier(NamedTuple):
    """A linear classifier of the classes that it was fitted to."""

    classes: Tensor  # (K,) ascending
    weight: Tensor  # (K, D)
    bias: Tensor  # (K,)
    converged: bool  # before the last iteration that it was allowed

    def logits(self, x: Tensor, num_classes: int) -> Tensor:
        """Scores (m, num_classes) float64; -inf of classes that it was not fitted to."""
        found = x.new_full((len(x), num_classes), -torch.inf, dtype=torch.float64)
        found[:, self.classes] = (x.to(self.weight.dtype) @ self.weight.T + self.bias).double()
        return found


def with_scikit_learn(x: Tensor, y: Tensor, cs: Sequence[float], *, tol: float, max_iter: int) -> Iterator[Classifier]:
    """The classifier for each C, each found from the one before; `x` (n, D), `y` (n,)."""
    from sklearn.exceptions import ConvergenceWarning  # here, since it takes a second to import
    from sklearn.linear_model import LogisticRegression

    rows, labels = x.double().numpy(), y.numpy()
    regression = LogisticRegression(tol=tol, max_iter=max_iter, warm_start=True)
    for c in cs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # `converged` says so
            regression.set_params(C=c).fit(rows, labels)
        weight, bias = (torch.from_numpy(found.copy()) for found in (regression.coef_, regression.intercept_))
        if len(weight) == 1:  # of two classes it has the logit of the second against the first
            weight, bias = (torch.cat((torch.zeros_like(found), found)) for found in (weight, bias))
        converged = int(regression.n_iter_.max()) < max_iter
        yield Classifier(torch.from_numpy(regression.classes_), weight, bias, converged)


def on_device(x: Tensor, y: Tensor, cs: Sequence[float], *, tol: float, max_iter: int) -> Iterator[Classifier]:
    """The same, computed where `x` is and in its precision."""
    classes, y = y.unique(return_inverse=True)
    weight = x.new_zeros(len(classes), x.shape[1], requires_grad=True)
    bias = x.new_zeros(len(classes), requires_grad=True)
    # Of two classes scikit-learn penalizes the difference of their weights, whose square is twice the sum of squares.
    halves = 2 if len(classes) == 2 else 1
    for c in cs:
        descent = torch.optim.LBFGS(
            [weight, bias],
            max_iter=max_iter,
            max_eval=25 * max_iter,  # as many as its line searches may need
            tolerance_grad=tol,
            tolerance_change=tol / 1000,
            line_search_fn="strong_wolfe",
        )

        def loss(c: float = c, descent: torch.optim.LBFGS = descent) -> Tensor:
            descent.zero_grad()
            penalty = halves * weight.square().sum() / (2 * c * len(x))
            value = F.cross_entropy(x @ weight.T + bias, y) + penalty
            value.backward()
            return value

        descent.step(loss)
        converged = descent.state[weight]["n_iter"] < max_iter
        yield Classifier(classes, weight.detach().clone(), bias.detach().clone(), converged)
