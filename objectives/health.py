"""Label-free signs of health that objectives log: is there still something in the features?

All take tensors of one micro-batch on one rank, compute in float32 at least, and give no gradient. NOT here: what
counts as a collapse (`Objective.diagnose` of each objective).

Legend: B batch, n rows (such as images), N patch tokens, D width, K prototypes.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from backbones.precision import at_least_float32

__all__ = ["effective_rank", "entropy", "patch_cosine", "projection_std", "used_share"]

_MAX_ROWS = 256  # the eigenvalues of a 256 x 256 matrix take 10 ms of a CPU core
_RANKME_EPS = 1e-7


@torch.no_grad()
def effective_rank(features: Tensor) -> Tensor:
    """RankMe: exp(entropy of the singular values), which is how many directions the features use.

    Garrido et al. 2023, arXiv:2210.02885, equation 1: p_k = s_k / sum(s) + 1e-7, features not centerd. The value grows
    with the number of rows, so compare it at one batch size only; with more than 256 rows, the first 256 count.

    Args:
        features: (n, D).

    Returns:
        Scalar in 1 .. min(n, D): 1 when all rows point the same way; nan when a feature is not finite.
    """
    with torch.autocast(features.device.type, enabled=False):
        # Float64, because the squares in the Gram matrix take half of the digits.
        rows = features[:_MAX_ROWS].double()
        gram = rows @ rows.T if len(rows) <= rows.shape[1] else rows.T @ rows
        is_finite = gram.isfinite().all()
        singular = torch.linalg.eigvalsh(gram.where(is_finite, 0)).clamp_min(0).sqrt()  # (min(n, D),); raises on nan
        share = singular / singular.sum().clamp_min(1e-30) + _RANKME_EPS
        return entropy(share).exp().float().where(is_finite, torch.nan)


@torch.no_grad()
def patch_cosine(patches: Tensor) -> Tensor:
    """Mean cosine between different patch tokens of an image: near 1, an image's patches all look the same.

    Args:
        patches: (B, N, D).

    Returns:
        Scalar in -1 .. 1; 0 when there is one patch only.
    """
    unit = functional.normalize(patches.float(), dim=-1)
    num_patches = unit.shape[1]
    # |sum u|^2 holds every pair twice and each token with itself once.
    pairs = unit.sum(1).square().sum(-1) - unit.square().sum((1, 2))  # (B,)
    return (pairs / max(1, num_patches * (num_patches - 1))).mean()


@torch.no_grad()
def entropy(probabilities: Tensor) -> Tensor:
    """Entropy in nats of distributions along the last dimension: (..., K) -> (...), in 0 .. ln K."""
    wide = at_least_float32(probabilities)
    return -torch.xlogy(wide, wide).sum(-1)


@torch.no_grad()
def used_share(scores: Tensor) -> Tensor:
    """Share of prototypes that are the best one of at least one row: (n, K) -> scalar, at most min(n, K) / K."""
    is_used = torch.zeros(scores.shape[-1], device=scores.device)
    return is_used.index_fill(0, scores.flatten(0, -2).argmax(-1), 1.0).mean()


@torch.no_grad()
def projection_std(projections: Tensor) -> Tensor:
    """Mean over dimensions of the deviation of l2-normalised rows; healthy near 1 / sqrt(D), collapsed near 0.

    Chen, He 2021 (SimSiam, arXiv:2011.10566), section 4.1.

    Args:
        projections: (n, D) with n > 1.
    """
    return functional.normalize(projections.float(), dim=-1).std(0).mean()
