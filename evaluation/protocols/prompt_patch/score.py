"""One patch as a prompt for the region that it lies in, and how patches of a region differ from others.

After Masked Momentum Contrastive learning (Wu et al. 2023, arXiv:2308.11448), by definitions of our own. A region is
what hangs together of one class, class 0 included; a patch belongs to it if at least half of its pixels do. The
headline needs no threshold: AUROC of the cosine between two patches of an image, of pairs in one region against pairs
of different classes. Pairs of two regions of one class count as neither, since a map of classes does not say whether
they are one thing. For each region of at least four patches, the patch at its medoid is the prompt: patches at least as
similar to it as a threshold are its mask. The threshold is chosen on training images; nothing else is fitted. Beside it
stands that of Otsu (1979), which parts the similarities to each prompt in two without any other image.

Means of AUROC and of cosines are over images, those of IoU over regions. Beside them stands the AUROC of how near two
patches are, without a look at any image.

Legend: n images, (h, w) patch grid, N = h w patches, (H, W) label map, R regions, T thresholds, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.data import IGNORED, LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome, jackknife_interval
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import patch_counts
from evaluation.protocols.linear_maps import upsampled
from evaluation.selection import blocks_named, blocks_of, by_setting, choose_cell

__all__ = ["Regions", "medoid", "otsu", "pair_scores", "prompt_ious", "regions_of", "score"]


def score(
    train: Dense[LabelMaps],
    test: Dense[LabelMaps],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Chooses the threshold on `train` and measures `test`; the number of classes and `seed` decide nothing here.

    Raises:
        EvaluationError: there is no region to prompt in either split, or no pair of different classes.
    """
    num_chosen_on = min(params["train_images"], len(train.labels))
    chosen_on = np.linspace(0, len(train.labels) - 1, num_chosen_on).round().astype(int).tolist()
    val = _measured(train, chosen_on, params, None, f"{num_chosen_on} training images")
    val_iou = val.iou.sum(dim=0) / val.num_prompts.sum()  # (T,)
    cell, at_edge = choose_cell(val_iou, torch.zeros_like(val_iou))
    threshold = params["thresholds"][cell]
    found = _measured(test, range(len(test.labels)), params, threshold, f"{len(test.labels)} test images")

    is_scored = found.pairs.isfinite().all(dim=1)
    names = [name for name, scored in zip(found.sequences, is_scored.tolist(), strict=True) if scored]
    groups = blocks_of(names)
    of_images = found.pairs[is_scored, 0]
    counted = torch.stack([of_images, torch.ones_like(of_images)], dim=1)
    low, high = jackknife_interval(counted, lambda sums: sums[..., 0] / sums[..., 1], groups)
    auroc, auroc_position, intra, inter = found.pairs[is_scored].mean(dim=0).tolist()
    num_prompts = found.num_prompts.sum()
    iou = found.iou.sum(dim=0) / num_prompts  # (T,)
    return Outcome(
        metrics={
            "auroc": auroc,
            "auroc_ci_low": low,
            "auroc_ci_high": high,
            "val_auroc": float(val.pairs[:, 0].nanmean()),
            "intra": intra,
            "inter": inter,
            "iou": float(iou[cell]),
            "iou_pixels": float(found.iou_pixels.sum() / num_prompts),
            "iou_oracle": float(found.iou_oracle.sum() / num_prompts),
            "iou_otsu": float(found.iou_otsu.sum() / num_prompts),
            "val_iou": float(val_iou[cell]),
            "auroc_position": auroc_position,
        },
        details={
            "threshold": threshold,
            "at_grid_edge": at_edge,
            "val_iou_by_threshold": by_setting(params["thresholds"], val_iou),
            "iou_by_threshold": by_setting(params["thresholds"], iou),
            "num_prompts": int(num_prompts),
            "num_scored": int(is_scored.sum()),
            "interval_over": blocks_named(groups),
            "patch_grid": list(test.patches.shape[1:3]),
        },
        per_sample=of_images,
        groups=groups,
    )


