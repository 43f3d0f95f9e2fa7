"""One patch as a prompt: golden similarities, regions, planted objects, degenerate inputs, the threshold."""

from __future__ import annotations

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
from evaluation.protocols.prompt_patch.score import medoid, otsu, pair_scores, prompt_ious, regions_of, score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
SPEC = PROTOCOLS["prompt_patch"]


def _score(train: Dense, test: Dense, **changed: Any) -> Any:
    return score(train, test, num_classes=3, params={**SPEC.params, **changed}, seed=0, device=CPU)


def test_pairs_and_prompts__golden(golden: dict[str, Any], golden_patches: tuple[npt.NDArray[Any], Any]) -> None:
    block, (patches, is_object) = golden["J_prompt"], golden_patches
    regions = regions_of(is_object.astype(np.int64), (6, 8), 0.5)
    assert regions.classes.tolist() == [0, 1]
    unit = F.normalize(torch.from_numpy(patches).flatten(0, 1), dim=1)
    cosine = unit @ unit.T
    auroc, _, intra, inter = pair_scores(cosine, regions)
    assert auroc == pytest.approx(block["auroc_same_vs_diff"], rel=1e-8)
    assert intra == pytest.approx(block["intra_mean_excl_self"], rel=1e-8)
    assert inter == pytest.approx(block["inter_mean"], rel=1e-7)
    assert medoid(regions.patches == 1) == (3, 4)  # the prompt of the block
    alike = cosine[3 * 8 + 4].view(6, 8)
    assert alike[3].tolist() == pytest.approx(block["sim_row3"], abs=1e-8)
    found = prompt_ious(alike, regions.patches == 1, torch.ones(6, 8, dtype=torch.bool), (0.2, 0.4, 0.6))
    assert found.tolist() == pytest.approx([block["iou_by_threshold"][t]["iou"] for t in ("0.2", "0.4", "0.6")])


def test_regions__hang_together_and_patches_belong_by_half_of_their_pixels() -> None:
    labels = np.array([[1, 1, 0, 1], [1, 1, 0, 1], [0, 0, 0, -1], [0, 0, -1, -1]])
    regions = regions_of(labels, (2, 2), 0.5)
    assert regions.classes.tolist() == [0, 1, 1]  # two regions of class 1
    assert regions.patches.tolist() == [[1, 0], [0, -1]]
    assert regions.is_void.tolist() == [[False, False], [False, True]]
    assert regions_of(np.array([[0, 1], [1, 0]]), (2, 2), 0.5).classes.tolist() == [0, 1]  # diagonals hang together
    nothing = regions_of(np.full((4, 4), -1), (2, 2), 0.5)
    assert nothing.patches.tolist() == [[-1, -1], [-1, -1]]


def test_pairs__of_two_regions_of_a_class_count_as_neither() -> None:
    labels = np.array([[1, 1, 0, 0, 1, 1]])
    vectors = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 1], [0, 0, 1]])
    auroc, _, intra, inter = pair_scores(vectors @ vectors.T, regions_of(labels, (1, 6), 0.5))
    assert (auroc, intra, inter) == (1.0, 1.0, 0.0)
    vectors[4:] = vectors[:2]  # as alike as one thing, which they may be
    assert pair_scores(vectors @ vectors.T, regions_of(labels, (1, 6), 0.5))[0] == 1.0


def test_pairs__of_positions_alone() -> None:
    flat = torch.ones(4, 4)
    auroc, auroc_position, _, _ = pair_scores(flat, regions_of(np.array([[1, 1, 0, 0]]), (1, 4), 0.5))
    assert (auroc, auroc_position) == (0.5, 3.5 / 4)  # two pairs at a distance of 1, against those at 1, 2, 2 and 3


def test_prompt_ious__what_is_not_counted_is_no_false_alarm() -> None:
    is_region, counts = torch.tensor([True, True, False, False]), torch.tensor([True, True, True, False])
    assert prompt_ious(torch.ones(4), is_region, counts, (0.5,)).tolist() == [pytest.approx(2 / 3)]


def _objects(
    num_images: int, seed: int, noise: float = 0.2
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.uint8]]]:
    """Patch maps (n, 6, 6, 5) of a 3 x 3 object on its ground, and masks of 24 x 18 pixels."""
    rng = np.random.default_rng(seed)
    patches, masks = np.zeros((num_images, 6, 6, 5)), []
    for patch in patches:
        row, column = rng.integers(0, 4, 2)
        mask = np.zeros((6, 6), np.uint8)
        mask[row : row + 3, column : column + 3] = 1 + rng.integers(2)
        patch[..., 0], patch[..., 1] = mask > 0, mask == 0
        masks.append(np.kron(mask, np.ones((4, 3))).astype(np.uint8))
    return patches + noise * rng.standard_normal(patches.shape), masks


