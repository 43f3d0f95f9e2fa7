"""Linear segmentation on frozen patch tokens, in the manner of DINOv2/DINOv3's linear head.

Patch tokens after the final norm are standardised per channel (a BatchNorm whose statistics are those of the whole
training set), one linear layer gives logits per patch, these are upsampled bilinearly (align_corners=False) to the size
of the label map, and cross-entropy is taken there; shrinking the labels instead is another objective and costs points.
The loss over all pixels is estimated without bias from pixels drawn at random, and upsampled logits are computed at
these only. One head per learning rate is trained in the same pass. The learning rate is chosen on held-out training
images (whole sequences where the data names them); the reported head is refitted on all of them.

mIoU comes from one confusion matrix over the test set at label resolution. Beside it stands what a position prior, the
per-pixel majority over the training labels, gets without looking at any image. Decoders with training are not here.

Legend: n images, B batch, (h, w) patch grid, (H, W) label map, D width, C classes, G learning rates, P pixels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import IGNORED, LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome, bootstrap_miou, confusion_matrix, iou_per_class, mean_iou, pixel_accuracy
from evaluation.protocol import EvaluationError
from evaluation.selection import by_setting, choose_cell, hold_out, random_folds, sequence_folds

__all__ = ["Standardiser", "logits_at_pixels", "score", "upsampled"]

EPS = 1e-5  # BatchNorm's


def score(
    train: Dense, test: Dense, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Trains and tests the head; see the module for what is chosen on what."""
    if len(train.labels) < 2:
        raise EvaluationError(f"segmentation needs at least 2 training images, got {len(train.labels)}")
    pixels = _draw_pixels(train.labels, num_classes, params["pixels_per_image"], seed)
    fit = _Fit(train.patches, pixels, Standardiser.of(train.patches, device), num_classes, params, seed, device)
    fold, rule = _folds(pixels.sequences, params, seed)
    val_miou, val_loss = fit.cross_validate(fold)  # each (G,)
    cell, at_edge = choose_cell(val_miou, val_loss)
    lr = params["lrs"][cell]
    weight, bias = fit.heads(torch.arange(len(fold)), [lr])

    per_image, prior_per_image, sequences = [], [], []
    for sample_idx in range(len(test.labels)):
        labels, sequence = test.labels.read(sample_idx)
        truth = torch.from_numpy(labels)
        logits = fit.logits(test.patches[sample_idx : sample_idx + 1], weight, bias)  # (1, C, h, w)
        predicted = upsampled(logits, labels.shape)[0].argmax(dim=0).cpu()  # (H, W)
        per_image.append(confusion_matrix(predicted.flatten(), truth.flatten(), num_classes))
        prior = _nearest(pixels.majority, labels.shape)
        prior_per_image.append(confusion_matrix(torch.from_numpy(prior).flatten(), truth.flatten(), num_classes))
        sequences.append(sequence)
    counts = torch.stack(per_image)  # (n, C, C)
    confusion = counts.sum(dim=0)
    low, high = bootstrap_miou(counts, seed=seed)
    return Outcome(
        metrics={
            "miou": mean_iou(confusion),
            "miou_ci_low": low,
            "miou_ci_high": high,
            "pixel_accuracy": pixel_accuracy(confusion),
            "val_miou": float(val_miou[cell]),
            "miou_position_prior": mean_iou(torch.stack(prior_per_image).sum(dim=0)),
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
        },
    )


