"""Linear depth on frozen patch tokens, in the manner of DINOv2's and DINOv3's linear head.

Patch tokens after the final norm are standardised per channel, and one linear layer gives a logit for each of 256 bins
of distance, evenly spaced in the range. Weights relu(logit) + 0.1, brought to a sum of 1, make one distance per patch,
and this map is upsampled bilinearly to that of the sensor. The loss is SigLog, which takes a wrong scale of the whole
scene less to heart than wrong proportions (Eigen et al. 2014, arXiv:1406.2283). The learning rate is chosen on held-out
training images (whole sequences where the data names them); the reported head is refitted on all of them.

The range ends at 10 m, or at 80 m if more than a hundredth of the training distances lie beyond. What lies outside of
it, or was not measured, counts in neither loss nor score. Errors are of each image first, and then the mean over
images. Beside them stands what the mean distance of each pixel over the training images gets, without a look at any.

Legend: n images, B batch, (h, w) patch grid, (H, W) map of distances, D width, K bins, G learning rates, P places.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import DepthMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome, jackknife
from evaluation.progress import counted
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import nearest
from evaluation.protocols.linear_maps import Standardiser, folds_of, logits_at, shuffled, upsampled, warm_cosine
from evaluation.selection import blocks_named, blocks_of, by_setting, choose_cell

__all__ = ["binned_distance", "errors", "score", "siglog"]

_ERRORS = ("rmse", "abs_rel", "delta1")
_LOG_SHIFT = 0.001  # m
_LEVEL_WEIGHT = 0.15
_LEAST_SQUARE = 1e-12  # below it the root in the loss has no finite slope


def score(
    train: Dense[DepthMaps],
    test: Dense[DepthMaps],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Trains and tests the head; see the module for what is chosen on what. There are no classes."""
    if len(train.labels) < 2:
        raise EvaluationError(f"depth needs at least 2 training images, got {len(train.labels)}")
    places = _draw_places(train.labels, params, seed)
    prior, sequences = _prior_errors(places, test.labels)
    is_scored = prior.isfinite().all(dim=1)  # (n,); a matter of the distances alone
    if not is_scored.any():
        low, high = places.range_m
        raise EvaluationError(f"no test image has a distance between {low:g} and {high:g} m")
    fit = _Fit(train.patches, places, Standardiser.of(train.patches, device), params, seed, device)
    fold, rule = folds_of(places.sequences, params, seed, noun="images")
    val_rmse, val_loss = fit.cross_validate(fold)  # each (G,)
    cell, at_edge = choose_cell(-val_rmse, val_loss)
    lr = params["lrs"][cell]
    weight, bias = fit.heads(torch.arange(len(fold)), [lr])

    per_image = []
    for sample_idx in range(len(test.labels)):
        meters, _ = test.labels.read(sample_idx)
        truth = torch.from_numpy(meters)
        with torch.inference_mode():
            coarse = fit.distances(test.patches[sample_idx : sample_idx + 1], weight, bias)  # (1, 1, h, w)
        predicted = upsampled(coarse.cpu(), meters.shape)[0, 0]
        per_image.append(errors(predicted, truth, *places.range_m))
    found = torch.stack(per_image)  # (n, E)
    names = [name for name, scored in zip(sequences, is_scored.tolist(), strict=True) if scored]
    groups = blocks_of(names)
    rmse = found[is_scored, 0]
    interval = jackknife(
        torch.stack([rmse, torch.ones_like(rmse)], dim=1), lambda sums: sums[..., 0] / sums[..., 1], groups
    )
    prior_errors = prior[is_scored].mean(dim=0).tolist()
    metrics = dict(zip(_ERRORS, found[is_scored].mean(dim=0).tolist(), strict=True))
    if interval is not None:
        value, margin = interval
        metrics |= {"rmse_ci_low": max(0.0, value - margin), "rmse_ci_high": value + margin}
    metrics["val_rmse"] = float(val_rmse[cell])
    metrics |= {f"{name}_position_prior": value for name, value in zip(_ERRORS, prior_errors, strict=True)}
    return Outcome(
        metrics=metrics,
        details={
            "lr": lr,
            "at_grid_edge": at_edge,
            "val_rmse_by_lr": by_setting(params["lrs"], val_rmse),
            "selection": rule,
            "range_m": list(places.range_m),
            "num_scored": int(is_scored.sum()),
            "interval_over": blocks_named(groups),
            "patch_grid": list(train.patches.shape[1:3]),
        },
        per_sample=rmse,
        groups=groups,
    )


def errors(predicted: Tensor, truth: Tensor, low: float, high: float) -> Tensor:
    """RMSE in meters, mean relative error and delta1 (3,) float64 of one image; NaN where nothing is to be scored.

    Args:
        predicted: (H, W) meters, brought into the range.
        truth: (H, W) meters, NaN where none was measured.
        low, high: of the range; distances beyond are not scored.
    """
    is_valid = (truth > low) & (truth < high)
    true, guess = truth[is_valid].double(), predicted[is_valid].double().clamp(low, high)
    off = guess - true
    factor = torch.maximum(guess / true, true / guess)
    return torch.stack([off.square().mean().sqrt(), (off.abs() / true).mean(), (factor < 1.25).double().mean()])


