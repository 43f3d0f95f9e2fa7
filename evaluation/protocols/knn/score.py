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
from evaluation.pooling import joined, standardised
from evaluation.selection import spread

__all__ = ["nearest", "score", "vote"]

TIE = 1e-6  # similarities closer than this are equal: float32 dot products of equal rows differ by less
CHUNK_ELEMENTS = 2**25  # size of one similarity block
NUM_ASKED, NUM_NEAREST = 6, 5  # test images, and the neighbors of each, that are kept for a picture


def score(
    train: Pooled, test: Pooled, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Tests standardised [CLS, mean of patches], and either as it is beside it; `seed` decides nothing here."""
    ks = sorted({params["k"], *params["diagnostic_ks"]})
    labels = test.labels
    features = {"joined": standardised(joined(train), joined(test)), "patch_mean": (train.patch_mean, test.patch_mean)}
    if train.cls is not None and test.cls is not None:
        features["cls"] = (train.cls, test.cls)
    settings: dict[str, Any] = {"num_classes": num_classes, "ks": ks, "temperature": params["temperature"]}
    votes = {
        name: vote(bank, train.labels, queries, **settings, device=device) for name, (bank, queries) in features.items()
    }
    accuracy = {
        name: {k: float((shares.argmax(dim=1) == labels).double().mean()) for k, shares in by_k.items()}
        for name, by_k in votes.items()
    }
    headline = votes["joined"][params["k"]]
    predicted = headline.argmax(dim=1)
    asked = torch.tensor(spread(len(labels), NUM_ASKED))
    bank, queries = features["joined"]
    return Outcome(
        metrics={
            **top1_metrics(predicted, labels, num_classes),
            **{f"top1_{name}": by_k[params["k"]] for name, by_k in accuracy.items() if name != "joined"},
        },
        details={
            "k": min(params["k"], len(train.labels)),
            "top1_by_k": {name: {str(k): value for k, value in by_k.items()} for name, by_k in accuracy.items()},
            **({"top5": top_k_accuracy(headline, labels, 5)} if num_classes > 5 else {}),
        },
        per_sample=predicted == labels,
        shown={
            "predicted": predicted.int(),
            "labels": labels.int(),
            "asked": asked,
            "neighbors": nearest(bank.to(device), queries[asked.to(queries.device)].to(device), NUM_NEAREST),
        },
    )


def nearest(bank: Tensor, queries: Tensor, number: int) -> Tensor:
    """Rows of `bank` (B, D) with the highest cosine to each of `queries` (Q, D), the nearest first: (Q, number).

    Of a bank with fewer rows all are there.
    """
    similarity = F.normalize(queries.float(), dim=1) @ F.normalize(bank.float(), dim=1).T  # (Q, B)
    return similarity.topk(min(number, len(bank)), dim=1).indices


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
