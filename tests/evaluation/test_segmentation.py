"""Linear segmentation head: golden logits and loss, ignore label, degenerate inputs, selection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation.extraction.images import Dense
from evaluation.protocol import EvaluationError
from evaluation.protocols.label_maps import small
from evaluation.protocols.linear_maps import Standardiser, logits_at, upsampled
from evaluation.protocols.segmentation.score import score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = {**PROTOCOLS["segmentation"].params, "min_steps": 60, "pixels_per_image": 400, "pixels_per_step": 200}


@pytest.fixture(scope="module")
def golden_head() -> tuple[Tensor, Tensor]:
    """(patch logits (1, 5, 3, 4), labels (12, 16) with -1 where ignored) of block C_seg_head, float64."""
    y, x, c = np.meshgrid(np.arange(3), np.arange(4), np.arange(6), indexing="ij")
    tokens = torch.from_numpy(np.cos(0.8 * (c + 1) * (y + 1) + 0.5 * x * (c + 1)))
    channel, out = torch.arange(6, dtype=torch.float64), torch.arange(5, dtype=torch.float64)
    normed = Standardiser(mean=0.1 * (channel - 2), var=0.5 + 0.25 * channel)(tokens)
    # gain and bias of the golden BatchNorm, which our linear layer absorbs
    normed = normed * (1 + 0.05 * channel) - 0.02 * channel
    weight = torch.sin(1.1 * (out[:, None] + 1) * (channel + 1))
    logits = F.linear(normed, weight, 0.01 * out).permute(2, 0, 1)[None]
    row, col = np.mgrid[:12, :16]
    labels = (row // 4 + col // 5) % 5
    labels[::5, ::3] = -1
    return logits, torch.from_numpy(labels)


def _pixel_centres(height: int, width: int) -> Tensor:
    """All pixel centres of a label map as points (1, H * W, 2) in [-1, 1]."""
    y = (2 * torch.arange(height, dtype=torch.float64) + 1) / height - 1
    x = (2 * torch.arange(width, dtype=torch.float64) + 1) / width - 1
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).reshape(1, -1, 2)


def test_head__golden_logits_and_predictions(golden: dict[str, Any], golden_head: tuple[Tensor, Tensor]) -> None:
    block, (logits, _) = golden["C_seg_head"], golden_head
    full = upsampled(logits, (12, 16))[0]
    assert float(full.sum()) == pytest.approx(block["logits_sum"], rel=1e-8)
    assert float(full[0, 0, 0]) == pytest.approx(block["logit_o0_y0_x0"], rel=1e-8)
    assert float(full[4, 11, 15]) == pytest.approx(block["logit_o4_y11_x15"], rel=1e-8)
    assert float(full[2, 5, 7]) == pytest.approx(block["logit_o2_y5_x7"], rel=1e-8)
    predicted = full.argmax(dim=0)
    assert torch.bincount(predicted.flatten(), minlength=5).tolist() == block["pred_hist"]
    assert predicted[6].tolist() == block["pred_row6"]


def test_head__golden_loss_through_single_pixels(golden: dict[str, Any], golden_head: tuple[Tensor, Tensor]) -> None:
    """The logits the training loss sees are those of the upsampled map, and so is the loss."""
    block, (logits, labels) = golden["C_seg_head"], golden_head
    at_pixels = logits_at(logits, _pixel_centres(12, 16))
    assert torch.allclose(at_pixels, upsampled(logits, (12, 16)).flatten(2), rtol=1e-10, atol=1e-12)
    loss = F.cross_entropy(at_pixels, labels.flatten()[None], ignore_index=-1)
    assert float(loss) == pytest.approx(block["ce_full_res"], rel=1e-8)
    assert float(loss) != pytest.approx(block["ce_at_patch_grid_WRONG"], rel=1e-2)


def _scene(num_images: int, seed: int) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.uint8]]]:
    """Patch maps (n, 4, 4, 6) whose first three channels tell the class, and their masks of 16 x 12 pixels."""
    rng = np.random.default_rng(seed)
    classes = rng.integers(0, 3, (num_images, 4, 4))
    patches = np.concatenate((np.eye(3)[classes], np.zeros((num_images, 4, 4, 3))), axis=-1)
    patches += 0.1 * rng.standard_normal(patches.shape)
    return patches, [np.kron(image, np.ones((4, 3))).astype(np.uint8) for image in classes]


def test_score__tokens_that_tell_the_class_beat_the_position_prior(dense: Callable[..., Dense]) -> None:
    train, test = dense(*_scene(40, 0), 3), dense(*_scene(20, 1), 3)
    outcome = score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["segmentation"].metrics}
    assert outcome.metrics["miou"] > 0.75  # bilinear upsampling blurs the borders of 4-pixel patches
    assert outcome.metrics["miou_position_prior"] < 0.4
    assert outcome.metrics["miou_ci_low"] <= outcome.metrics["miou"] <= outcome.metrics["miou_ci_high"]
    assert outcome.metrics["miou"] == pytest.approx(np.mean(outcome.details["iou_per_class"]))


def test_score__constant_tokens_give_the_majority_class(dense: Callable[..., Dense]) -> None:
    masks = [np.where(np.arange(64).reshape(8, 8) < 40, 1, 0).astype(np.uint8)] * 6
    split = dense(np.full((6, 2, 2, 5), 3.0), masks, 3)
    outcome = score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["pixel_accuracy"] == pytest.approx(40 / 64)
    assert outcome.metrics["miou"] == pytest.approx(40 / 64 / 2)  # class 0 is missed, class 2 is nowhere and skipped
    assert outcome.details["iou_per_class"] == [0.0, pytest.approx(40 / 64), None]
    assert outcome.metrics["miou_position_prior"] == 1.0


def test_score__test_labels_do_not_choose_the_head(dense: Callable[..., Dense]) -> None:
    patches, masks = _scene(20, 1)
    train = dense(*_scene(30, 0), 3)
    honest = score(train, dense(patches, masks, 3), num_classes=3, params=PARAMS, seed=0, device=CPU)
    shuffled = score(train, dense(patches, masks[1:] + masks[:1], 3), num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert shuffled.details["lr"] == honest.details["lr"]
    assert shuffled.details["val_miou_by_lr"] == honest.details["val_miou_by_lr"]
    assert shuffled.metrics["miou"] < honest.metrics["miou"] - 0.2


def test_score__sequences_stay_whole_and_are_reported(dense: Callable[..., Dense]) -> None:
    sequences = {f"k{i}": "day" if i < 6 else "night" for i in range(12)}
    train = dense(*_scene(12, 0), 3, sequences=sequences)
    test = dense(*_scene(8, 1), 3, sequences=sequences)
    outcome = score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.details["selection"] == "2 fold(s) of sequences"
    assert sorted(outcome.details["miou_by_sequence"]) == ["day", "night"]


def test_score__ignored_pixels_count_nowhere(dense: Callable[..., Dense]) -> None:
    """Labels under the ignore value decide neither training nor score: any ignore value gives the same result."""
    outcomes = []
    for ignored in (255, 9):
        (train_patches, train_masks), (test_patches, test_masks) = _scene(20, 0), _scene(10, 1)
        for mask in (*train_masks, *test_masks):
            mask[3:9] = ignored
        train, test = dense(train_patches, train_masks, 3, ignored), dense(test_patches, test_masks, 3, ignored)
        outcomes.append(score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU))
    assert outcomes[0] == outcomes[1]


def test_score__masks_of_different_sizes(dense: Callable[..., Dense]) -> None:
    patches, masks = _scene(10, 0)
    masks[3] = np.kron(masks[3], np.ones((2, 2))).astype(np.uint8)
    split = dense(patches, masks, 3)
    outcome = score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    assert outcome.metrics["miou"] > 0.7


def test_score__nothing_labelled_is_refused_and_before_anything_is_trained(
    dense: Callable[..., Dense], monkeypatch: pytest.MonkeyPatch
) -> None:
    split = dense(np.zeros((4, 2, 2, 3)), [np.full((4, 4), 255, np.uint8)] * 4, 3)
    with pytest.raises(EvaluationError, match="no labelled pixel in the training images"):
        score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)
    monkeypatch.setattr(f"{score.__module__}.Fit", None)  # it trains
    labelled = dense(*_scene(4, 0), 3)
    with pytest.raises(EvaluationError, match="no labelled pixel in the test images: every label is ignore_index"):
        score(labelled, replace(labelled, labels=split.labels), num_classes=3, params=PARAMS, seed=0, device=CPU)
    patches, masks = _scene(4, 0)
    beyond = dense(patches, [mask * 0 + 3 for mask in masks], 3)
    with pytest.raises(EvaluationError, match=r"label 3 in seg\.png, but dataset\.json lists 3 classes"):
        score(labelled, replace(labelled, labels=beyond.labels), num_classes=3, params=PARAMS, seed=0, device=CPU)


def test_score__one_training_image_is_refused(dense: Callable[..., Dense]) -> None:
    split = dense(*_scene(1, 0), 3)
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        score(split, split, num_classes=3, params=PARAMS, seed=0, device=CPU)


def test_label_maps__a_class_beyond_the_list_is_refused(dense: Callable[..., Dense]) -> None:
    split = dense(*_scene(4, 0), 2)
    with pytest.raises(EvaluationError, match=r"sample 'k\d': label 2 .* 2 classes and ignore_index 255"):
        score(split, split, num_classes=2, params=PARAMS, seed=0, device=CPU)


def test_standardiser__exact_statistics_over_all_tokens() -> None:
    patches = np.random.default_rng(0).standard_normal((130, 2, 3, 4)).astype(np.float16)
    standardise = Standardiser.of(patches, CPU)
    tokens = torch.from_numpy(patches).double().flatten(0, 2)
    assert torch.allclose(standardise.mean.double(), tokens.mean(dim=0), atol=1e-7)
    assert torch.allclose(standardise.var.double(), tokens.var(dim=0, correction=0), rtol=1e-6)


def test_score__shows_truth_and_guess_of_four_images(dense: Callable[..., Dense]) -> None:
    patches, masks = _scene(9, 1)
    outcome = score(
        dense(*_scene(20, 0), 3), dense(patches, masks, 3), num_classes=3, params=PARAMS, seed=0, device=CPU
    )
    asked, truth, guess = (outcome.shown[name].numpy() for name in ("asked", "truth", "guess"))
    assert len(set(asked.tolist())) == 4 and guess.shape == (4, 16, 12)
    assert (truth == np.stack([masks[number] for number in asked])).all()
    assert 0.7 < (truth == guess).mean() < 1, "prediction, not truth"


def test_small__nearest_pixels_in_the_size_of_the_first() -> None:
    large = np.arange(300 * 100).reshape(300, 100)
    shrunk = small([large, large[:30, :10]], 150).numpy()
    assert shrunk.shape == (2, 150, 50)
    assert (shrunk[0] == large[::2, ::2]).all() and (shrunk[1] == large[:30, :10].repeat(5, 0).repeat(5, 1)).all()
