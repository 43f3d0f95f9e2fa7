"""How well hidden blocks of held-out volumes are filled in, by the encoder and the decoder of a checkpoint.

NeRF-MAE (Irshad et al. 2024, arXiv:2404.01300) reports the PSNR of the colors of occupied voxels, of radiance grids it
hides parts of; it counts visible voxels, too. Here hidden ones alone count. Empty space fills most of a grid, so that
the error of alpha stands by its side, over all hidden voxels and over occupied and empty ones apart. Of other volumes
it is the PSNR of hidden voxels; the peak is 1 where all values are in [0, 1], such as bytes, else their range.

Each number is one quotient over all voxels of all samples. Nothing is fitted. Every other sample chooses between
checkpoints ("val_..."), the others are reported; a single sample is reported, and chooses nothing. Intervals are over
samples: of cuts of one scene they tell nothing of other scenes. Beside them stand two predictions that need no
learning: the best constant, and the mean of what is visible of the 26 adjacent blocks (of all that is visible, where
nothing of them is).

Legend: B batch, n samples, C channels, Q predicted numbers per voxel, (X, Y, Z) voxels.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evaluation.extraction.decoding import Decoded, Filled
from evaluation.extraction.forward import Taken
from evaluation.metrics import Outcome, jackknife, jackknife_interval
from evaluation.protocol import EvaluationError

__all__ = ["neighbor_mean", "score"]

# Columns of a tally (n, 4 + Q): how many voxels, squared errors per predicted number, then sums of the numbers.
_COUNT, _ERROR, _NEIGHBOR_ERROR, _SQUARE, _SUMS = range(5)
_LEAST_ERROR = 1e-10  # 100 dB


def score(held_out: Decoded, *, params: Mapping[str, Any], seed: int) -> Outcome:
    """Fills in and compares; see the module for what is reported. `seed` has decided what is hidden.

    Raises:
        EvaluationError: nothing that is hidden of the samples that are reported is to be scored.
    """
    is_radiance, block = held_out.model.is_radiance, int(held_out.recipe["block"])
    tallies = held_out.measure(
        partial(_of_radiance, occupied_alpha=params["occupied_alpha"], block=block)
        if is_radiance
        else partial(_of_volumes, block=block)
    )
    range_of = tallies.pop("range")  # (n, 2)
    num_samples = len(range_of)
    chooses = torch.arange(num_samples) % 2 == 1
    low, high = float(range_of[:, 0].min()), float(range_of[:, 1].max())
    peak = 1.0 if low >= 0 and high <= 1 else high - low
    shown = tallies["colors" if is_radiance else "values"]
    if not shown[~chooses][:, _COUNT].any():
        what = f"occupied (alpha above {params['occupied_alpha']})" if is_radiance else "inside a volume"
        raise EvaluationError(f"no hidden voxel of the {int((~chooses).sum())} samples that are reported is {what}")
    details = {
        "block": block,
        "hidden": held_out.recipe["hidden"],
        "peak": peak,
        "num_scored": int((~chooses).sum()),
        "num_val": int(chooses.sum()),
    }
    if is_radiance:
        alpha = tallies["alpha"]
        details["occupied_share"] = float(shown[:, _COUNT].sum() / alpha[:, _COUNT].sum())
    metrics = _psnr_metrics(shown[~chooses], shown[chooses], peak)
    if is_radiance:
        metrics |= _alpha_metrics({name: tally[~chooses] for name, tally in tallies.items()}, alpha[chooses])
    return Outcome(metrics=metrics, details=details)


def _psnr_metrics(reported: Tensor, choosing: Tensor, peak: float) -> dict[str, float]:
    def decibels(error: Tensor) -> Tensor:
        return -10 * (error / peak**2).clamp_min(_LEAST_ERROR).log10()

    metrics = {
        "psnr": float(decibels(_mean_error(reported.sum(0)))),
        "psnr_constant": float(decibels(_constant_error(reported.sum(0)))),
        "psnr_neighbors": float(decibels(_mean_error(reported.sum(0), _NEIGHBOR_ERROR))),
    }
    if (found := jackknife(reported, lambda tally: decibels(_mean_error(tally)))) is not None:
        value, margin = found
        metrics |= {"psnr_ci_low": value - margin, "psnr_ci_high": value + margin}
    if choosing[:, _COUNT].any():
        metrics["val_psnr"] = float(decibels(_mean_error(choosing.sum(0))))
    return metrics


def _alpha_metrics(reported: Mapping[str, Tensor], choosing: Tensor) -> dict[str, float]:
    alpha = reported["alpha"]
    metrics = {
        "alpha_error": float(_mean_error(alpha.sum(0))),
        "alpha_error_constant": float(_constant_error(alpha.sum(0))),
        "alpha_error_neighbors": float(_mean_error(alpha.sum(0), _NEIGHBOR_ERROR)),
    }
    if len(alpha) > 1:
        low, high = jackknife_interval(alpha, _mean_error)
        metrics |= {"alpha_error_ci_low": low, "alpha_error_ci_high": high}
    if choosing[:, _COUNT].any():
        metrics["val_alpha_error"] = float(_mean_error(choosing.sum(0)))
    for name in ("alpha_occupied", "alpha_empty"):
        if reported[name][:, _COUNT].any():
            metrics[name.replace("alpha", "alpha_error")] = float(_mean_error(reported[name].sum(0)))
    return metrics


def _mean_error(tally: Tensor, column: int = _ERROR) -> Tensor:
    """Mean squared error (...) of summed tallies (..., 4 + Q); NaN where nothing was counted."""
    return tally[..., column] / tally[..., _COUNT]


def _constant_error(tally: Tensor) -> Tensor:
    """The same of predicting the mean of the voxels that are counted."""
    means = tally[..., _SUMS:] / tally[..., _COUNT, None]  # (..., Q)
    return tally[..., _SQUARE] / tally[..., _COUNT] - means.square().mean(-1)


def _of_radiance(filled: Filled, *, occupied_alpha: float, block: int) -> Taken:
    """Tallies of colors where something is, and of alpha: all, where something is, and where nothing is."""
    is_occupied = filled.values[:, 3] > occupied_alpha  # (B, X, Y, Z)
    is_scored, is_known = filled.is_hidden & filled.is_inside, ~filled.is_hidden & filled.is_inside
    (true_color, true_alpha), (color, alpha) = (
        (grid[:, :3], grid[:, 3:]) for grid in (filled.values, filled.predicted)
    )
    near_color = neighbor_mean(true_color, is_known & is_occupied, block)
    near_alpha = neighbor_mean(true_alpha, is_known, block)
    return {
        "range": _range(filled),
        "colors": _tally(true_color, color, near_color, is_scored & is_occupied),
        "alpha": _tally(true_alpha, alpha, near_alpha, is_scored),
        "alpha_occupied": _tally(true_alpha, alpha, near_alpha, is_scored & is_occupied),
        "alpha_empty": _tally(true_alpha, alpha, near_alpha, is_scored & ~is_occupied),
    }


def _of_volumes(filled: Filled, *, block: int) -> Taken:
    near = neighbor_mean(filled.values, ~filled.is_hidden & filled.is_inside, block)
    return {
        "range": _range(filled),
        "values": _tally(filled.values, filled.predicted, near, filled.is_hidden & filled.is_inside),
    }


def _tally(truth: Tensor, predicted: Tensor, near: Tensor, is_scored: Tensor) -> Tensor:
    """(B, 4 + Q) float64 sums over the voxels that are scored (B, X, Y, Z), of numbers (B, Q, X, Y, Z)."""
    truth, predicted, near = (volume.double() for volume in (truth, predicted, near))
    voxels = (1, 2, 3)
    columns = [is_scored.sum(voxels).double()]
    for squares in ((predicted - truth).square(), (near - truth).square(), truth.square()):
        columns.append((squares.mean(1) * is_scored).sum(voxels))
    return torch.cat([torch.stack(columns, dim=1), (truth * is_scored.unsqueeze(1)).sum((2, 3, 4))], dim=1)


def _range(filled: Filled) -> Tensor:
    """(B, 2) least and greatest value; padding is 0."""
    values = filled.values.flatten(1).double()
    return torch.stack([values.amin(1), values.amax(1)], dim=1)


def neighbor_mean(values: Tensor, is_known: Tensor, block: int) -> Tensor:
    """For each voxel the mean over the known voxels of its block and the 26 around it.

    Args:
        values: (B, Q, X, Y, Z).
        is_known: (B, X, Y, Z) bool.
        block: voxels along the edge of a block.

    Returns:
        (B, Q, X, Y, Z); where none is known the mean over all that are, and 0 without any.
    """
    sides = values.shape[2:]
    known = is_known.unsqueeze(1).to(values.dtype)  # (B, 1, X, Y, Z)
    sums = torch.cat([values * known, known], dim=1)  # (B, Q + 1, X, Y, Z)
    x, y, z = (-side % block for side in sides)
    by_block = functional.avg_pool3d(functional.pad(sums, [0, z, 0, y, 0, x]), block)  # shares of equal blocks
    around = functional.avg_pool3d(by_block, 3, stride=1, padding=1)  # zeros beyond the border
    anywhere = by_block.sum((2, 3, 4), keepdim=True)  # (B, Q + 1, 1, 1, 1)
    used = torch.where(around[:, -1:] > 0, around, anywhere)
    mean = used[:, :-1] / torch.where(used[:, -1:] > 0, used[:, -1:], 1)
    for axis in (2, 3, 4):
        mean = mean.repeat_interleave(block, axis)
    return mean[:, :, : sides[0], : sides[1], : sides[2]]
