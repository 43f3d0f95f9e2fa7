"""Weighted nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978; the vote of DINO).

The k training images with the highest cosine similarity vote with weight exp(similarity / temperature). k and the
temperature are fixed in advance; accuracies at other k are diagnostics and never the headline. Neighbours that tie with
the k-th all vote, so the order of the training images decides nothing; tied classes go to the lowest class id.

Legend: Q queries, B bank rows, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.metrics import Outcome, top1_metrics, top_k_accuracy

__all__ = ["score", "vote"]

TIE = 1e-6  # similarities closer than this are equal: float32 dot products of equal rows differ by less
CHUNK_ELEMENTS = 2**25  # size of one similarity block


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Tests the CLS token (the mean of patches where a backbone has no CLS); `seed` decides nothing here."""
    ks = sorted({params["k"], *params["diagnostic_ks"]})
    labels = test.labels
    predictions: dict[str, dict[int, Tensor]] = {}
    top5 = {}
    for token in ("cls", "patch_mean"):
        bank, queries = getattr(train, token), getattr(test, token)
        if bank is None:
            continue
        votes = vote(
            bank,
            train.labels,
            queries,
            num_classes=num_classes,
            ks=ks,
            temperature=params["temperature"],
            device=device,
        )
        predictions[token] = {k: vote_k.argmax(dim=1) for k, vote_k in votes.items()}  # each (Q,)
        top5[token] = top_k_accuracy(votes[params["k"]], labels, 5)
    headline = "cls" if "cls" in predictions else "patch_mean"
    predicted = predictions[headline][params["k"]]
    accuracy = {
        token: {k: float((p == labels).double().mean()) for k, p in by_k.items()} for token, by_k in predictions.items()
    }
    return Outcome(
        metrics={
            **top1_metrics(predicted, labels, num_classes),
            "top1_patch_mean": accuracy["patch_mean"][params["k"]],
        },
        details={
            "token": headline,
            "k": min(params["k"], len(train.labels)),
            "top1_by_k": {token: {str(k): value for k, value in by_k.items()} for token, by_k in accuracy.items()},
            **({"top5": top5[headline]} if num_classes > 5 else {}),
        },
    )


def vote(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    *,
    num_classes: int,
    ks: Sequence[int],
    temperature: float,
    device: torch.device | str = "cpu",
) -> dict[int, Tensor]:
    """Returns for each k in `ks` (clamped to the bank) the class shares (Q, C) float64, rows summing to 1."""
    bank = F.normalize(bank.to(device).float(), dim=1)  # (B, D)
    bank_labels = bank_labels.to(device)
    rows = max(1, CHUNK_ELEMENTS // len(bank))
    shares: dict[int, list[Tensor]] = {k: [] for k in ks}
    for chunk in queries.split(rows):
        similarity = F.normalize(chunk.to(device).float(), dim=1) @ bank.T  # (q, B)
        best = similarity.topk(min(max(ks), len(bank)), dim=1).values  # (q, max k), descending
        # The neighbours of the largest k, found once; those of each smaller k are among them.
        row, column = (similarity >= best[:, -1:] - TIE).nonzero(as_tuple=True)
        near, label = similarity[row, column], bank_labels[column]
        # relative to the best match: a common factor per query, and exp cannot overflow
        weight = torch.exp((near - best[row, 0]).double() / temperature)
        for k in ks:
            is_neighbour = near >= best[row, min(k, len(bank)) - 1] - TIE
            votes = torch.zeros(len(chunk), num_classes, dtype=torch.float64, device=device)
            votes.index_put_((row[is_neighbour], label[is_neighbour]), weight[is_neighbour], accumulate=True)
            shares[k].append((votes / votes.sum(dim=1, keepdim=True)).cpu())
    # rounding makes mathematically tied classes equal whatever the order of summation
    return {k: torch.cat(parts).round(decimals=9) for k, parts in shares.items()}
