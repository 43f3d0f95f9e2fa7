"""Segmentation by nearest patches: golden retrieval, what is remembered, planted labels, degenerate inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F

from evaluation import EvaluationData, evaluate
from evaluation.extraction.images import Dense
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import MajorityMap, patch_counts
from evaluation.protocols.patch_knn.score import Memory, remember, retrieve, score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
SPEC = PROTOCOLS["patch_knn"]
PARAMS = SPEC.params


def test_retrieve__golden_shares(golden: dict[str, Any]) -> None:
    block = golden["I_incontext"]

    def vectors(count: int, pace: float) -> torch.Tensor:
        i, j = np.meshgrid(np.arange(count), np.arange(8), indexing="ij")
        wave = 0.6 * np.cos(2 * math.pi * (i % 3 + 1) * (j + 1) / 3)
        return torch.from_numpy(np.sin(pace * (i + 1) * (j + 1)) + wave)

    number = torch.arange(40)
    shares = 0.75 * F.one_hot(number % 3, 3) + 0.25 * F.one_hot((2 * number + 1) % 3, 3)
    memory = Memory(F.normalize(vectors(40, 0.279), dim=1), shares.double())
    found = retrieve(memory, vectors(6, 0.385), k=5, temperature=0.02)
    assert np.allclose(found, block["label"], atol=1e-8)
    assert found.argmax(dim=1).tolist() == block["argmax"]


def test_patch_counts__pixels_by_their_center_and_ignored_ones_first() -> None:
    labels = np.array([[0, 0, 1, 1, -1], [0, 2, 1, 1, -1], [2, 2, 2, 2, 2]])
    counts = patch_counts(labels, (2, 2), 3)
    # The center of the second of three rows, and of the third of five columns, is on the border: they count behind it.
    assert counts[0, 0].tolist() == [0, 2, 0, 0] and counts[0, 1].tolist() == [1, 0, 2, 0]
    assert counts.sum() == labels.size
    small = patch_counts(np.array([[1]]), (2, 3), 2)
    assert small.tolist() == [[[0, 0, 1]] * 3] * 2


def test_majority_map__of_maps_of_several_sizes() -> None:
    majority = MajorityMap(3)
    for labels in ([[0, 1]], [[0, -1]], [[1, 0, -1, 2]]):
        majority.add(np.array(labels))
    assert majority.at((2, 2)).tolist() == [[0, 1], [0, 1]]


def test_remember__rare_classes_first_and_void_never(dense: Callable[..., Dense]) -> None:
    mask = np.zeros((8, 8), np.uint8)
    mask[:2] = 255
    mask[2, :2] = mask[2:4, 2:4] = 255
    mask[3, 2] = 0
    mask[6:, 6:] = 1
    patches = np.arange(16.0).reshape(1, 4, 4, 1) + 1
    split = dense(np.concatenate([patches, np.ones_like(patches)], axis=-1), [mask], 2)
    everything, _ = remember(split, 2, PARAMS, 0)
    assert len(everything.tokens) == 11  # not the first row of patches, nor one of three void pixels in four
    assert torch.allclose(everything.shares.sum(dim=1), torch.ones(11))
    picked = [remember(split, 2, {**PARAMS, "memory": 3}, seed)[0] for seed in range(8)]
    assert {len(memory.tokens) for memory in picked} == {3}
    assert np.mean([bool(memory.shares[:, 1].any()) for memory in picked]) > 0.8  # by chance it would be a quarter


def test_remember__no_more_than_the_memory_holds(dense: Callable[..., Dense]) -> None:
    split = dense(np.ones((6, 2, 2, 3)), [np.zeros((4, 4), np.uint8)] * 6, 1)
    for bound in (2, 4, 12, 24, 99):
        assert len(remember(split, 1, {**PARAMS, "memory": bound}, 0)[0].tokens) <= bound
    assert len(remember(split, 1, PARAMS, 0)[0].tokens) == 24


def _scene(num_images: int, seed: int) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.uint8]]]:
    """Patch maps (n, 4, 4, 6) whose first three channels tell the class, and their masks of 16 x 12 pixels."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (num_images, 4, 4))
    patches = np.concatenate((np.eye(3)[classes], np.zeros((num_images, 4, 4, 3))), axis=-1)
    patches += 0.1 * rng.standard_normal(patches.shape)
    return patches, [np.kron(image, np.ones((4, 3))).astype(np.uint8) for image in classes]


