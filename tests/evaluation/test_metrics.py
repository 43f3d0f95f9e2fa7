"""Metric formulas against golden values; the plausible wrong variants must not match."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.metrics import (
    confusion_matrix,
    iou_per_class,
    jackknife_interval,
    mean_class_accuracy,
    mean_iou,
    pixel_accuracy,
    top_k_accuracy,
    wilson_interval,
)

NUM_CLASSES = 6


@pytest.fixture(scope="module")
def maps() -> list[tuple[Tensor, Tensor]]:
    """(predicted, labels) of golden block C, ignored pixels -1."""
    y, x = np.mgrid[:24, :32]
    pairs = []
    for b in range(3):
        truth = (x // 8 + 2 * (y // 6) + b) % 4
        predicted = ((x + 2 + b) // 8 + 2 * ((y + 1) // 6) + b) % 4
        predicted[(x + 3 * y + 5 * b) % 29 == 0] = 4
        truth[(x * y + 7 * b) % 13 == 0] = 255
        if b == 1:
            truth[truth == 3] = 255
        truth[truth == 255] = -1
        pairs.append((torch.from_numpy(predicted).flatten(), torch.from_numpy(truth).flatten()))
    return pairs


@pytest.fixture(scope="module")
def per_image(maps: list[tuple[Tensor, Tensor]]) -> Tensor:
    return torch.stack([confusion_matrix(predicted, truth, NUM_CLASSES) for predicted, truth in maps])


@pytest.mark.parametrize(
    ("correct", "total", "name"),
    [(732, 2000, "wilson_732_of_2000"), (50, 50, "wilson_50_of_50"), (38000, 50000, "wilson_38000_of_50000")],
)
def test_wilson__golden(golden: dict[str, Any], correct: int, total: int, name: str) -> None:
    assert wilson_interval(correct, total) == pytest.approx(golden["L_stats"][name], abs=5e-9)


def test_wilson__nothing_right_starts_at_zero() -> None:
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert 0.2 < high < 0.35


def test_confusion__golden(golden: dict[str, Any], per_image: Tensor) -> None:
    total = per_image.sum(dim=0)
    assert total.dtype == torch.int64
    assert total.tolist() == golden["C_segmentation"]["confusion"]
    assert int(total.sum()) == golden["C_segmentation"]["valid_pixels"]


def test_mean_iou__golden_and_not_the_wrong_variants(golden: dict[str, Any], per_image: Tensor) -> None:
    block, total = golden["C_segmentation"], per_image.sum(dim=0)
    assert mean_iou(total) == pytest.approx(block["mIoU_nanmean_dataset"], rel=1e-8)
    assert pixel_accuracy(total) == pytest.approx(block["aAcc"], rel=1e-6)
    ious = iou_per_class(total).tolist()
    assert ious[:5] == pytest.approx(block["iou_per_class"][:5], abs=1e-9)
    assert np.isnan(ious[5])  # neither present nor predicted
    wrong = ("wrong_absent_as_zero", "wrong_mean_of_per_image", "torchmetrics_segmentation_MeanIoU_void_mapped_to_0")
    assert all(abs(mean_iou(total) - block[name]) > 1e-3 for name in (*wrong, "mIoU_gt_classes_only"))
    assert [mean_iou(image) for image in per_image] == pytest.approx(block["per_image"], abs=1e-8)


def test_confusion__ignored_pixels_may_hold_any_prediction(
    maps: list[tuple[Tensor, Tensor]], per_image: Tensor
) -> None:
    predicted, truth = maps[0]
    painted = torch.where(truth < 0, 5, predicted)
    assert not torch.equal(painted, predicted)
    assert torch.equal(confusion_matrix(painted, truth, NUM_CLASSES), per_image[0])


def test_iou__removing_a_class_leaves_the_others(maps: list[tuple[Tensor, Tensor]]) -> None:
    predicted, truth = (torch.cat(parts) for parts in zip(*maps, strict=True))
    before = iou_per_class(confusion_matrix(predicted, truth, NUM_CLASSES))
    kept = (predicted != 4) & (truth != 4)
    after = iou_per_class(confusion_matrix(predicted[kept], truth[kept], NUM_CLASSES))
    assert torch.isnan(after[4])
    # pixels predicted 4 leave with their class, so compare with unions reduced by exactly these
    lost = torch.bincount(truth[(predicted == 4) & (truth >= 0)], minlength=NUM_CLASSES)
    total = confusion_matrix(predicted, truth, NUM_CLASSES)
    union = total.sum(0) + total.sum(1) - total.diagonal()
    assert torch.allclose(after[:4], (before * union / (union - lost))[:4], rtol=1e-12)


def _miou(confusion: Tensor) -> Tensor:
    return iou_per_class(confusion).nanmean(dim=-1)


def test_jackknife__miou_interval_holds_the_estimate_and_frames_in_blocks_widen_it(per_image: Tensor) -> None:
    low, high = jackknife_interval(per_image, _miou)
    assert low < mean_iou(per_image.sum(dim=0)) < high
    same = per_image[:1].repeat(5, 1, 1)  # identical images leave nothing to chance
    assert jackknife_interval(same, _miou) == pytest.approx([mean_iou(per_image[0])] * 2, rel=1e-9)
    frames = per_image.repeat_interleave(8, dim=0)  # each image eight times: no more is known than of three
    blocks = torch.arange(3).repeat_interleave(8)
    assert jackknife_interval(frames, _miou, blocks) == pytest.approx([low, high], rel=1e-6)
    alone = jackknife_interval(frames, _miou)
    assert alone[1] - alone[0] < 0.5 * (high - low)


@pytest.mark.parametrize("num_images", [5, 10, 20])
def test_jackknife__miou_interval_covers_the_truth(num_images: int) -> None:
    """A bootstrap of so few images covered 81 to 88 % of the time where 95 % were asked for."""
    generator = torch.Generator().manual_seed(num_images)
    population = []
    for _ in range(3000):  # images of different difficulty, three classes of different size
        truth = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), 60, replacement=True, generator=generator)
        is_right = torch.rand(60, generator=generator) < torch.rand(1, generator=generator) * 0.7 + 0.25
        other = torch.randint(3, (60,), generator=generator)
        population.append(confusion_matrix(torch.where(is_right, truth, other), truth, 3))
    images = torch.stack(population)
    wanted = float(_miou(images.sum(dim=0)))
    covered = 0
    for _ in range(300):
        drawn = images[torch.randint(len(images), (num_images,), generator=generator)]
        low, high = jackknife_interval(drawn, _miou)
        covered += low <= wanted <= high
    assert covered >= 0.91 * 300


def test_top_k__ties_go_to_the_lowest_class() -> None:
    scores = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]])
    assert top_k_accuracy(scores, torch.tensor([0, 1]), 1) == 1.0
    assert top_k_accuracy(scores, torch.tensor([1, 2]), 1) == 0.0
    assert top_k_accuracy(scores, torch.tensor([1, 2]), 2) == 1.0


def test_mean_class_accuracy__weighs_classes_alike_and_skips_absent_ones() -> None:
    labels = torch.tensor([0, 0, 0, 2])
    assert mean_class_accuracy(torch.tensor([0, 0, 0, 1]), labels, 4) == 0.5