def _prior_errors(places: _Places, maps: DepthMaps) -> tuple[Tensor, list[str | None]]:
    """`errors` (n, E) of the mean distances in the maps that a head is to be tested on, and the sequences of these."""
    rows, sequences = [], []
    for sample_idx in range(len(maps)):
        meters, sequence = maps.read(sample_idx)
        prior = torch.from_numpy(nearest(places.mean_m, meters.shape))
        rows.append(errors(prior, torch.from_numpy(meters), *places.range_m))
        sequences.append(sequence)
    return torch.stack(rows), sequences


def binned_distance(logits: Tensor, low: float, high: float) -> Tensor:
    """Distances (...) of logits (..., K) of bins that are evenly spaced from `low` to `high`, both included."""
    weights = logits.relu() + 0.1
    bins = torch.linspace(low, high, logits.shape[-1], dtype=logits.dtype, device=logits.device)
    return weights @ bins / weights.sum(dim=-1)


def siglog(predicted: Tensor, truth: Tensor, *, level_only: bool = False) -> Tensor:
    """The loss (...) of distances (..., P): root of the variance of log ratios and 0.15 of their squared mean.

    Args:
        truth: (P,) meters, at least two.
        level_only: leaves the variance out.
    """
    ratio = (predicted + _LOG_SHIFT).log() - (truth + _LOG_SHIFT).log()
    square = _LEVEL_WEIGHT * ratio.mean(dim=-1).square()
    return (square if level_only else square + ratio.var(dim=-1)).clamp_min(_LEAST_SQUARE).sqrt()


class _Places(NamedTuple):
    """Places drawn from every training image, and what else one pass over the distances gives."""

    points: Tensor  # (n, P, 2) float32 in [-1, 1]
    meters: Tensor  # (n, P) float32, NaN where nothing counts
    range_m: tuple[float, float]
    mean_m: npt.NDArray[np.float32]  # (H, W), of what is in the range; of all pixels where there is nothing
    sequences: list[str | None]


def _draw_places(maps: DepthMaps, params: Mapping[str, Any], seed: int) -> _Places:
    """Draw places of each map, with replacement and whatever was measured there.

    Raises:
        EvaluationError: nothing that was drawn counts.
    """
    generator = torch.Generator().manual_seed(seed)
    per_image, low = params["pixels_per_image"], params["min_m"]
    points, meters = torch.empty(len(maps), per_image, 2), torch.empty(len(maps), per_image)
    means: list[_MeanMap] | None = None
    sequences: list[str | None] = []
    for sample_idx in range(len(maps)):
        distances, sequence = maps.read(sample_idx)
        place = [torch.randint(side, (per_image,), generator=generator) for side in distances.shape]
        centers = [(2 * index + 1) / side - 1 for index, side in zip(place, distances.shape, strict=True)]
        points[sample_idx] = torch.stack(centers[::-1], dim=1)
        meters[sample_idx] = torch.from_numpy(distances)[tuple(place)]
        sequences.append(sequence)
        means = means or [_MeanMap(distances.shape, low, high) for high in params["max_m"]]
        for mean in means:
            mean.add(distances)
    measured = meters[meters.isfinite()]
    if not len(measured):
        raise EvaluationError("no distance was measured in the training images")
    beyond = [float((measured >= high).double().mean()) for high in params["max_m"]]
    chosen = next((number for number, share in enumerate(beyond) if share <= params["far_share"]), len(beyond) - 1)
    high = params["max_m"][chosen]
    counts = meters.masked_fill(~((meters > low) & (meters < high)), torch.nan)
    if counts.isfinite().sum() < 2 or means is None:
        raise EvaluationError(
            f"no distance between {low:g} and {high:g} m in the training images, where the nearest is "
            f"{float(measured.min()):g} m: set depth_scale in dataset.json to the meters that a unit of depth.png is"
        )
    return _Places(points, counts, (low, high), means[chosen].values(), sequences)


class _MeanMap:
    """The mean distance at each pixel, of those between `low` and `high`."""

    def __init__(self, size: Sequence[int], low: float, high: float) -> None:
        self._low, self._high = low, high
        self._sums, self._counts = np.zeros(tuple(size)), np.zeros(tuple(size), np.int64)

    def add(self, meters: npt.NDArray[np.float32]) -> None:
        """Count a map (H, W); one of another size is brought to that of the others."""
        at_size = nearest(meters, self._sums.shape)
        counts = (at_size > self._low) & (at_size < self._high)
        self._sums[counts] += at_size[counts]
        self._counts += counts

    def values(self) -> npt.NDArray[np.float32]:
        everywhere = self._sums.sum() / max(1, self._counts.sum())
        mean = np.where(self._counts > 0, self._sums / np.maximum(self._counts, 1), everywhere)
        return mean.astype(np.float32)


