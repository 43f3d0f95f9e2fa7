"""Segmentation in context (Hummingbird, Balazevic et al. 2023, arXiv:2306.01667): labels of the nearest patches.

A memory holds patch tokens of the training images, each with the shares of the classes in its pixels. A test patch gets
the mean of the shares of its nearest patches by cosine similarity, weighted exp(similarity / temperature); the map of
shares is upsampled bilinearly, and the greatest one is the label. The search is exact. Nothing is trained, and k and
the temperature are fixed in advance. Ignored pixels count in no share, and patches of little else are not remembered.

A memory that is smaller than the training set takes as many patches of each image, of those with rare classes rather
than of others, as the authors do: the score of a patch is a random number times the sum, over its classes, of how many
patches of the image have the class, and the lowest scores are taken. Not here, though it is in other programs: matching
predicted with true classes, which can only raise the score; training images seen several times through augmentation.

Legend: n images, (h, w) patch grid, (H, W) label map, M patches of the memory, Q queries, D width, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import (
    Outcome,
    confusion_matrix,
    iou_per_class,
    mean_iou,
    miou_metrics,
    tallies,
)
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import MajorityMap, patch_counts
from evaluation.protocols.linear_maps import upsampled
from evaluation.selection import blocks_named, blocks_of

__all__ = ["Memory", "remember", "retrieve", "score"]

TIE = 1e-6  # similarities closer than this are equal: float32 dot products of equal rows differ by less
CHUNK_ELEMENTS = 2**23  # size of one block of similarities


class Memory(NamedTuple):
    """Patches of training images."""

    tokens: Tensor  # (M, D) of length 1
    shares: Tensor  # (M, C) of the classes, rows summing to 1


def score(
    train: Dense[LabelMaps],
    test: Dense[LabelMaps],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Remembers the training patches and labels the test images; `seed` decides which patches fit into the memory."""
    memory, majority = remember(train, num_classes, params, seed)
    prior, sequences = majority.tested(test.labels)
    if not prior.any():
        raise EvaluationError("no labelled pixel in the test images: every label is ignore_index")
    memory = Memory(*(part.to(device) for part in memory))
    per_image = []
    for sample_idx in range(len(test.labels)):
        labels, _ = test.labels.read(sample_idx)
        truth = torch.from_numpy(labels).flatten()
        tokens = torch.from_numpy(np.array(test.patches[sample_idx])).float()  # (h, w, D)
        shares = retrieve(memory, tokens.flatten(0, 1), k=params["k"], temperature=params["temperature"])
        shares = shares.unflatten(0, tokens.shape[:2])  # (h, w, C)
        predicted = upsampled(shares.permute(2, 0, 1)[None], labels.shape)[0].argmax(dim=0)  # (H, W)
        per_image.append(confusion_matrix(predicted.flatten(), truth, num_classes))
    counts = torch.stack(per_image)  # (n, C, C)
    confusion = counts.sum(dim=0)
    groups = blocks_of(sequences)
    return Outcome(
        metrics={
            **miou_metrics(counts, groups),
            "miou_position_prior": mean_iou(prior.sum(dim=0)),
        },
        details={
            "k": min(params["k"], len(memory.tokens)),
            "memory": len(memory.tokens),
            "patches_of_train": math.prod(train.patches.shape[:3]),
            "patch_grid": list(train.patches.shape[1:3]),
            "interval_over": blocks_named(groups),
            "iou_per_class": [value if math.isfinite(value) else None for value in iou_per_class(confusion).tolist()],
        },
        per_sample=tallies(counts),
        groups=groups,
    )


def remember(
    train: Dense[LabelMaps], num_classes: int, params: Mapping[str, Any], seed: int
) -> tuple[Memory, MajorityMap]:
    """The memory, and the most frequent classes by position, from one pass over the labels.

    Args:
        params: memory, the most patches it holds; most_void, the share of ignored pixels that a patch of it may have.

    Raises:
        EvaluationError: no patch has enough labelled pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    num_images, grid = len(train.labels), train.patches.shape[1:3]
    per_image = max(1, params["memory"] // num_images)
    remembered = set(torch.randperm(num_images, generator=generator)[: params["memory"]].tolist())
    prior, tokens, shares = MajorityMap(num_classes), [], []
    for sample_idx in range(num_images):
        labels, _ = train.labels.read(sample_idx)
        prior.add(labels)
        if sample_idx in remembered:
            counts = patch_counts(labels, grid, num_classes).flatten(0, 1)  # (h * w, 1 + C)
            chosen = _balanced(counts, per_image, params["most_void"], generator)
            maps = torch.from_numpy(np.array(train.patches[sample_idx])).float().flatten(0, 1)
            tokens.append(F.normalize(maps[chosen], dim=1))
            shares.append(F.normalize(counts[chosen, 1:].float(), p=1, dim=1))
    memory = Memory(torch.cat(tokens), torch.cat(shares))
    if not len(memory.tokens):
        raise EvaluationError(
            f"no training patch to remember: more than {params['most_void']:.0%} of the pixels of every patch in the "
            f"{num_images} training images are ignore_index"
        )
    return memory, prior


def _balanced(counts: Tensor, num_chosen: int, most_void: float, generator: torch.Generator) -> Tensor:
    """Indices of at most so many patches of an image, in their order, of pixel counts (h * w, 1 + C)."""
    is_present = counts[:, 1:] > 0  # (h * w, C)
    commonness = (is_present * is_present.sum(dim=0)).sum(dim=1)
    order = (commonness * torch.rand(len(counts), generator=generator)).argsort()
    is_labelled = (counts[:, 0] <= most_void * counts.sum(dim=1)) & is_present.any(dim=1)
    return order[is_labelled[order]][:num_chosen].sort().values


def retrieve(memory: Memory, queries: Tensor, *, k: int, temperature: float) -> Tensor:
    """Weighted mean (Q, C), on the CPU, of the shares of the k patches nearest to each of `queries` (Q, D).

    Patches that tie with the k-th count as well, so that the order of the memory decides nothing. Rows sum to 1.
    """
    tokens, shares = memory
    found = []
    for chunk in queries.split(max(1, CHUNK_ELEMENTS // len(tokens))):
        similarity = F.normalize(chunk.to(tokens.device), dim=1) @ tokens.T  # (q, M)
        best = similarity.topk(min(k, len(tokens)), dim=1).values  # (q, k), descending
        weights = ((similarity - best[:, :1]) / temperature).exp()  # relative to the nearest: exp cannot overflow
        weights = weights.masked_fill(similarity < best[:, -1:] - TIE, 0)
        found.append((weights @ shares / weights.sum(dim=1, keepdim=True)).cpu())
    return torch.cat(found)