class _Measured(NamedTuple):
    """Of each image of a split."""

    pairs: Tensor  # (n, 4) AUROC, that of positions, mean cosine within and between; NaN where there are no such pairs
    num_prompts: Tensor  # (n,)
    iou: Tensor  # (n, T), sums over the prompts, as all below
    iou_oracle: Tensor  # (n,)
    iou_pixels: Tensor  # (n,), zeros without a threshold
    iou_otsu: Tensor  # (n,)
    sequences: list[str | None]


def _measured(
    split: Dense[LabelMaps], numbers: Iterable[int], params: Mapping[str, Any], threshold: float | None, noun: str
) -> _Measured:
    pairs, prompts, sequences = [], [], []
    for sample_idx in numbers:
        labels, sequence = split.labels.read(sample_idx)
        tokens = torch.from_numpy(np.array(split.patches[sample_idx])).double()  # (h, w, D)
        regions = regions_of(labels, tokens.shape[:2], params["least_share"])
        unit = F.normalize(tokens.flatten(0, 1), dim=1)
        cosine = unit @ unit.T  # (N, N)
        pairs.append(pair_scores(cosine, regions))
        prompts.append(_of_prompts(cosine, regions, params, threshold))
        sequences.append(sequence)
    of_prompts = torch.stack(prompts)  # (n, 4 + T)
    num_prompts, oracle, by_pixels, at_otsu = of_prompts[:, :4].unbind(dim=1)
    found = _Measured(torch.tensor(pairs), num_prompts, of_prompts[:, 4:], oracle, by_pixels, at_otsu, sequences)
    if not found.num_prompts.any():
        raise EvaluationError(
            f"no region of {params['least_patches']} patches in {noun}; a larger image_size has more patches"
        )
    if not found.pairs.isfinite().all(dim=1).any():
        raise EvaluationError(f"no image with patches of two classes in {noun}; a larger image_size has more patches")
    return found


class Regions(NamedTuple):
    """What hangs together of one class."""

    pixels: npt.NDArray[np.int64]  # (H, W) number of the region, `IGNORED` where ignored
    patches: Tensor  # (h, w) number of the region of a patch, `IGNORED` where it belongs to none
    is_void: Tensor  # (h, w) bool: most pixels are ignored
    classes: Tensor  # (R,)


def regions_of(labels: npt.NDArray[np.int64], grid: tuple[int, ...], least_share: float) -> Regions:
    """The regions of a label map (H, W), numbered by class; diagonal neighbours hang together.

    Args:
        least_share: of the pixels of a patch that belongs to a region; of two equal shares the first counts.
    """
    from scipy.ndimage import label

    numbers = np.full(labels.shape, IGNORED, np.int64)
    classes: list[int] = []
    for value in np.unique(labels[labels != IGNORED]).tolist():
        parts, num_parts = label(labels == value, structure=np.ones((3, 3)))
        numbers[parts > 0] = parts[parts > 0] - 1 + len(classes)
        classes += [value] * num_parts
    counts = patch_counts(numbers, grid, max(1, len(classes)))  # (h, w, 1 + R)
    num_pixels = counts.sum(dim=2)
    most = counts[..., 1:].max(dim=2)
    belongs = most.values >= least_share * num_pixels
    is_void = 2 * counts[..., 0] > num_pixels
    return Regions(numbers, most.indices.where(belongs, IGNORED), is_void, torch.tensor(classes))


