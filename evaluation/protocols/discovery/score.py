"""Unsupervised object discovery (TokenCut, Wang et al. 2022, arXiv:2202.11539): one box per image, without any label.

Patches are compared by the keys of the last attention layer, all heads side by side and without prefix tokens; by patch
tokens after the final norm where an encoder has no such keys. A normalized cut (`cut`) splits the patches in two, and
what hangs together around the patch that stands out most is the object. CorLoc is the share of images whose box has an
IoU of at least 0.5 with the box of one of the true objects, which are connected regions of a class but class 0, the
ground; TokenCut's own IoU makes a miss of 0.5. Images without an object are not scored, and nothing is fitted.

What was found is scored as a map of salient objects as well, against all objects of an image together: IoU, the share
of right pixels, and F = 1.3 precision recall / (0.3 precision + recall), means over images. A mask is right or wrong at
every threshold alike, so this F is also the greatest over thresholds, which is reported of maps with shades.

A cosine above 0.2 is an edge. Features with a large common part have edges everywhere (`edge_density` near 1), and
nothing to cut along: the same without their mean over the image stands beside it. So does the box around everything.

Legend: n images, B batch, N patches, (h, w) patch grid, (H, W) label map, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from backbones.encoder import Encoder
from evaluation.data import IGNORED
from evaluation.extraction.forward import Taken
from evaluation.extraction.frozen import Frozen
from evaluation.metrics import Outcome, jackknife_interval, wilson_interval
from evaluation.protocol import EvaluationError
from evaluation.protocols.discovery.cut import normalized_cut
from evaluation.protocols.label_maps import nearest
from evaluation.selection import blocks_named, blocks_of

__all__ = ["box_iou", "box_of", "object_boxes", "score"]

_BETA2 = 0.3  # of F: precision counts for more than recall
_SCORES = ("corloc", "mask_iou", "mask_accuracy", "mask_f")
_OTHERS = ("_centered", "_tokens")  # what metrics and taken arrays of other features are called behind their name


def score(
    train: Frozen, test: Frozen, *, num_classes: int, params: Mapping[str, Any], seed: int, device: torch.device
) -> Outcome:
    """Cuts the test images; training images, the number of classes and `seed` decide nothing here.

    Raises:
        EvaluationError: no test image has an object.
    """
    taken = test.measure(partial(_cuts, test.encoder, params["tau"], params["eps"]))
    sorts = ["", *(name for name in _OTHERS if f"found{name}" in taken)]
    maps: Any = test.labels
    rows, sequences, scored = [], [], []
    for sample_idx in range(len(test)):
        truth, sequence = maps.read(sample_idx)
        boxes = object_boxes(truth)
        if not len(boxes):
            continue
        guesses = [taken[f"found{name}"][sample_idx].numpy() for name in sorts] + [np.ones((1, 1), bool)]
        rows.append([_compared(nearest(guess, truth.shape), truth, boxes, params["least_iou"]) for guess in guesses])
        sequences.append(sequence)
        scored.append(sample_idx)
    if not rows:
        raise EvaluationError("no test image has an object: every label is class 0, the ground, or ignore_index")
    found = torch.tensor(rows, dtype=torch.float64)  # (n, sorts and the whole image, scores)
    metrics: dict[str, float] = {}
    for name, values in zip([*sorts, "_whole_image"], found.mean(dim=0).tolist(), strict=True):
        metrics |= {f"{score}{name}": value for score, value in zip(_SCORES, values, strict=True)}
    hits = found[:, 0, 0]
    groups = blocks_of(sequences)
    if groups is None:
        low, high = wilson_interval(float(hits.sum()), len(hits))
    else:
        counted = torch.stack([hits, torch.ones_like(hits)], dim=1)
        low, high = jackknife_interval(counted, lambda sums: sums[..., 0] / sums[..., 1], groups)
    density = {name: float(taken[f"edge_density{name}"][scored].mean()) for name in sorts}
    return Outcome(
        metrics={**metrics, "corloc_ci_low": low, "corloc_ci_high": high, "edge_density": density[""]},
        details={
            "features": "keys of the last attention layer" if "_tokens" in sorts else "patch tokens",
            **{f"edge_density{name}": density[name] for name in sorts[1:]},
            "num_scored": len(hits),
            "interval_over": blocks_named(groups),
            "patch_grid": list(taken["found"].shape[1:]),
        },
        per_sample=hits.bool(),
        groups=groups,
    )


def _cuts(encoder: Encoder, tau: float, eps: float, batch: Tensor, _: range) -> Taken:
    """`found` (B, h, w) and `edge_density` (B,), and the same of other features by longer names."""
    from backbones.images.base import ImageEncoder  # here, for timm takes seconds to import

    features = encoder.tokens(batch)
    if features.grid is None:
        raise EvaluationError("the backbone has no grid of patches to find objects on")
    keys = encoder.last_keys(encoder.preprocess(batch)) if isinstance(encoder, ImageEncoder) else None
    used = features.tokens if keys is None else keys  # (B, N, D)
    sorts = {"": used, "_centered": used - used.mean(dim=1, keepdim=True)}
    if keys is not None:
        sorts["_tokens"] = features.tokens
    taken: Taken = {}
    for name, vectors in sorts.items():
        images = vectors.double().cpu().numpy()
        cuts = [normalized_cut(image, features.grid, tau=tau, eps=eps) for image in images]
        taken[f"found{name}"] = torch.from_numpy(np.stack([cut.found for cut in cuts]))
        taken[f"edge_density{name}"] = torch.tensor([cut.edge_density for cut in cuts])
    return taken


def _compared(
    guess: npt.NDArray[np.bool_], truth: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64], least_iou: float
) -> tuple[float, float, float, float]:
    """`_SCORES` of a mask `guess` (H, W): whether the box around it is that of an object; the mask and all objects."""
    hit = box_iou(box_of(guess), boxes).max() >= least_iou
    is_object, counts = truth > 0, truth != IGNORED
    shared, found, true = (guess & is_object).sum(), (guess & counts).sum(), is_object.sum()
    right = ((guess == is_object) & counts).sum() / counts.sum()
    # Precision is shared / found and recall shared / true, of which F is this.
    f = (1 + _BETA2) * shared / (_BETA2 * true + found)
    return float(hit), float(shared / (found + true - shared)), float(right), float(f)


def object_boxes(labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Boxes (n, 4) around the connected regions of each class but 0, as `box_of` gives them, of a map (H, W)."""
    from scipy.ndimage import find_objects, label

    boxes = []
    for value in np.unique(labels[labels > 0]):
        regions, _ = label(labels == value, structure=np.ones((3, 3)))  # diagonal neighbours belong together
        boxes += [(x.start, y.start, x.stop, y.stop) for y, x in find_objects(regions)]
    return np.array(boxes, np.int64).reshape(-1, 4)


def box_of(mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """(4,) x and y of the first pixel, and x and y behind the last, of a mask (H, W) that is not empty."""
    rows, columns = np.nonzero(mask)
    return np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])


def box_iou(box: npt.NDArray[np.int64], boxes: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Intersection over union (n,) of a box (4,) with `boxes` (n, 4)."""
    sides = np.minimum(box[2:], boxes[:, 2:]) - np.maximum(box[:2], boxes[:, :2])  # (n, 2)
    shared = sides.clip(0).prod(axis=1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) + (box[2:] - box[:2]).prod()
    overlap: npt.NDArray[np.float64] = shared / (areas - shared)
    return overlap
