"""Nearest-class-mean classification of frozen features, and how many directions the features use.

Legend: n rows of a split, D width, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from evaluation.extraction.images import Pooled
from evaluation.metrics import Outcome, wilson_interval

__all__ = ["score"]


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Metrics are fractions in [0, 1] under the names that the protocol registers; `seed` decides nothing here.

    "rank_share" needs no labels: exp(entropy of the singular values) of the test features (RankMe, arXiv:2210.02885),
    as a share of the highest possible rank. Features that have collapsed use few directions.
    """
    mean, std = train.patch_mean.mean(0), train.patch_mean.std(0) + params["eps"]  # (D,)
    rows, queries = ((split.patch_mean.to(device) - mean.to(device)) / std.to(device) for split in (train, test))
    labels = train.labels.to(device)
    sums = rows.new_zeros(num_classes, rows.shape[1]).index_add(0, labels, functional.normalize(rows))  # (K, D)
    similarity = queries @ functional.normalize(sums).T  # (n, K)
    similarity[:, torch.bincount(labels, minlength=num_classes) == 0] = -torch.inf  # classes without a training image
    predicted = similarity.argmax(1).cpu()

    correct, total = int((predicted == test.labels).sum()), len(test.labels)
    low, high = wilson_interval(correct, total)
    return Outcome(
        metrics={
            "top1": correct / total,
            "top1_ci_low": low,
            "top1_ci_high": high,
            "rank_share": _effective_rank(queries) / min(queries.shape),
        },
        details={"correct": correct},
    )


def _effective_rank(rows: Tensor) -> float:
    singular = torch.linalg.svdvals(rows.double())  # (min(n, D),)
    share = singular / singular.sum()
    return float(torch.special.entr(share).sum().exp())
