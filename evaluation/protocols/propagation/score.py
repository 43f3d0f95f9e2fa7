"""Video object segmentation by propagation of labels, as DINO's on DAVIS (Caron et al. 2021, arXiv:2104.14294).

The context of a frame is the first one, whose labels are given, and the last seven, as they were labelled. Each patch
takes the soft labels of the five patches of the context that are most similar by cosine, of those at most 12 patches
away along either axis, weighted exp(cosine / 0.1). Maps are upsampled bilinearly to the size of the labels, each class
brought to [0, 1] over the frame, and the greatest is the label. Nothing is trained or chosen. Unlike DINO's, the labels
of the first frame are shares of the pixels of a patch: thin things do not vanish from the start.

Objects are the classes of the first frame but class 0, the ground, which is carried along and not scored. J is the IoU
of an object in a frame, 1 if it is neither there nor predicted; F is the F1 score of its boundary, up to 0.008 of the
diagonal. The first and the last frame do not count. Means are over frames, then over the objects of all sequences, as
DAVIS 2017 has them. Beside them stands what the labels of the first frame get if they stay as they are.

Legend: (h, w) patch grid, N = h w patches, (H, W) label map, M classes of the first frame, F frames of the context,
D width.
"""

from __future__ import annotations

import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import IGNORED, LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome, jackknife_interval
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import nearest, patch_counts
from evaluation.protocols.linear_maps import upsampled
from evaluation.protocols.propagation.measures import boundary_f, region_iou

__all__ = ["hardened", "neighbors", "propagated", "score"]

CHUNK_ELEMENTS = 2**24  # size of one block of similarities


