"""Linear segmentation of volumes on frozen tokens: what an encoder knows of every voxel without further training.

Tokens after the final norm are whitened, one linear layer gives logits per token, and these are upsampled trilinearly
to the voxels that the backbone was given, see `evaluation.protocols.linear_maps`. Of an encoder in stages the tokens of
all stages are read, not only the last and coarsest ones. The loss is cross-entropy plus soft Dice, as is the custom for
volumes (nnU-Net, Isensee et al. 2021). Padding, ignored voxels, and voxels that were cut off
(`evaluation.extraction.voxels`) count in neither loss nor score. The learning rate is chosen by Dice on held-out
training volumes (whole sequences where the data names them, such as the volumes of a patient); the reported head is
refitted on all of them.

Class 0 is the ground, which fills most of a volume; Dice is the mean over the other classes, each from one confusion
matrix over all test volumes, as mIoU is over all classes. Beside it stands what a position prior, the per-voxel
majority over the training labels, gets without looking at any volume. The interval is over volumes.

Legend: n volumes, (X, Y, Z) voxels, C classes, G learning rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from evaluation.data import LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import (
    Outcome,
    confusion_matrix,
    dice_per_class,
    foreground_dice,
    iou_per_class,
    jackknife_interval,
    mean_iou,
    tallies,
)
from evaluation.protocol import EvaluationError
from evaluation.protocols.linear_maps import Fit, Whitener, draw_places, folds_of
from evaluation.selection import by_setting, choose_cell

__all__ = ["score"]


def score(
    train: Dense[LabelMaps],
    test: Dense[LabelMaps],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Trains and tests the head; see the module for what is chosen on what."""
    if len(train.labels) < 2:
        raise EvaluationError(f"voxel_segmentation needs at least 2 training volumes, got {len(train.labels)}")
    if num_classes < 2:
        raise EvaluationError("voxel_segmentation needs a class beside the ground, which is class 0 of dataset.json")
    voxels = draw_places(train.labels, num_classes, params["voxels_per_volume"], seed)
    prior, _ = voxels.majority.tested(test.labels)
    if not prior[:, 1:].any():  # rows are what is true
        raise EvaluationError("the test volumes have no labelled voxel but of the ground, class 0, where they are seen")
    fit = Fit(
        train.maps,
        voxels,
        [Whitener.of(tokens, device) for tokens in train.maps],
        num_classes,
        per_step=params["voxels_per_step"],
        params=params,
        judge=lambda confusion: float(foreground_dice(confusion)),
        seed=seed,
        device=device,
        with_dice=True,
    )
    fold, rule = folds_of(voxels.sequences, params, seed, noun="volumes")
    val_dice, val_loss = fit.cross_validate(fold)  # each (G,)
    cell, at_edge = choose_cell(val_dice, val_loss)
    lr = params["lrs"][cell]
    weight, bias = fit.heads(torch.arange(len(fold)), [lr])

    per_volume = []
    for sample_idx in range(len(test.labels)):
        labels, _ = test.labels.read(sample_idx)
        truth = torch.from_numpy(labels).flatten()
        maps = [tokens[sample_idx : sample_idx + 1] for tokens in test.maps]
        predicted = fit.predict(maps, weight, bias, labels.shape)[0].cpu()  # (X, Y, Z)
        per_volume.append(confusion_matrix(predicted.flatten(), truth, num_classes))
    counts = torch.stack(per_volume)  # (n, C, C)
    confusion = counts.sum(dim=0)
    low, high = jackknife_interval(counts, foreground_dice)
    return Outcome(
        metrics={
            "dice": float(foreground_dice(confusion)),
            "dice_ci_low": low,
            "dice_ci_high": high,
            "dice_per_volume": float(foreground_dice(counts).nanmean()),
            "miou": mean_iou(confusion),
            "val_dice": float(val_dice[cell]),
            "dice_position_prior": float(foreground_dice(prior.sum(dim=0))),
        },
        details={
            "lr": lr,
            "at_grid_edge": at_edge,
            "val_dice_by_lr": by_setting(params["lrs"], val_dice),
            "selection": rule,
            "dice_per_class": [None if value != value else value for value in dice_per_class(confusion).tolist()],
            "iou_per_class": [None if value != value else value for value in iou_per_class(confusion).tolist()],
            "patch_grids": [list(tokens.shape[1:-1]) for tokens in train.maps],
        },
        per_sample=tallies(counts),
    )
