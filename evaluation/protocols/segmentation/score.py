"""Linear segmentation on frozen patch tokens, in the manner of DINOv2/DINOv3's linear head.

Patch tokens after the final norm are standardised per channel, one linear layer gives logits per patch, and these are
upsampled to the label map, see `evaluation.protocols.linear_maps`; shrinking the labels instead is another objective
and costs points. The learning rate is chosen on held-out training images (whole sequences where the data names them);
the reported head is refitted on all of them.

mIoU comes from one confusion matrix over the test set at label resolution. Beside it stands what a position prior, the
per-pixel majority over the training labels, gets without looking at any image. Decoders with training are not here.

Legend: n images, (h, w) patch grid, (H, W) label map, C classes, G learning rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from evaluation.data import LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import (
    Outcome,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    miou_metrics,
    tallies,
)
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import small
from evaluation.protocols.linear_maps import Fit, Standardiser, draw_places, folds_of
from evaluation.selection import blocks_named, blocks_of, by_setting, choose_cell, spread

__all__ = ["score"]

NUM_ASKED, MOST_PX = 4, 128  # test images whose maps are kept for a picture, and pixels of their longer side


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
        raise EvaluationError(f"segmentation needs at least 2 training images, got {len(train.labels)}")
    pixels = draw_places(train.labels, num_classes, params["pixels_per_image"], seed)
    prior, sequences = pixels.majority.tested(test.labels)
    if not prior.any():
        raise EvaluationError("no labelled pixel in the test images: every label is ignore_index")
    fit = Fit(
        train.maps,
        pixels,
        [Standardiser.of(tokens, device) for tokens in train.maps],
        num_classes,
        per_step=params["pixels_per_step"],
        params=params,
        judge=mean_iou,
        seed=seed,
        device=device,
    )
    fold, rule = folds_of(pixels.sequences, params, seed, noun="images")
    val_miou, val_loss = fit.cross_validate(fold)  # each (G,)
    cell, at_edge = choose_cell(val_miou, val_loss)
    lr = params["lrs"][cell]
    weight, bias = fit.heads(torch.arange(len(fold)), [lr])

    per_image = []
    asked = spread(len(test.labels), NUM_ASKED)
    truths, guesses = [], []  # of those that are asked for
    for sample_idx in range(len(test.labels)):
        labels, _ = test.labels.read(sample_idx)
        truth = torch.from_numpy(labels)
        maps = [tokens[sample_idx : sample_idx + 1] for tokens in test.maps]
        predicted = fit.predict(maps, weight, bias, labels.shape)[0].cpu()  # (H, W)
        per_image.append(confusion_matrix(predicted.flatten(), truth.flatten(), num_classes))
        if sample_idx in asked:
            truths.append(labels)
            guesses.append(predicted.numpy())
    counts = torch.stack(per_image)  # (n, C, C)
    confusion = counts.sum(dim=0)
    groups = blocks_of(sequences)
    return Outcome(
        metrics={
            **miou_metrics(counts, groups),
            "val_miou": float(val_miou[cell]),
            "miou_position_prior": mean_iou(prior.sum(dim=0)),
        },
        details={
            "lr": lr,
            "at_grid_edge": at_edge,
            "val_miou_by_lr": by_setting(params["lrs"], val_miou),
            "selection": rule,
            "iou_per_class": [value if math.isfinite(value) else None for value in iou_per_class(confusion).tolist()],
            "miou_by_sequence": {
                name: mean_iou(counts[torch.tensor([s == name for s in sequences])].sum(dim=0))
                for name in sorted({s for s in sequences if s is not None})
            },
            "patch_grid": list(train.patches.shape[1:3]),
            "interval_over": blocks_named(groups),
        },
        per_sample=tallies(counts),
        groups=groups,
        shown={"asked": torch.tensor(asked), "truth": small(truths, MOST_PX), "guess": small(guesses, MOST_PX)},
    )