@dataclass(frozen=True)
class Standardiser:
    """BatchNorm in evaluation mode, without gain and bias (the linear layer absorbs them)."""

    mean: Tensor  # (D,)
    var: Tensor  # (D,)

    @classmethod
    def of(cls, patches: npt.NDArray[np.float16], device: torch.device) -> Standardiser:
        """Exact statistics over all tokens of `patches` (n, h, w, D)."""
        total = torch.zeros(2, patches.shape[-1], dtype=torch.float64)
        for start in range(0, len(patches), 64):
            tokens = torch.from_numpy(np.array(patches[start : start + 64])).double().flatten(0, 2)  # (tokens, D)
            total += torch.stack((tokens.sum(dim=0), tokens.square().sum(dim=0)))
        mean, square = total / math.prod(patches.shape[:3])
        return cls(mean.float().to(device), (square - mean.square()).clamp(min=0).float().to(device))

    def __call__(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) * (self.var + EPS).rsqrt()


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, h, w) at label size: (B, C, H, W)."""
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def logits_at_pixels(logits: Tensor, points: Tensor) -> Tensor:
    """Values of the upsampled `logits` (B, C, h, w) at `points` only.

    Args:
        points: (B, P, 2) pixel centres as (x, y) in [-1, 1] over the label map, as `grid_sample` counts.

    Returns:
        (B, C, P), equal to those entries of `upsampled`.
    """
    return F.grid_sample(logits, points[:, None], mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


@dataclass(frozen=True)
class _Pixels:
    """Label pixels drawn from every training image, and what else one pass over the label maps gives."""

    points: Tensor  # (n, P, 2) float32 in [-1, 1]
    labels: Tensor  # (n, P) int16, IGNORED where ignored
    majority: npt.NDArray[np.int64]  # (H, W) most frequent class per position
    sequences: list[str | None]


def _draw_pixels(maps: LabelMaps, num_classes: int, pixels_per_image: int, seed: int) -> _Pixels:
    points = torch.empty(len(maps), pixels_per_image, 2)
    drawn = torch.empty(len(maps), pixels_per_image, dtype=torch.int16)
    sequences: list[str | None] = []
    counts: npt.NDArray[np.int32] | None = None
    generator = torch.Generator().manual_seed(seed)
    for sample_idx in range(len(maps)):
        labels, sequence = maps.read(sample_idx)
        height, width = labels.shape
        y = torch.randint(height, (pixels_per_image,), generator=generator)
        x = torch.randint(width, (pixels_per_image,), generator=generator)
        points[sample_idx] = torch.stack(((2 * x + 1) / width - 1, (2 * y + 1) / height - 1), dim=1)
        drawn[sample_idx] = torch.from_numpy(labels)[y, x].to(torch.int16)
        sequences.append(sequence)
        if counts is None:  # maps of other sizes are brought to the size of the first
            counts = np.zeros((num_classes, *labels.shape), np.int32)
        at_size = _nearest(labels, counts.shape[1:])
        row, col = np.nonzero(at_size != IGNORED)
        counts[at_size[row, col], row, col] += 1
    if counts is None or (drawn == IGNORED).all():
        raise EvaluationError("no labelled pixel in the training images: every label is ignore_index")
    return _Pixels(points, drawn, counts.argmax(axis=0), sequences)


def _nearest(labels: npt.NDArray[np.int64], size: Sequence[int]) -> npt.NDArray[np.int64]:
    """A label map at another size by nearest pixel; the same map when the size fits."""
    rows, cols = ((np.arange(target) * source) // target for target, source in zip(size, labels.shape, strict=True))
    return labels[rows[:, None], cols]


def _folds(sequences: list[str | None], params: Mapping[str, Any], seed: int) -> tuple[Tensor, str]:
    """Fold of every training image and how it was made; of a large set only fold 0 is ever held out."""
    named = [name for name in sequences if name is not None]
    if len(named) == len(sequences) and len(set(named)) > 1:
        fold, unit = sequence_folds(named, num_folds=params["folds"]), "sequences"
    else:
        fold, unit = random_folds(len(sequences), num_folds=params["folds"], seed=seed), "images"
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    return fold, f"{num_folds} fold(s) of {unit}"


@dataclass(frozen=True)
class _Fit:
    """Everything a head is fitted from."""

    patches: npt.NDArray[np.float16]
    pixels: _Pixels
    standardise: Standardiser
    num_classes: int
    params: Mapping[str, Any]
    seed: int
    device: torch.device

    def cross_validate(self, fold: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over folds of mIoU and loss per learning rate, on the drawn pixels of the images left out."""
        scores = []
        for held_out in range(int(fold.max()) + 1):
            weight, bias = self.heads((fold != held_out).nonzero()[:, 0], self.params["lrs"])
            scores.append(self._validate((fold == held_out).nonzero()[:, 0], weight, bias))
        miou, loss = torch.tensor(scores, dtype=torch.float64).nanmean(dim=0).unbind(-1)  # (folds, G, 2) before
        return miou, loss

    def heads(self, image_idx: Tensor, lrs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Trains one head per learning rate on the images `image_idx`: weight (G * C, D) and bias (G * C,)."""
        params = self.params
        batch_size = min(params["batch_size"], len(image_idx))
        steps = max(params["min_steps"], params["epochs"] * (len(image_idx) // batch_size))
        generator = torch.Generator().manual_seed(self.seed)
        weights = [torch.zeros(self.num_classes, self.patches.shape[-1], device=self.device) for _ in lrs]
        biases = [torch.zeros(self.num_classes, device=self.device) for _ in lrs]
        cells = [
            {"params": [weight.requires_grad_(), bias.requires_grad_()], "lr": lr}
            for lr, weight, bias in zip(lrs, weights, biases, strict=True)
        ]
        optimizer = torch.optim.AdamW(cells, betas=params["betas"], weight_decay=params["weight_decay"])
        warm_cosine = partial(_warm_cosine, steps=steps, warmup=params["warmup"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine)
        for rows in _shuffled(image_idx, batch_size, steps, generator):
            drawn = torch.randint(self.pixels.labels.shape[1], (params["pixels_per_step"],), generator=generator)
            logits = self.logits(self.patches[rows.numpy()], torch.cat(weights), torch.cat(biases))
            loss = self._loss(logits, self.pixels.points[rows][:, drawn], self.pixels.labels[rows][:, drawn])
            optimizer.zero_grad()
            loss.sum().backward()  # heads are independent, so the sum trains each on its own loss
            optimizer.step()
            schedule.step()
        return torch.cat(weights).detach(), torch.cat(biases).detach()

    def logits(self, patches: npt.NDArray[np.float16], weight: Tensor, bias: Tensor) -> Tensor:
        """Patch logits (B, G * C, h, w) of `patches` (B, h, w, D)."""
        tokens = self.standardise(torch.from_numpy(np.array(patches)).to(self.device).float())
        return F.linear(tokens, weight, bias).permute(0, 3, 1, 2)

    def _at_pixels(self, logits: Tensor, points: Tensor) -> Tensor:
        """Logits (B, G, C, P) of every head at `points` (B, P, 2), from patch logits (B, G * C, h, w)."""
        return logits_at_pixels(logits, points.to(self.device)).unflatten(1, (-1, self.num_classes))

    def _loss(self, logits: Tensor, points: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy per head (G,) over the pixels that are not ignored."""
        at_pixels = self._at_pixels(logits, points)  # (B, G, C, P)
        labels = labels.to(self.device).long()[:, None].expand(-1, at_pixels.shape[1], -1)  # (B, G, P)
        loss = F.cross_entropy(at_pixels.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # (B, G, P)
        num_valid = (labels[:, 0] != IGNORED).sum().clamp(min=1)
        return loss.sum(dim=(0, 2)) / num_valid

    @torch.inference_mode()
    def _validate(self, image_idx: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[float, float]]:
        """(mIoU, loss) of each head over the drawn pixels of the images `image_idx`."""
        confusion = torch.zeros(len(weight) // self.num_classes, self.num_classes, self.num_classes, dtype=torch.int64)
        loss = torch.zeros(len(confusion), dtype=torch.float64)
        for rows in image_idx.split(self.params["batch_size"]):
            points, labels = self.pixels.points[rows], self.pixels.labels[rows]
            logits = self.logits(self.patches[rows.numpy()], weight, bias)
            predicted = self._at_pixels(logits, points).argmax(dim=2).cpu()  # (B, G, P)
            loss += self._loss(logits, points, labels).double().cpu() * len(rows) / len(image_idx)
            for cell in range(len(confusion)):
                guess = predicted[:, cell].flatten()
                confusion[cell] += confusion_matrix(guess, labels.flatten().long(), self.num_classes)
        return [(mean_iou(matrix), float(value)) for matrix, value in zip(confusion, loss, strict=True)]


def _shuffled(image_idx: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of images: epochs of fresh permutations, the short last batch of an epoch dropped."""
    done = 0
    while True:
        order = image_idx[torch.randperm(len(image_idx), generator=generator)]
        for start in range(0, len(order) - batch_size + 1, batch_size):
            if done == steps:
                return
            yield order[start : start + batch_size]
            done += 1


def _warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at `step`: linear over the first `warmup` of the steps, then cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