def pair_scores(cosine: Tensor, regions: Regions) -> tuple[float, float, float, float]:
    """AUROC of the cosine (N, N), AUROC of nearness, and the mean cosine in one region and of different classes.

    Pairs are of two patches that belong to regions. All NaN if there are none of one sort or the other.
    """
    from sklearn.metrics import roc_auc_score

    region = regions.patches.flatten()
    num_patches, columns = region.shape[0], regions.patches.shape[1]
    member = (region != IGNORED).nonzero()[:, 0]
    first, second = member[torch.triu_indices(len(member), len(member), offset=1)]  # (pairs,)
    is_same = region[first] == region[second]
    differs = regions.classes[region[first]] != regions.classes[region[second]]
    if not is_same.any() or not differs.any():
        return (float("nan"),) * 4
    number = torch.arange(num_patches)
    place = torch.stack([number // columns, number % columns], dim=1).double()  # (N, 2)
    alike, near = cosine[first, second], -(place[first] - place[second]).norm(dim=1)
    counts = is_same | differs
    auroc, auroc_position = (float(roc_auc_score(is_same[counts], value[counts])) for value in (alike, near))
    return auroc, auroc_position, float(alike[is_same].mean()), float(alike[differs].mean())


def _of_prompts(cosine: Tensor, regions: Regions, params: Mapping[str, Any], threshold: float | None) -> Tensor:
    """(4 + T,) float64: how many prompts, and sums of IoU: at the best threshold, by pixels, at Otsu's, at each."""
    sums = torch.zeros(4 + len(params["thresholds"]), dtype=torch.float64)
    size = torch.bincount(regions.patches[regions.patches != IGNORED], minlength=len(regions.classes))
    for number in (size >= params["least_patches"]).nonzero()[:, 0].tolist():
        row, column = medoid(regions.patches == number)
        alike = cosine[row * regions.patches.shape[1] + column].view(regions.patches.shape)  # (h, w)
        is_region, counts = regions.patches == number, ~regions.is_void
        iou = prompt_ious(alike, is_region, counts, params["thresholds"])
        at_otsu = prompt_ious(alike, is_region, counts, [otsu(alike[counts])])
        by_pixels = iou.new_zeros(1)
        if threshold is not None:
            pixels = torch.from_numpy(regions.pixels)
            finer = upsampled(alike[None, None], pixels.shape)[0, 0]
            by_pixels = prompt_ious(finer, pixels == number, pixels != IGNORED, [threshold])
        sums += torch.cat([iou.new_ones(1), iou.max()[None], by_pixels, at_otsu, iou])
    return sums


def medoid(mask: Tensor) -> tuple[int, int]:
    """(row, column) of the place in a mask (h, w) that is nearest to all of its places; of equal ones the first."""
    places = mask.nonzero().double()  # (m, 2)
    row, column = places[torch.cdist(places, places).sum(dim=1).round(decimals=6).argmin()].long().tolist()
    return row, column


def otsu(values: Tensor) -> float:
    """The least of the upper ones where values (n,) part in two with the greatest variance between the parts.

    Of values that are all equal there are no parts, and all are upper ones.
    """
    ascending = values.double().sort().values
    below = torch.arange(1, len(ascending), dtype=torch.float64)  # how many are lower ones, for each place to part
    above, sums = len(ascending) - below, ascending.cumsum(dim=0)
    apart = (sums[-1] - sums[:-1]) / above - sums[:-1] / below
    between = torch.where(ascending[1:] > ascending[:-1], below * above * apart.square(), 0)
    return float(ascending[1 + int(between.argmax())] if between.any() else ascending[0])


def prompt_ious(alike: Tensor, is_region: Tensor, counts: Tensor, thresholds: Sequence[float]) -> Tensor:
    """IoU (T,) float64 of a region with what is at least as similar to its prompt as each threshold.

    Args:
        alike: (...), cosine to the prompt.
        is_region: (...) bool.
        counts: (...) bool, what is compared, all of the region among it.
    """
    masks = torch.stack([alike >= threshold for threshold in thresholds]) & counts  # (T, ...)
    shared, union = ((found.flatten(1).sum(dim=1)) for found in (masks & is_region, masks | is_region))
    return shared.double() / union.clamp(min=1)
