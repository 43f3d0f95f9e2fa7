"""The grid of linear probes of DINOv2 and DINOv3, on features that are taken once.

Features are CLS tokens of the last layer or of the last four, side by side, with and without the mean of patches of the
last one, as they are: neither standardised nor of length 1. Each has a head for each learning rate. DINOv2 trains on
augmented crops and reports the best head on the split that it was found on; here crops are not augmented, so that
numbers are a little lower, and the head is chosen on training images alone. What papers report stands beside it as
`top1_best_on_test`.

Legend: n images, D width, G learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear.score import fit_heads, validated
from evaluation.selection import NEVER_HELD_OUT, by_setting, choose_cell, hold_out, how_held_out, stratified_folds

__all__ = ["features", "scaled", "score"]

SEVERAL = 4  # layers


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Trains and tests the heads; see the module for what is chosen on what."""
    if len(train.labels) < 2:
        raise EvaluationError(f"linear_grid needs at least 2 training images, got {len(train.labels)}")
    y_train, y_test = train.labels.to(device), test.labels.to(device)
    fold = stratified_folds(train.labels, num_folds=params["folds"], seed=seed).to(device)  # (n,)
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    num_val = int((fold != NEVER_HELD_OUT).sum())
    batch_size = min(params["batch_size"], len(fold))
    lrs = scaled(params["base_lrs"], batch_size)
    x_train, x_test = features(train), features(test)
    val_hits, val_loss, logits = {}, {}, {}
    for name, x in x_train.items():
        heads = fit_heads(
            x.to(device),
            y_train,
            fold=fold,
            num_folds=num_folds,
            lrs=lrs,
            momentum=params["momentum"],
            steps=max(params["min_steps"], params["epochs"] * (len(fold) // batch_size)),
            batch_size=batch_size,
            num_classes=num_classes,
            seed=seed,
        )
        val_hits[name], val_loss[name] = validated(heads, x.to(device), y_train, fold, num_folds)  # each (G,)
        logits[name] = [heads.logits(x_test[name].to(device), num_folds, idx) for idx in range(len(lrs))]
    cells = {name: choose_cell(val_hits[name], val_loss[name]) for name in x_train}
    best = min(cells, key=lambda name: (-int(val_hits[name][cells[name][0]]), float(val_loss[name][cells[name][0]])))
    cell, at_edge = cells[best]
    predicted = logits[best][cell].argmax(dim=1)
    hits = {name: [int((scores.argmax(dim=1) == y_test).sum()) for scores in logits[name]] for name in logits}
    return Outcome(
        metrics={
            **top1_metrics(predicted, y_test, num_classes),
            "val_top1": float(val_hits[best][cell]) / num_val,
            "top1_best_on_test": max(max(found) for found in hits.values()) / len(y_test),
        },
        details={
            "features": best,
            "base_lr": params["base_lrs"][cell],
            "at_grid_edge": at_edge,
            "val_top1_by_features": {
                name: by_setting(params["base_lrs"], found, num_val) for name, found in val_hits.items()
            },
            "selection": how_held_out(fold, num_folds),
        },
        per_sample=predicted == y_test,
    )


def features(split: Pooled) -> dict[str, Tensor]:
    """What heads are trained on, (n, D to 5 D) by name; without a CLS token, the means of patches of the layers."""
    layers = split.layers[:SEVERAL]
    mean = layers[0].patch_mean
    one = [layer.patch_mean if layer.cls is None else layer.cls for layer in layers]
    found = {"1 layer": one[0]}
    if len(layers) > 1:
        found[f"{len(layers)} layers"] = torch.cat(one, dim=1)
    if split.cls is not None:
        found |= {f"{name} + mean of patches": torch.cat((x, mean), dim=1) for name, x in found.items()}
    return found


def scaled(base_lrs: Sequence[float], batch_size: int, num_devices: int = 1) -> list[float]:
    """Learning rates for batches of this size on each of so many devices; `base_lrs` are those of 256 samples."""
    return [base * batch_size * num_devices / 256 for base in base_lrs]
