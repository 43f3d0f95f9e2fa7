"""Linear heads on maps of frozen tokens, of images and of volumes alike: what dense protocols share.

Tokens are standardised per channel (a BatchNorm whose statistics are those of the whole training set), or whitened, one
linear layer gives logits per token, these are upsampled (bilinearly or trilinearly, align_corners=False) to the size of
the label map, and the loss is taken there. Cross-entropy over all places is estimated without bias from places drawn at
random, and upsampled logits are computed at these only. One head per learning rate is trained in the same pass.

An encoder in stages has a map of each. The layer is one on all of them, upsampled and joined: since it is linear, each
map gives logits at its own resolution, and these are upsampled and added.

Not here: metrics, and what is done with the test samples (`score.py` of each protocol).

Legend: n samples, B batch, S... label map (H, W) or (X, Y, Z), s... grid of tokens, A its axes, D width, C classes,
G learning rates, P places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import IGNORED, LabelMaps
from evaluation.metrics import confusion_matrix
from evaluation.progress import counted
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import MajorityMap
from evaluation.selection import hold_out, random_folds, sequence_folds

__all__ = [
    "Fit",
    "Places",
    "Standardiser",
    "Whitener",
    "draw_places",
    "folds_of",
    "logits_at",
    "shuffled",
    "upsampled",
    "warm_cosine",
]

EPS = 1e-5  # BatchNorm's
FLOOR = 1e-4  # of the variance along an axis, as a share of the mean over all axes


@dataclass(frozen=True)
class Standardiser:
    """BatchNorm in evaluation mode, without gain and bias (the linear layer absorbs them)."""

    mean: Tensor  # (D,)
    var: Tensor  # (D,)

    @classmethod
    def of(cls, patches: npt.NDArray[np.float16], device: torch.device) -> Standardiser:
        """Exact statistics over all tokens of `patches` (n, s..., D)."""
        total = torch.zeros(2, patches.shape[-1], dtype=torch.float64)
        for start in range(0, len(patches), 64):
            tokens = torch.from_numpy(np.array(patches[start : start + 64])).double().flatten(0, -2)  # (tokens, D)
            total += torch.stack((tokens.sum(dim=0), tokens.square().sum(dim=0)))
        mean, square = total / math.prod(patches.shape[:-1])
        return cls(mean.float().to(device), (square - mean.square()).clamp(min=0).float().to(device))

    def __call__(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) * (self.var + EPS).rsqrt()


@dataclass(frozen=True)
class Whitener:
    """Tokens along the principal axes of the standardised training tokens, each axis with a variance of 1.

    A linear layer sees the same tokens as behind a `Standardiser`, but trains as fast on small differences as on large
    ones. Tokens of trained encoders of volumes have most of their variance along a handful of axes, and what tells a
    structure from its surroundings along others: behind a `Standardiser` a few hundred steps do not reach these.
    """

    mean: Tensor  # (D,)
    axes: Tensor  # (D, D)

    @classmethod
    def of(cls, patches: npt.NDArray[np.float16], device: torch.device) -> Whitener:
        """Exact statistics over all tokens of `patches` (n, s..., D)."""
        dim, count = patches.shape[-1], math.prod(patches.shape[:-1])
        total, products = torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
        for start in range(0, len(patches), 8):
            tokens = torch.from_numpy(np.array(patches[start : start + 8])).double().flatten(0, -2)  # (tokens, D)
            total += tokens.sum(dim=0)
            products += tokens.mT @ tokens
        mean = total / count
        covariance = products / count - mean.outer(mean)
        scale = (covariance.diagonal().clamp(min=0) + EPS).rsqrt()  # (D,)
        variance, axes = torch.linalg.eigh(covariance * scale.outer(scale))
        axes = scale[:, None] * axes * (variance.clamp(min=0) + FLOOR).rsqrt()
        return cls(mean.float().to(device), axes.float().to(device))

    def __call__(self, tokens: Tensor) -> Tensor:
        return (tokens - self.mean) @ self.axes


def upsampled(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits (B, C, s...) at label size: (B, C, S...)."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return F.interpolate(logits, size=tuple(size), mode=mode, align_corners=False)


def logits_at(logits: Tensor, points: Tensor) -> Tensor:
    """Values of the upsampled `logits` (B, C, s...) at `points` only.

    Args:
        points: (B, P, A) centers of pixels or voxels in [-1, 1] over the label map, the last axis first, as
            `grid_sample` counts.

    Returns:
        (B, C, P), equal to those entries of `upsampled`.
    """
    lined_up = points.unflatten(1, (1,) * (points.shape[-1] - 1) + (-1,))  # (B, 1..., P, A)
    return F.grid_sample(logits, lined_up, mode="bilinear", padding_mode="border", align_corners=False).flatten(2)


@dataclass(frozen=True)
class Places:
    """Places drawn from every training sample, and what else one pass over the label maps gives."""

    points: Tensor  # (n, P, A) float32 in [-1, 1]
    labels: Tensor  # (n, P) int16, IGNORED where ignored
    majority: MajorityMap
    sequences: list[str | None]


def draw_places(maps: LabelMaps, num_classes: int, per_sample: int, seed: int) -> Places:
    """Draw `per_sample` places of each label map, with replacement and whatever their label.

    Raises:
        EvaluationError: every label that was drawn is ignored.
    """
    points = torch.empty(len(maps), per_sample, maps.axes)
    drawn = torch.empty(len(maps), per_sample, dtype=torch.int16)
    sequences: list[str | None] = []
    majority = MajorityMap(num_classes)
    generator = torch.Generator().manual_seed(seed)
    for sample_idx in range(len(maps)):
        labels, sequence = maps.read(sample_idx)
        place = [torch.randint(side, (per_sample,), generator=generator) for side in labels.shape]
        centers = [(2 * index + 1) / side - 1 for index, side in zip(place, labels.shape, strict=True)]
        points[sample_idx] = torch.stack(centers[::-1], dim=1)
        drawn[sample_idx] = torch.from_numpy(labels)[tuple(place)].to(torch.int16)
        sequences.append(sequence)
        majority.add(labels)
    if (drawn == IGNORED).all():
        noun = "voxel in the training volumes" if maps.axes == 3 else "pixel in the training images"
        raise EvaluationError(f"no labelled {noun}: every label is ignore_index")
    return Places(points, drawn, majority, sequences)


def folds_of(sequences: list[str | None], params: Mapping[str, Any], seed: int, noun: str) -> tuple[Tensor, str]:
    """Fold of every training sample and how it was made; of a large set only fold 0 is ever held out."""
    named = [name for name in sequences if name is not None]
    if len(named) == len(sequences) and len(set(named)) > 1:
        fold, unit = sequence_folds(named, num_folds=params["folds"]), "sequences"
    else:
        fold, unit = random_folds(len(sequences), num_folds=params["folds"], seed=seed), noun
    fold, num_folds = hold_out(fold, holdout_from=params["holdout_from"])
    return fold, f"{num_folds} fold(s) of {unit}"


@dataclass(frozen=True)
class Fit:
    """Everything a head is fitted from.

    Attributes:
        maps: (n, s..., D) each.
        standardise: a `Standardiser` or a `Whitener` of each.
        per_step: places of each sample that a step sees.
        params: of the optimizer: lrs, betas, weight_decay, batch_size, min_steps, epochs, warmup.
        judge: what a learning rate is chosen by, of a confusion matrix (C, C); more is better.
        with_dice: the loss is cross-entropy plus a soft Dice loss of the classes but 0, for a ground that fills most of
            a map: by cross-entropy alone a head says nothing but ground for long.
    """

    maps: Sequence[npt.NDArray[np.float16]]
    places: Places
    standardise: Sequence[Callable[[Tensor], Tensor]]
    num_classes: int
    per_step: int
    params: Mapping[str, Any]
    judge: Callable[[Tensor], float]
    seed: int
    device: torch.device
    with_dice: bool = False

    def cross_validate(self, fold: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over folds of `judge` and loss per learning rate, on the drawn places of the samples left out."""
        scores = []
        for held_out in range(int(fold.max()) + 1):
            weight, bias = self.heads((fold != held_out).nonzero()[:, 0], self.params["lrs"])
            scores.append(self._validate((fold == held_out).nonzero()[:, 0], weight, bias))
        value, loss = torch.tensor(scores, dtype=torch.float64).nanmean(dim=0).unbind(-1)  # (folds, G, 2) before
        return value, loss

    def heads(self, sample_idx: Tensor, lrs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Trains one head per learning rate on these samples: weight (G * C, D of all maps) and bias (G * C,)."""
        params = self.params
        batch_size = min(params["batch_size"], len(sample_idx))
        steps = max(params["min_steps"], params["epochs"] * (len(sample_idx) // batch_size))
        generator = torch.Generator().manual_seed(self.seed)
        weights = [torch.zeros(self.num_classes, sum(self._dims), device=self.device) for _ in lrs]
        biases = [torch.zeros(self.num_classes, device=self.device) for _ in lrs]
        cells = [
            {"params": [weight.requires_grad_(), bias.requires_grad_()], "lr": lr}
            for lr, weight, bias in zip(lrs, weights, biases, strict=True)
        ]
        optimizer = torch.optim.AdamW(cells, betas=params["betas"], weight_decay=params["weight_decay"])
        schedule_of = partial(warm_cosine, steps=steps, warmup=params["warmup"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of)
        batches = shuffled(sample_idx, batch_size, steps, generator)
        for rows in counted(batches, steps, f"training on {len(sample_idx)} samples"):
            drawn = torch.randint(self.places.labels.shape[1], (self.per_step,), generator=generator)
            logits = self._logits(self._rows(rows), torch.cat(weights), torch.cat(biases))
            loss = self._loss(logits, self.places.points[rows][:, drawn], self.places.labels[rows][:, drawn])
            optimizer.zero_grad()
            loss.sum().backward()  # heads are independent, so the sum trains each on its own loss
            optimizer.step()
            schedule.step()
        return torch.cat(weights).detach(), torch.cat(biases).detach()

    def predict(
        self, maps: Sequence[npt.NDArray[np.float16]], weight: Tensor, bias: Tensor, size: Sequence[int]
    ) -> Tensor:
        """Classes (B, S...) at label size, of one head and maps (B, s..., D)."""
        return _total(upsampled(logits, size) for logits in self._logits(maps, weight, bias)).argmax(dim=1)

    @property
    def _dims(self) -> list[int]:
        return [one.shape[-1] for one in self.maps]

    def _rows(self, sample_idx: Tensor) -> list[npt.NDArray[np.float16]]:
        return [one[sample_idx.numpy()] for one in self.maps]

    def _logits(self, maps: Sequence[npt.NDArray[np.float16]], weight: Tensor, bias: Tensor) -> list[Tensor]:
        """Logits (B, G * C, s...) of each of the maps (B, s..., D); the first has the bias."""
        found: list[Tensor] = []
        for one, standardise, columns in zip(maps, self.standardise, weight.split(self._dims, dim=1), strict=True):
            tokens = standardise(torch.from_numpy(np.array(one)).to(self.device).float())
            found.append(F.linear(tokens, columns, None if found else bias).movedim(-1, 1))
        return found

    def _at_points(self, logits: Sequence[Tensor], points: Tensor) -> Tensor:
        """Logits (B, G, C, P) of every head at `points` (B, P, A), from logits (B, G * C, s...) of each map."""
        points = points.to(self.device)
        return _total(logits_at(one, points) for one in logits).unflatten(1, (-1, self.num_classes))

    def _loss(self, logits: Sequence[Tensor], points: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy per head (G,) over the places that are not ignored."""
        at_points = self._at_points(logits, points)  # (B, G, C, P)
        labels = labels.to(self.device).long()[:, None].expand(-1, at_points.shape[1], -1)  # (B, G, P)
        loss = F.cross_entropy(at_points.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")  # (B, G, P)
        num_valid = (labels[:, 0] != IGNORED).sum().clamp(min=1)
        cross_entropy = loss.sum(dim=(0, 2)) / num_valid
        return cross_entropy + _soft_dice_loss(at_points, labels) if self.with_dice else cross_entropy

    @torch.inference_mode()
    def _validate(self, sample_idx: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[float, float]]:
        """(`judge`, loss) of each head over the drawn places of these samples."""
        confusion = torch.zeros(len(weight) // self.num_classes, self.num_classes, self.num_classes, dtype=torch.int64)
        loss = torch.zeros(len(confusion), dtype=torch.float64)
        for rows in sample_idx.split(self.params["batch_size"]):
            points, labels = self.places.points[rows], self.places.labels[rows]
            logits = self._logits(self._rows(rows), weight, bias)
            predicted = self._at_points(logits, points).argmax(dim=2).cpu()  # (B, G, P)
            loss += self._loss(logits, points, labels).double().cpu() * len(rows) / len(sample_idx)
            for cell in range(len(confusion)):
                guess = predicted[:, cell].flatten()
                confusion[cell] += confusion_matrix(guess, labels.flatten().long(), self.num_classes)
        return [(self.judge(matrix), float(value)) for matrix, value in zip(confusion, loss, strict=True)]


def _total(parts: Iterable[Tensor]) -> Tensor:
    return reduce(torch.add, parts)


def _soft_dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice of probabilities (Milletari et al. 2016), the mean (G,) over the classes that occur, without class 0.

    Args:
        logits: (B, G, C, P).
        labels: (B, G, P), `IGNORED` where nothing counts.
    """
    is_valid = (labels != IGNORED).unsqueeze(2)  # (B, G, 1, P)
    share = logits.softmax(dim=2) * is_valid
    truth = F.one_hot(labels.clamp(min=0), logits.shape[2]).movedim(-1, 2) * is_valid  # (B, G, C, P)
    hit, predicted, true = ((one.sum(dim=(0, 3))[:, 1:]) for one in (share * truth, share, truth))  # (G, C - 1)
    occurs = true > 0
    dice = 2 * hit / (predicted + true).clamp(min=1)
    return ((1 - dice) * occurs).sum(dim=1) / occurs.sum(dim=1).clamp(min=1)


def shuffled(sample_idx: Tensor, batch_size: int, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """`steps` batches of samples: epochs of fresh permutations, the short last batch of an epoch dropped."""
    done = 0
    while True:
        order = sample_idx[torch.randperm(len(sample_idx), generator=generator)]
        for start in range(0, len(order) - batch_size + 1, batch_size):
            if done == steps:
                return
            yield order[start : start + batch_size]
            done += 1


def warm_cosine(step: int, steps: int, warmup: float) -> float:
    """Share of the learning rate at `step`: linear over the first `warmup` of the steps, then cosine to zero."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
