"""What the spectrum of pooled features says without labels: alarms and trend lines, not a ranking of methods.

RankMe (Garrido et al. 2022, arXiv:2210.02885) is exp of the entropy of the singular values; of features that have
collapsed it falls. It compares checkpoints of one method on one data set: it grows with the number of images, and a
random encoder can have more of it than a trained one. Features are those of the training images as they are, not
standardised; nothing is fitted, so that no split has to be kept apart.

Legend: n images, D width, R = min(n, D) values of a spectrum.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, jackknife
from evaluation.protocol import EvaluationError

__all__ = ["effective_rank", "participation_ratio", "power_law", "score", "spread", "uniformity"]

FIRST_RANK, LAST_RANK = 11, 100  # between which the decay of the spectrum is fitted
NOISE = 1e-14  # part of the sum of squares below which an eigenvalue of float32 features is rounding
_EPSILON = 1e-7  # of the RankMe paper


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Measures the training images, or so many of them as `seed` draws; labels are not read."""
    num_images = len(train.patch_mean)
    if num_images < 2:
        raise EvaluationError(f"spectrum needs at least 2 training images, got {num_images}")
    drawn = torch.randperm(num_images, generator=torch.Generator().manual_seed(seed))[: params["max_rows"]]
    metrics: dict[str, float] = {}
    for token, rows in (("mean", train.patch_mean), ("cls", train.cls)):
        if rows is not None:
            found = _measured(rows[drawn].to(device).double(), params)
            metrics |= {name.replace("TOKEN", token): value for name, value in found.items()}
    return Outcome(
        metrics=metrics,
        details={
            "num_scored": len(drawn),
            "rows_per_feature": len(drawn) / train.patch_mean.shape[1],  # below about 4 ranks depend on it
        },
    )


def _measured(rows: Tensor, params: Mapping[str, Any]) -> dict[str, float]:
    """All scores of features (n, D) float64 in any order of rows."""
    num_values = min(rows.shape)
    floor = NOISE * float(rows.square().sum())
    centered = _spectrum(_gram(rows - rows.mean(dim=0)), num_values)
    centered = centered.where(centered > floor, 0)
    metrics = {
        "effective_rank_TOKEN": float(effective_rank(centered)),
        "participation_ratio_TOKEN": participation_ratio(centered),
        "std_TOKEN": spread(rows),
        "uniformity_TOKEN": uniformity(rows[: params["max_rows_of_pairs"]]),
    }
    if num_values >= LAST_RANK and centered[LAST_RANK - 1] > 0:
        metrics["alpha_TOKEN"] = power_law(centered)
    blocks = torch.stack([_gram(block) for block in rows.chunk(params["blocks"])])  # (blocks, D, D)
    metrics["rankme_TOKEN"] = float(effective_rank(_spectrum(blocks.sum(dim=0), num_values)))
    found = jackknife(blocks, lambda grams: effective_rank(_spectrum(grams, num_values)))
    if found is not None:
        value, margin = found
        metrics |= {"rankme_TOKEN_ci_low": max(value - margin, 1.0), "rankme_TOKEN_ci_high": value + margin}
    return metrics


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


def _spectrum(gram: Tensor, num_values: int) -> Tensor:
    """The greatest eigenvalues (..., R) of symmetric matrices (..., D, D), descending; squares of singular values."""
    return torch.linalg.eigvalsh(gram)[..., -num_values:].flip(-1).clamp(min=0)


def effective_rank(squares: Tensor) -> Tensor:
    """exp of the entropy of singular values, of which these (..., R) are the squares.

    Of features as they are it is RankMe, with the constant that the paper adds to each share.
    """
    values = squares.sqrt()
    share = values / values.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(values.dtype).tiny) + _EPSILON
    return torch.special.entr(share).sum(dim=-1).exp()


def participation_ratio(eigenvalues: Tensor) -> float:
    """(sum l)^2 / sum l^2 of the eigenvalues (R,) of a covariance; 1 where nothing varies."""
    squares = float(eigenvalues.square().sum())
    return float(eigenvalues.sum()) ** 2 / squares if squares else 1.0


def power_law(eigenvalues: Tensor) -> float:
    """alpha of l_k ~ k^-alpha (alpha-ReQ, Agrawal et al. 2022), eigenvalues (R,) descending; about 1 is best.

    The slope of ln l over ln k between ranks 11 and 100, each weighted by 1 / k.
    """
    rank = torch.arange(FIRST_RANK, LAST_RANK + 1, dtype=torch.float64, device=eigenvalues.device)
    x, y = rank.log(), eigenvalues[FIRST_RANK - 1 : LAST_RANK].log()
    weight = (1 / rank) / (1 / rank).sum()
    x, y = x - (weight * x).sum(), y - (weight * y).sum()
    return -float((weight * x * y).sum() / (weight * x.square()).sum())


def spread(rows: Tensor) -> float:
    """Mean deviation of features of rows (n, D) of length 1, times sqrt(D): 1 of isotropic rows, 0 of equal ones."""
    return float(F.normalize(rows, dim=1).std(dim=0, correction=0).mean()) * rows.shape[1] ** 0.5


def uniformity(rows: Tensor) -> float:
    """ln of the mean of exp(-2 d^2) over pairs of different rows (n, D) of length 1; 0 of equal ones, down to -8."""
    distances = torch.pdist(F.normalize(rows, dim=1))
    return float(torch.exp(-2 * distances.square()).mean().log())