def test_score__tokens_that_tell_the_class_beat_the_position_prior(dense: Callable[..., Dense]) -> None:
    train, test = dense(*_scene(20, 0), 3), dense(*_scene(10, 1), 3)
    outcome = score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics}
    assert outcome.metrics["miou"] > 0.8  # bilinear upsampling blurs the borders of 4-pixel patches
    assert outcome.metrics["miou_position_prior"] < 0.4
    assert outcome.metrics["miou_ci_low"] < outcome.metrics["miou"] < outcome.metrics["miou_ci_high"]
    assert outcome.per_sample is not None and outcome.per_sample.shape == (10, 3, 3)
    assert outcome.details["memory"] == outcome.details["patches_of_train"] == 320
    assert outcome.details["interval_over"] == "images"


def test_score__constant_tokens_give_the_most_frequent_class(dense: Callable[..., Dense]) -> None:
    masks = [np.where(np.arange(64).reshape(8, 8) < 40, 1, 0).astype(np.uint8)] * 6
    split = dense(np.full((6, 2, 2, 5), 3.0), masks, 3)
    outcome = score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["pixel_accuracy"] == pytest.approx(40 / 64)
    assert outcome.details["iou_per_class"] == [0.0, pytest.approx(40 / 64), None]


def test_score__nothing_depends_on_what_lies_under_ignored_pixels(dense: Callable[..., Dense]) -> None:
    outcomes = []
    for ignored in (255, 9):
        (train_patches, train_masks), (test_patches, test_masks) = _scene(10, 0), _scene(5, 1)
        for mask in (*train_masks, *test_masks):
            mask[3:9] = ignored
        train, test = dense(train_patches, train_masks, 3, ignored), dense(test_patches, test_masks, 3, ignored)
        outcomes.append(score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU))
    assert outcomes[0] == outcomes[1]


def test_score__the_order_of_the_training_images_decides_nothing(dense: Callable[..., Dense]) -> None:
    patches, masks = _scene(12, 0)
    patches[3:6], masks[4] = patches[0], masks[0]  # patches that tie, with other labels
    test = dense(*_scene(6, 1), 3)
    outcomes = [
        score(dense(rows, maps, 3), test, num_classes=3, params=PARAMS, seed=0, device=CPU)
        for rows, maps in ((patches, masks), (patches[::-1], masks[::-1]))
    ]
    assert outcomes[0].metrics == outcomes[1].metrics


@pytest.mark.parametrize("is_train", [True, False])
def test_score__nothing_labelled_is_refused(dense: Callable[..., Dense], is_train: bool) -> None:
    void = dense(np.zeros((4, 2, 2, 3)), [np.full((4, 4), 255, np.uint8)] * 4, 3)
    full = dense(np.zeros((4, 2, 2, 3)), [np.zeros((4, 4), np.uint8)] * 4, 3)
    train, test = (void, full) if is_train else (full, void)
    with pytest.raises(EvaluationError, match="no training patch" if is_train else "no labelled pixel in the test"):
        score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU)


def test_evaluate__as_it_is_named(checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path) -> None:
    result = evaluate(checkpoint(), SPEC.name, halves, store=tmp_path / "runs")
    assert 0 <= result.metrics["miou_ci_low"] <= result.metrics["miou"] <= result.metrics["miou_ci_high"] <= 1
    assert result.metrics["miou"] > result.metrics["miou_position_prior"]


def test_score__camvid_by_colors_is_no_better_than_the_position_prior(pixel_patches: Callable[..., Dense]) -> None:
    train = pixel_patches("camvid", "train", range(0, 360, 24), (12, 16))
    test = pixel_patches("camvid", "test", range(0, 230, 40), (12, 16))
    outcome = score(train, test, num_classes=11, params=PARAMS, seed=0, device=CPU)
    assert 0.05 < outcome.metrics["miou"] < outcome.metrics["miou_position_prior"] < 0.2
    assert outcome.details["interval_over"] == "6 blocks of frames"
