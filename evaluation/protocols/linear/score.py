"""Linear probe on frozen, cached features: one softmax classifier per learning rate, all trained in one pass.

Features are [CLS, mean of patch tokens], standardised with the statistics of the training images. The learning rate is
chosen on training images only: by cross-validation on small sets (a single small split misleads), else on one held-out
part; the reported head has that learning rate and was trained on all training images. The best test accuracy over the
grid, which papers often report, is logged beside it under another name. Augmented probes and fine-tuning are not here.

Legend: n images, B batch, D width, C classes, K heads = (folds + 1) x learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics, top_k_accuracy
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["Heads", "batch_rows", "fit_heads", "score", "validated"]

NEGLIGIBLE = 1e-20  # probabilities below this become 0: denormal numbers slow matrix products tenfold


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Trains and tests the probe; see the module for what is chosen on what."""
    x_train, x_test = standardised(joined(train).to(device), joined(test).to(device))
    y_train, y_test = train.labels.to(device), test.labels.to(device)
    if len(train.labels) < 2:
        raise EvaluationError(f"linear needs at least 2 training images, got {len(train.labels)}")
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed).to(device)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    batch_size = min(params["batch_size"], len(fold))
    heads = fit_heads(
        x_train,
        y_train,
        fold=fold,
        num_folds=num_folds,
        lrs=params["lrs"],
        momentum=params["momentum"],
        steps=max(params["min_steps"], params["epochs"] * (len(fold) // batch_size)),
        batch_size=batch_size,
        num_classes=num_classes,
        seed=seed,
    )
    val_hits, val_loss = validated(heads, x_train, y_train, fold, num_folds)  # each (learning rates,)
    num_val = int((fold != NEVER_HELD_OUT).sum())
    cell, at_edge = choose_cell(val_hits, val_loss)
    logits = torch.stack([heads.logits(x_test, num_folds, g) for g in range(len(params["lrs"]))])  # (lrs, n, C)
    hits = (logits.argmax(dim=2) == y_test).sum(dim=1)  # (lrs,)
    predicted = logits[cell].argmax(dim=1)
    return Outcome(
        metrics={
            **top1_metrics(predicted, y_test, num_classes),
            "val_top1": float(val_hits[cell]) / num_val,
            "top1_best_on_test": float(hits.max()) / len(y_test),
        },
        details={
            "lr": params["lrs"][cell],
            "at_grid_edge": at_edge,
            "val_top1_by_lr": by_setting(params["lrs"], val_hits, num_val),
            "test_top1_by_lr": by_setting(params["lrs"], hits, len(y_test)),
            "selection": how_held_out(fold, num_folds),
            "majority_top1": float((y_test == torch.bincount(y_train).argmax()).double().mean()),
            **({"top5": top_k_accuracy(logits[cell], y_test, 5)} if num_classes > 5 else {}),
        },
        per_sample=predicted == y_test,
        shown={"predicted": predicted.int(), "labels": y_test.int()},
    )


@dataclass(frozen=True)
class Heads:
    """Linear classifiers for every (fold left out, learning rate); the last of the folds left nothing out."""

    weight: Tensor  # (D, C, folds + 1, lrs)
    bias: Tensor  # (C, folds + 1, lrs)
    losses: Tensor  # (steps, folds + 1, lrs): mean training loss before each step

    def logits(self, x: Tensor, fold: int, lr_idx: int) -> Tensor:
        """Scores (n, C) of one head."""
        return x @ self.weight[:, :, fold, lr_idx] + self.bias[:, fold, lr_idx]


def fit_heads(
    x: Tensor,
    y: Tensor,
    *,
    fold: Tensor,
    num_folds: int,
    lrs: Sequence[float],
    momentum: float,
    steps: int,
    batch_size: int,
    num_classes: int,
    seed: int,
) -> Heads:
    """Trains every head together: SGD with momentum, zero initialisation, cosine to zero.

    The heads share each matrix product and nothing else. A head that leaves fold f out gives rows of that fold no
    weight, which equals training without them. The gradient is written out: for mean cross-entropy it is
    x^T (softmax(x W + b) - onehot(y)) / B.

    Args:
        x: features (n, D).
        fold: (n,) the fold of each row; heads 0..num_folds-1 ignore rows of their own fold.
        batch_size: at most n; equal to n means full-batch descent in the given order.
    """
    rates = torch.tensor(lrs, dtype=x.dtype, device=x.device)
    left_out = torch.arange(num_folds + 1, device=x.device)  # the last one is nobody's fold
    shape = (num_classes, num_folds + 1, len(lrs))  # C before K: softmax over a long last axis vectorises
    parameters = torch.zeros(x.shape[1] + 1, math.prod(shape), dtype=x.dtype, device=x.device)  # weight rows, then bias
    velocity = torch.zeros_like(parameters)
    losses = torch.empty(steps, *shape[1:], dtype=x.dtype, device=x.device)
    for step, rows in enumerate(batch_rows(len(x), batch_size, steps, seed)):
        rows = rows.to(x.device)
        x_batch, y_batch = x.index_select(0, rows), y[rows]
        is_used = (fold[rows, None] != left_out).to(x.dtype)  # (B, folds + 1)
        share = (is_used / is_used.sum(dim=0).clamp(min=1))[:, :, None]  # (B, folds + 1, 1): mean over used rows
        logits = (x_batch @ parameters[:-1]).add_(parameters[-1]).unflatten(1, shape)  # (B, C, folds + 1, lrs)
        residual = logits.softmax(dim=1)
        of_row = torch.arange(len(rows), device=x.device)
        own = residual[of_row, y_batch]  # (B, folds + 1, lrs)
        losses[step] = -(own.clamp(min=NEGLIGIBLE).log() * share).sum(dim=0)
        torch.threshold_(residual, NEGLIGIBLE, 0)
        residual[of_row, y_batch] -= 1
        residual = residual.mul_(share[:, None]).flatten(1)  # (B, C * K)
        velocity.mul_(momentum)
        velocity[:-1] += x_batch.T @ residual
        velocity[-1] += residual.sum(dim=0)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        parameters.unflatten(1, shape).sub_(velocity.unflatten(1, shape) * (rates * decay))
    return Heads(weight=parameters[:-1].unflatten(1, shape), bias=parameters[-1].view(shape), losses=losses)


def batch_rows(num_rows: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    """Row indices of each step: epochs of fresh permutations, the short last batch of an epoch dropped."""
    if batch_size == num_rows:
        return [torch.arange(num_rows)] * steps
    generator = torch.Generator().manual_seed(seed)
    per_epoch = num_rows // batch_size
    rows: list[Tensor] = []
    while len(rows) < steps:
        order = torch.randperm(num_rows, generator=generator)[: per_epoch * batch_size]
        rows.extend(order.split(batch_size))
    return rows[:steps]


def validated(heads: Heads, x: Tensor, y: Tensor, fold: Tensor, num_folds: int) -> tuple[Tensor, Tensor]:
    """Number of right answers and summed loss per learning rate, each row judged by the heads that left it out."""
    num_rates = heads.bias.shape[-1]
    hits = torch.zeros(num_rates, dtype=torch.int64)
    loss = torch.zeros(num_rates, dtype=torch.float64)
    for f in range(num_folds):
        x_fold, y_fold = x[fold == f], y[fold == f]
        for g in range(num_rates):
            logits = heads.logits(x_fold, f, g)
            hits[g] += (logits.argmax(dim=1) == y_fold).sum().cpu()
            loss[g] += torch.nn.functional.cross_entropy(logits.double(), y_fold, reduction="sum").cpu()
    return hits, loss