@dataclass(frozen=True)
class _Fit:
    """Everything the head is fitted from; optimizer, schedule and names of `params` are those of `linear_maps.Fit`."""

    patches: npt.NDArray[np.float16]  # (n, h, w, D)
    places: _Places
    standardise: Standardiser
    params: Mapping[str, Any]
    seed: int
    device: torch.device

    def cross_validate(self, fold: Tensor) -> tuple[Tensor, Tensor]:
        """Mean over folds of RMSE and loss (G,) each, on the drawn places of the images left out."""
        scores = []
        for held_out in range(int(fold.max()) + 1):
            weight, bias = self.heads((fold != held_out).nonzero()[:, 0], self.params["lrs"])
            scores.append(self._validate((fold == held_out).nonzero()[:, 0], weight, bias))
        rmse, loss = torch.stack(scores).nanmean(dim=0)  # (folds, 2, G) before
        return rmse, loss

    def heads(self, sample_idx: Tensor, lrs: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Trains one head per learning rate on these images: weight (G, K, D) and bias (G, K)."""
        params = self.params
        batch_size = min(params["batch_size"], len(sample_idx))
        steps = max(params["min_steps"], params["epochs"] * (len(sample_idx) // batch_size))
        generator = torch.Generator().manual_seed(self.seed)
        # All bins of zeros would stay zeros: relu has no slope there.
        first = params["init_std"] * torch.randn(params["num_bins"], self.patches.shape[-1], generator=generator)
        weights = [first.clone().to(self.device).requires_grad_() for _ in lrs]
        biases = [torch.zeros(params["num_bins"], device=self.device, requires_grad=True) for _ in lrs]
        cells = [{"params": [w, b], "lr": lr} for lr, w, b in zip(lrs, weights, biases, strict=True)]
        optimizer = torch.optim.AdamW(cells, betas=params["betas"], weight_decay=params["weight_decay"])
        schedule_of = partial(warm_cosine, steps=steps, warmup=params["warmup"])
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule_of)
        batches = shuffled(sample_idx, batch_size, steps, generator)
        for step, rows in enumerate(counted(batches, steps, f"training on {len(sample_idx)} samples")):
            drawn = torch.randint(self.places.meters.shape[1], (params["pixels_per_step"],), generator=generator)
            is_level = step < params["level_first"] * steps
            loss = self._loss(rows, drawn, torch.stack(weights), torch.stack(biases), level_only=is_level)
            if loss is not None:
                optimizer.zero_grad()
                loss.sum().backward()  # heads are independent, so the sum trains each on its own loss
                optimizer.step()
            schedule.step()
        return torch.stack(weights).detach(), torch.stack(biases).detach()

    def distances(self, patches: npt.NDArray[np.float16], weight: Tensor, bias: Tensor) -> Tensor:
        """Meters (B, G, h, w) by every head, of patch maps (B, h, w, D)."""
        tokens = self.standardise(torch.from_numpy(np.array(patches)).to(self.device).float())
        logits = F.linear(tokens, weight.flatten(0, 1), bias.flatten()).unflatten(-1, bias.shape)  # (B, h, w, G, K)
        return binned_distance(logits, *self.places.range_m).movedim(-1, 1)

    def _at_places(self, rows: Tensor, drawn: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What the heads say (B, G, P) and what was measured (B, P), at some of the places of these images."""
        coarse = self.distances(self.patches[rows.numpy()], weight, bias)
        predicted = logits_at(coarse, self.places.points[rows][:, drawn].to(self.device))
        return predicted, self.places.meters[rows][:, drawn].to(self.device)

    def _loss(
        self, rows: Tensor, drawn: Tensor, weight: Tensor, bias: Tensor, *, level_only: bool = False
    ) -> Tensor | None:
        """SigLog per head (G,) over the places of the batch that count; None of fewer than two."""
        predicted, meters = self._at_places(rows, drawn, weight, bias)
        counts = meters.isfinite()
        if counts.sum() < 2:
            return None
        return siglog(predicted.transpose(0, 1)[:, counts], meters[counts], level_only=level_only)

    @torch.inference_mode()
    def _validate(self, sample_idx: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """RMSE and loss (2, G) of each head over the drawn places of these images, the mean over images."""
        everything = torch.arange(self.places.meters.shape[1])
        found = []
        for row in sample_idx.split(1):
            predicted, meters = self._at_places(row, everything, weight, bias)
            counts = meters[0].isfinite()
            if counts.sum() < 2:
                continue
            true, guess = meters[0, counts], predicted[0][:, counts]  # (P,), (G, P)
            found.append(torch.stack([(guess - true).square().mean(dim=1).sqrt(), siglog(guess, true)]))
        nothing = torch.full((2, len(bias)), torch.nan, dtype=torch.float64)
        return torch.stack(found).double().mean(dim=0).cpu() if found else nothing