def score(
    train: Dense[LabelMaps],
    test: Dense[LabelMaps],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Follows the objects of the test videos; the training images and `seed` decide nothing here.

    Raises:
        EvaluationError: no sequence of three frames or more is named, or none begins with an object.
    """
    videos = {name: frames for name, frames in _videos(test.labels).items() if len(frames) > 2}
    if not videos:
        raise EvaluationError(
            "propagation follows objects through videos of at least 3 frames, and the test images are none: "
            "splits.test.sequences of dataset.json names them, {sequence: [sample key, ...]}"
        )
    grid = test.patches.shape[1:3]
    is_near = neighbors(grid, params["radius"], params["neighborhood"]).to(device)  # (N, N)
    found = {name: _follow(test, frames, is_near, num_classes, params, device) for name, frames in videos.items()}
    found = {name: rows for name, rows in found.items() if len(rows)}
    if not found:
        raise EvaluationError("no first frame of a video has an object: all is class 0, the ground, or ignore_index")
    objects = torch.cat(list(found.values()))  # (objects, 4)
    j, f, j_static, f_static = objects.mean(dim=0).tolist()
    jf = objects[:, :2].mean(dim=1)
    groups = torch.arange(len(found)).repeat_interleave(torch.tensor([len(rows) for rows in found.values()]))
    counted = torch.stack([jf, torch.ones_like(jf)], dim=1)
    low, high = jackknife_interval(counted, lambda sums: sums[..., 0] / sums[..., 1], groups)
    return Outcome(
        metrics={
            "jf": (j + f) / 2,
            "jf_ci_low": low,
            "jf_ci_high": high,
            "j": j,
            "f": f,
            "jf_static": (j_static + f_static) / 2,
        },
        details={
            "jf_by_sequence": {name: float(rows[:, :2].mean()) for name, rows in found.items()},
            "num_objects": len(objects),
            "num_scored": sum(len(videos[name]) - 2 for name in found),
            "interval_over": f"{len(found)} sequences",
            "patch_grid": list(grid),
        },
        per_sample=jf,
        groups=groups,
    )


def _videos(maps: LabelMaps) -> dict[str, list[int]]:
    """Numbers of the samples of each sequence, in the order of their keys: frame_9 comes before frame_10."""
    videos: dict[str, list[tuple[list[str | int], int]]] = {}
    for sample_idx in range(len(maps)):
        key, sequence = maps.name_of(sample_idx)
        if sequence is not None:
            parts = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", key)]  # text, number, ...
            videos.setdefault(sequence, []).append((parts, sample_idx))
    return {sequence: [sample_idx for _, sample_idx in sorted(frames)] for sequence, frames in sorted(videos.items())}


def _follow(
    split: Dense[LabelMaps],
    frames: Sequence[int],
    is_near: Tensor,
    num_classes: int,
    params: Mapping[str, Any],
    device: torch.device,
) -> Tensor:
    """J and F, and both of the labels of the first frame, (objects, 4) float64: means over the frames that count."""
    first_labels, _ = split.labels.read(frames[0])
    classes = np.unique(first_labels[first_labels != IGNORED])
    objects = classes[classes > 0]
    if not len(objects):
        return torch.empty(0, 4, dtype=torch.float64)
    grid = split.patches.shape[1:3]
    counts = patch_counts(first_labels, grid, num_classes).flatten(0, 1)[:, 1 + torch.from_numpy(classes)]  # (N, M)
    tokens, masks = _unit(split, frames[0], device), F.normalize(counts.float(), p=1, dim=1).to(device)
    first, last = (tokens, masks), deque[tuple[Tensor, Tensor]](maxlen=params["last_frames"])
    found = []
    for sample_idx in frames[1:-1]:
        context_tokens, context_masks = (torch.stack(parts) for parts in zip(first, *last, strict=True))
        tokens = _unit(split, sample_idx, device)
        masks = propagated(
            context_tokens, context_masks, tokens, is_near, top_k=params["top_k"], temperature=params["temperature"]
        )
        last.append((tokens, masks))
        labels, _ = split.labels.read(sample_idx)
        predicted = classes[hardened(masks.cpu().T.unflatten(1, grid), labels.shape).numpy()]  # (H, W)
        static = nearest(first_labels, labels.shape)
        counted = labels != IGNORED
        radius = math.ceil(params["boundary"] * math.hypot(*labels.shape))
        row = []
        for number in objects:
            truth = labels == number
            for guess in ((predicted == number) & counted, (static == number) & counted):
                row += [region_iou(guess, truth), boundary_f(guess, truth, radius)]
        found.append(row)
    return torch.tensor(found, dtype=torch.float64).mean(dim=0).view(len(objects), 4)


def _unit(split: Dense[LabelMaps], sample_idx: int, device: torch.device) -> Tensor:
    """Patch tokens (N, D) of length 1."""
    tokens = torch.from_numpy(np.array(split.patches[sample_idx])).to(device).float()
    return F.normalize(tokens.flatten(0, 1), dim=1)


def neighbors(grid: Sequence[int], radius: int, shape: str) -> Tensor:
    """Which patches are at most `radius` apart, (N, N) bool: in a "square" along either axis, or in a "circle"."""
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in grid), indexing="ij")
    place = torch.stack([rows.flatten(), columns.flatten()], dim=1).float()  # (N, 2)
    return torch.cdist(place, place, p={"square": torch.inf, "circle": 2.0}[shape]) <= radius


def propagated(
    context: Tensor, masks: Tensor, tokens: Tensor, is_near: Tensor, *, top_k: int, temperature: float
) -> Tensor:
    """Soft labels (N, M) of a frame.

    Args:
        context: (F, N, D) tokens of length 1 of the frames whose labels are known.
        masks: (F, N, M) these labels.
        tokens: (N, D) of length 1.
        is_near: (N, N) bool, which patches of each frame of the context a patch may take labels of.
        top_k: how many it takes them of; those that tie with the last of them count as well.
    """
    bank, labels = context.flatten(0, 1), masks.flatten(0, 1)  # (F N, D), (F N, M)
    found = []
    for rows in torch.arange(len(tokens)).split(max(1, CHUNK_ELEMENTS // len(bank))):
        similarity = tokens[rows] @ bank.T  # (q, F N)
        similarity = similarity.masked_fill(~is_near[rows].repeat(1, len(context)), -torch.inf)
        least = similarity.topk(min(top_k, len(bank)), dim=1).values[:, -1:]
        weights = (similarity / temperature).masked_fill(similarity < least, -torch.inf).softmax(dim=1)
        found.append(weights @ labels)
    return torch.cat(found)


def hardened(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Which of soft masks (M, h, w) is greatest, (H, W), once each has been brought to [0, 1] over the frame."""
    finer = upsampled(masks[None], size)[0]  # (M, H, W)
    low, high = (bound.view(-1, 1, 1) for bound in finer.flatten(1).aminmax(dim=1))
    spread = high - low
    return ((finer - low) / spread.where(spread > 0, 1)).argmax(dim=0)