def test_score__planted_objects_are_told_apart(dense: Callable[..., Dense]) -> None:
    outcome = _score(dense(*_objects(12, 0), 3), dense(*_objects(8, 1), 3))
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics}
    assert outcome.metrics["auroc"] > 0.97 > 0.8 > outcome.metrics["auroc_position"]
    assert outcome.metrics["auroc_ci_low"] < outcome.metrics["auroc"] < outcome.metrics["auroc_ci_high"]
    assert outcome.metrics["iou_oracle"] >= outcome.metrics["iou"] > 0.9
    assert outcome.metrics["iou_otsu"] > 0.9
    assert 0.7 < outcome.metrics["iou_pixels"] < 1  # bilinear upsampling blurs borders
    assert outcome.metrics["intra"] > 0.8 > 0.4 > outcome.metrics["inter"]
    assert outcome.details["num_prompts"] == 16  # object and ground of eight images


def test_score__constant_patches_tell_nothing_apart(dense: Callable[..., Dense]) -> None:
    patches, masks = _objects(4, 0)
    outcome = _score(*[dense(np.full_like(patches, 0.3), masks, 3)] * 2)
    assert outcome.metrics["auroc"] == 0.5
    assert outcome.metrics["iou"] == outcome.metrics["iou_oracle"] == pytest.approx(0.5)  # 9 and 27 of 36 patches
    assert outcome.metrics["intra"] == outcome.metrics["inter"] == pytest.approx(1.0)


def test_score__the_threshold_is_that_of_the_training_images(dense: Callable[..., Dense]) -> None:
    train, (patches, masks) = dense(*_objects(8, 0, noise=0.4), 3), _objects(6, 1, noise=0.4)
    honest, shuffled = (_score(train, dense(patches, maps, 3)) for maps in (masks, masks[1:] + masks[:1]))
    assert shuffled.details["threshold"] == honest.details["threshold"]
    assert shuffled.metrics["val_iou"] == honest.metrics["val_iou"] != honest.metrics["iou"]
    assert shuffled.metrics["auroc"] < honest.metrics["auroc"] - 0.1
    assert honest.metrics["val_iou"] == max(honest.details["val_iou_by_threshold"].values())
    few = _score(train, dense(patches, masks, 3), train_images=2)
    assert few.metrics["val_auroc"] != honest.metrics["val_auroc"]


def test_score__nothing_depends_on_what_lies_under_ignored_pixels(dense: Callable[..., Dense]) -> None:
    outcomes = []
    for ignored in (255, 9):
        patches, masks = _objects(5, 0)
        for mask in masks:
            mask[:9] = ignored
        outcomes.append(_score(*[dense(patches, masks, 3, ignored)] * 2))
    assert outcomes[0] == outcomes[1]


def test_otsu__parts_values_where_the_variance_between_the_parts_is_greatest() -> None:
    """By loops over every value as the least of the upper ones; of equal values all are upper ones."""
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 30):
        values = torch.randn(count, generator=generator).double().round(decimals=1)  # some are equal
        between = {}
        for least in values.unique().tolist()[1:]:
            upper, lower = values[values >= least], values[values < least]
            between[least] = float(len(upper) * len(lower) * (upper.mean() - lower.mean()) ** 2)
        if between:
            assert between[otsu(values)] == pytest.approx(max(between.values()), rel=1e-9)
    assert otsu(torch.tensor([0.25, 0.25])) == otsu(torch.tensor([0.25])) == 0.25
    assert otsu(torch.tensor([0.75, 0.1, 0.8, 0.0])) == pytest.approx(0.75)


def test_score__small_regions_are_not_prompted(dense: Callable[..., Dense]) -> None:
    patches, masks = _objects(3, 0)
    small = np.zeros((6, 6), np.uint8)
    small[2, 1:4] = 1
    test = dense(patches, [masks[0], small, small], 3)
    assert _score(test, test).details["num_prompts"] == 4
    assert _score(test, test, least_patches=3).details["num_prompts"] == 6


def test_score__maps_without_regions_or_pairs_are_refused(dense: Callable[..., Dense]) -> None:
    good = dense(*_objects(3, 0), 3)
    void = dense(np.ones((2, 6, 6, 5)), [np.full((6, 6), 255, np.uint8)] * 2, 3)
    one = dense(np.ones((2, 6, 6, 5)), [np.ones((6, 6), np.uint8)] * 2, 3)
    with pytest.raises(EvaluationError, match="no region of 4 patches in 2 training images; a larger image_size"):
        _score(void, good)
    with pytest.raises(EvaluationError, match="no image with patches of two classes in 2 test images"):
        _score(good, one)


def test_evaluate__as_it_is_named(checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path) -> None:
    result = evaluate(checkpoint(), SPEC.name, halves, store=tmp_path / "runs", image_size=32)
    assert 0 <= result.metrics["auroc_ci_low"] <= result.metrics["auroc"] <= result.metrics["auroc_ci_high"] <= 1


def test_score__camvid_by_colors(pixel_patches: Callable[..., Dense]) -> None:
    train = pixel_patches("camvid", "train", range(0, 360, 60), (12, 16))
    test = pixel_patches("camvid", "test", range(0, 230, 40), (12, 16))
    outcome = _score(train, test)
    assert 0.6 < outcome.metrics["auroc"] < 0.9
    assert 0.6 < outcome.metrics["auroc_position"] < 0.95
    assert outcome.metrics["iou_oracle"] >= outcome.metrics["iou"] > 0.15
