"""Retrieval within the test images: each is a query once, and those of its class are to come before all others.

Ranked by cosine. Average precision is the area under the curve of precision over recall by the trapezoidal rule, as
Oxford5k, Paris6k and their revisited benchmark have it (Radenovic et al. 2018, arXiv:1803.11285), which is less than
the usual sum over steps. Nothing is chosen; the training images only standardise. Queries without another image of
their class are left out.

Legend: n images, Q queries, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, jackknife_interval
from evaluation.pooling import joined, standardised
from evaluation.protocol import EvaluationError

__all__ = ["average_precision", "score"]

CHUNK_ELEMENTS = 2**24  # similarities that are ranked at a time
RECALLS = (1, 5, 10)


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Ranks and measures; `seed` orders images that are equally similar and, of very many, draws the queries.

    Raises:
        EvaluationError: no class has two test images.
    """
    order = torch.randperm(len(test.labels), generator=torch.Generator().manual_seed(seed))
    labels = test.labels[order]
    of_class = torch.bincount(labels)[labels]
    queries = (of_class > 1).nonzero().flatten()[: params["max_queries"]]  # (Q,)
    if not len(queries):
        raise EvaluationError("retrieval needs a class with at least 2 test images, and there is none")
    _, standard = standardised(joined(train), joined(test))
    precision, first = _ranked(standard[order].to(device), labels.to(device), queries.to(device))
    metrics = {"map_trapz": float(precision.mean())}
    metrics |= {f"recall_{k}": float((first < k).double().mean()) for k in RECALLS}
    for name, rows in (("cls", test.cls), ("patch_mean", test.patch_mean)):
        if rows is not None:
            alone, _ = _ranked(rows[order].to(device), labels.to(device), queries.to(device))
            metrics[f"map_trapz_{name}"] = float(alone.mean())
    counts = torch.stack((precision, torch.ones_like(precision)), dim=1)  # (Q, 2)
    low, high = jackknife_interval(counts, lambda sums: sums[..., 0] / sums[..., 1])
    in_order = precision[order.argsort()] if len(queries) == len(order) else None  # of all images, or of none
    return Outcome(
        metrics={**metrics, "map_trapz_ci_low": low, "map_trapz_ci_high": high},
        details={
            "num_scored": len(queries),
            "chance": float(((of_class[queries] - 1) / (len(labels) - 1)).mean()),  # share of others of the class
        },
        per_sample=in_order,
    )


def _ranked(rows: Tensor, labels: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Average precision (Q,) float64 and place of the first image of the class (Q,), from 0; both on the CPU.

    Args:
        rows: features (n, D); labels: (n,); queries: (Q,) which of them.
    """
    rows = F.normalize(rows.float(), dim=1)
    precision, first = [], []
    for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(rows))):
        similarity = rows[chunk] @ rows.T  # (q, n)
        similarity[torch.arange(len(chunk), device=rows.device), chunk] = -torch.inf  # itself, last
        ranking = similarity.sort(dim=1, descending=True, stable=True).indices[:, :-1]
        is_relevant = labels[ranking] == labels[chunk, None]  # (q, n - 1)
        precision.append(average_precision(is_relevant).cpu())
        first.append(is_relevant.int().argmax(dim=1).cpu())
    return torch.cat(precision), torch.cat(first)


def average_precision(is_relevant: Tensor) -> Tensor:
    """Trapezoidal area (Q,) float64 under precision over recall.

    Args:
        is_relevant: (Q, places) bool in the order of the ranking, at least one True in each row.
    """
    found = is_relevant.cumsum(dim=1).double()  # relevant ones up to and including each place
    before = torch.arange(is_relevant.shape[1], dtype=torch.float64, device=is_relevant.device)  # places before each
    precision_before = torch.where(before > 0, (found - 1) / before.clamp(min=1), 1)  # when this one is relevant
    heights = (precision_before + found / (before + 1)) / 2
    return (heights * is_relevant).sum(dim=1) / found[:, -1]
