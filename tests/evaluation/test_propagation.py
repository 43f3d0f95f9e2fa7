"""Objects followed through videos: golden propagation and measures, planted motion, degenerate inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import EvaluationData, evaluate
from evaluation.extraction.images import Dense
from evaluation.protocol import EvaluationError
from evaluation.protocols.propagation.measures import boundary_f, region_iou
from evaluation.protocols.propagation.score import hardened, neighbors, propagated, score
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
SPEC = PROTOCOLS["propagation"]


def _score(test: Dense, num_classes: int = 3, **changed: Any) -> Any:
    params = {**SPEC.params, **changed}
    return score(test, test, num_classes=num_classes, params=params, seed=0, device=CPU)


def _golden_frame(number: int) -> Tensor:
    """Tokens (30, 8) of length 1 of a frame of block G_davis_propagation."""
    y, x, d = np.meshgrid(np.arange(5), np.arange(6), np.arange(8), indexing="ij")
    tokens = np.sin(0.6 * (d + 1) * (x + 0.4 * number) + 0.9 * y) + 0.5 * np.cos(1.1 * (d + 1) * y + 0.2 * number)
    return F.normalize(torch.from_numpy(tokens).flatten(0, 1), dim=1)


def _golden_masks() -> Tensor:
    """Masks (30, 3) of the first frame."""
    labels = torch.zeros(5, 6, dtype=torch.int64)
    labels[1:4, 1:3], labels[2:5, 4:6] = 1, 2
    return F.one_hot(labels, 3).double().flatten(0, 1)


def test_propagated__golden_soft_labels(golden: dict[str, Any]) -> None:
    block = golden["G_davis_propagation"]
    circle, square = (neighbors((5, 6), 2, shape) for shape in ("circle", "square"))
    center, corner = 2 * 6 + 3, 0
    assert circle[center].sum() == block["n_neighbours_center"] and circle[corner].sum() == block["n_neighbours_corner"]
    assert square[center].sum() == 5 * 5  # all 25 but for the side that is cut off at 6 columns, which is none here
    masks = [_golden_masks()]
    for number in (1, 2):
        context = torch.stack([_golden_frame(frame) for frame in range(number)])
        found = propagated(context, torch.stack(masks), _golden_frame(number), circle, top_k=5, temperature=0.2)
        masks.append(found)
    assert np.allclose(masks[1].view(5, 6, 3)[2], block["p1_row2"], atol=1e-8)
    assert np.allclose(masks[2].view(5, 6, 3)[2], block["p2_row2"], atol=1e-8)
    assert masks[1].view(5, 6, 3).argmax(dim=2).tolist() == block["argmax1"]
    assert hardened(masks[2].T.reshape(3, 5, 6), (5, 6)).tolist() == block["argmax2_after_minmax"]
    first = _golden_frame(0)[None]
    found = propagated(first, masks[0][None], _golden_frame(1), square, top_k=5, temperature=0.1)
    assert np.allclose(found.view(5, 6, 3)[2], block["dino_v1_style_square_T0p1_p1_row2"], atol=1e-8)


def test_propagated__chunks_are_of_no_consequence(monkeypatch: pytest.MonkeyPatch) -> None:
    context, masks, near = _golden_frame(0)[None], _golden_masks()[None], neighbors((5, 6), 2, "circle")
    whole = propagated(context, masks, _golden_frame(1), near, top_k=5, temperature=0.2)
    monkeypatch.setattr("evaluation.protocols.propagation.score.CHUNK_ELEMENTS", 70)
    assert torch.allclose(propagated(context, masks, _golden_frame(1), near, top_k=5, temperature=0.2), whole)


def test_measures__golden_j_and_f(golden: dict[str, Any]) -> None:
    block = golden["G_J_and_F"]
    y, x = np.mgrid[:120, :160]
    truth = (y - 60) ** 2 + (x - 80) ** 2 <= 35**2
    guess = (y - 63) ** 2 / 1.2 + (x - 76) ** 2 <= 33**2
    guess[40:60, 100:110] = False
    assert (truth.sum(), guess.sum()) == (block["gt_px"], block["pred_px"])
    assert region_iou(guess, truth) == pytest.approx(block["J"], rel=1e-9)
    assert boundary_f(guess, truth, 2) == pytest.approx(block["F"], rel=1e-9)


def test_measures__of_empty_masks() -> None:
    empty, some = np.zeros((8, 8), bool), np.zeros((8, 8), bool)
    some[2:4, 2:4] = True
    assert (region_iou(empty, empty), region_iou(empty, some), boundary_f(empty, empty, 1)) == (1, 0, 1)
    assert boundary_f(np.ones((8, 8), bool), empty, 1) == 1  # what fills the frame has no boundary in it
    assert boundary_f(empty, some, 1) == boundary_f(some, empty, 1) == 0
    assert boundary_f(np.roll(some, 4, axis=0), some, 1) == 0
    assert boundary_f(np.roll(some, 1, axis=0), some, 1) == 1


def test_hardened__a_channel_that_is_the_same_everywhere_wins_nowhere() -> None:
    masks = torch.tensor([[[0.9, 0.9]], [[0.1, 0.0]]])
    assert hardened(masks, (1, 2)).tolist() == [[1, 0]]
    assert hardened(masks[:1], (1, 2)).tolist() == [[0, 0]]


def _video(
    num_frames: int, seed: int, step: int = 1, noise: float = 0.1
) -> tuple[npt.NDArray[np.float64], list[npt.NDArray[np.uint8]]]:
    """Patches (n, 8, 8, 6) of two objects that move right on their ground, and their masks of 24 x 32 pixels."""
    rng = np.random.default_rng(seed)
    patches, masks = np.zeros((num_frames, 8, 8, 6)), []
    for number, patch in enumerate(patches):
        mask = np.zeros((8, 8), np.uint8)
        mask[1:3, number * step : number * step + 2], mask[5:7, number * step : number * step + 3] = 1, 2
        patch[..., :3] = np.eye(3)[mask]
        masks.append(np.kron(mask, np.ones((3, 4))).astype(np.uint8))
    return patches + noise * rng.standard_normal(patches.shape), masks


def _named(**lengths: int) -> dict[str, str]:
    """Sequence of each key in turn."""
    names = [name for name, length in lengths.items() for _ in range(length)]
    return {f"k{number}": name for number, name in enumerate(names)}


def test_score__objects_that_move_are_followed(dense: Callable[..., Dense]) -> None:
    (first, first_masks), (second, second_masks) = _video(6, 0), _video(5, 1, noise=0.4)
    test = dense(np.concatenate([first, second]), first_masks + second_masks, 3, sequences=_named(a=6, b=5))
    outcome = _score(test)
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics}
    assert outcome.metrics["jf"] > 0.75 > 0.5 > outcome.metrics["jf_static"]
    assert outcome.metrics["jf"] == pytest.approx((outcome.metrics["j"] + outcome.metrics["f"]) / 2)
    assert outcome.metrics["jf_ci_low"] < outcome.metrics["jf"] < outcome.metrics["jf_ci_high"]
    assert (outcome.details["num_objects"], outcome.details["num_scored"]) == (4, 7)
    assert outcome.details["interval_over"] == "2 sequences"
    assert _score(test, radius=0).metrics["j"] < outcome.metrics["j"] - 0.2  # labels cannot move
    near = _score(test, radius=1)  # from frame to frame they can, but not all the way from the first one
    assert near.metrics["j"] > outcome.metrics["j"] - 0.1 > _score(test, radius=1, last_frames=0).metrics["j"]


def test_score__frames_are_in_the_order_of_their_keys(dense: Callable[..., Dense]) -> None:
    patches, masks = _video(4, 0)
    masks[0] = np.where(masks[0] == 2, 0, masks[0]).astype(np.uint8)
    names = _named(a=4)
    order = _score(dense(patches, masks, 3, sequences=names))
    assert order.details["num_objects"] == 1  # the first frame has object 1 alone

    class Backwards:
        num_samples = 4

        def __init__(self, samples: Any) -> None:
            self._samples = samples

        def read(self, sample_idx: int) -> dict[str, Any]:
            stored: dict[str, Any] = self._samples.read(3 - sample_idx)
            return stored

    split = dense(patches, masks, 3, sequences=names)
    backwards: Any = split.labels
    backwards._dataset = Backwards(backwards._dataset)
    assert _score(Dense(split.patches[::-1].copy(), backwards)).metrics == order.metrics


def test_score__an_object_that_was_hidden_is_known_by_the_first_frame(dense: Callable[..., Dense]) -> None:
    patches, masks = _video(5, 0, step=0)
    patches[1:3] = [0, 0, 0, 1, 0, 0]  # like nothing else
    outcome = _score(dense(patches, masks, 3, sequences=_named(a=5)), last_frames=1)
    assert outcome.metrics["j"] > 0.25  # of three frames that count, the objects are to be seen in the last alone


def test_score__the_last_frame_does_not_count(dense: Callable[..., Dense]) -> None:
    patches, masks = _video(4, 0)
    honest = _score(dense(patches, masks, 3, sequences=_named(a=4)))
    nothing = np.zeros_like(masks[0])
    assert _score(dense(patches, [*masks[:3], nothing], 3, sequences=_named(a=4))).metrics == honest.metrics
    assert _score(dense(patches, [*masks[:2], nothing, masks[3]], 3, sequences=_named(a=4))).metrics != honest.metrics


def test_score__groups_are_sequences_and_void_predictions_are_no_false_alarms(dense: Callable[..., Dense]) -> None:
    (first, first_masks), (second, second_masks) = _video(5, 0), _video(4, 1)
    for mask in first_masks[1:] + second_masks[1:]:
        mask[:9] = 255  # all of object 1 and no pixel of object 2
    names = _named(a=5, b=4)
    outcome = _score(dense(np.concatenate([first, second]), first_masks + second_masks, 3, sequences=names))
    assert outcome.groups.tolist() == [0, 0, 1, 1]
    assert outcome.metrics["j"] > 0.9  # J of object 1 is 1: nothing of it is to be seen, and nothing counts


def test_score__constant_patches_give_no_crash(dense: Callable[..., Dense]) -> None:
    patches, masks = _video(4, 0)
    outcome = _score(dense(np.ones_like(patches), masks, 3, sequences=_named(a=4)))
    assert 0 <= outcome.metrics["jf"] < 0.6
    assert (outcome.metrics["jf_ci_low"], outcome.metrics["jf_ci_high"]) == (0, 1)  # of one video nothing is known


def test_score__nothing_depends_on_what_lies_under_ignored_pixels(dense: Callable[..., Dense]) -> None:
    outcomes = []
    for ignored in (255, 9):
        patches, masks = _video(4, 0)
        for mask in masks:
            mask[:5] = ignored
        outcomes.append(_score(dense(patches, masks, 3, ignored, _named(a=4))))
    assert outcomes[0] == outcomes[1]


def test_score__no_videos_and_no_objects_are_refused(dense: Callable[..., Dense]) -> None:
    patches, masks = _video(4, 0)
    with pytest.raises(EvaluationError, match=r"splits\.test\.sequences of dataset\.json names them"):
        _score(dense(patches, masks, 3))
    with pytest.raises(EvaluationError, match="videos of at least 3 frames"):
        _score(dense(patches, masks, 3, sequences=_named(a=2, b=2)))
    with pytest.raises(EvaluationError, match="no first frame of a video has an object"):
        _score(dense(patches, [np.zeros_like(mask) for mask in masks], 3, sequences=_named(a=4)))


def test_evaluate__as_it_is_named(checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path) -> None:
    facts = json.loads((halves.root / "dataset.json").read_text())
    keys = [f"test{number:04d}" for number in range(7)]
    facts["splits"] = {"test": {"sequences": {"a": keys[:3], "b": keys[3:]}}}
    (halves.root / "dataset.json").write_text(json.dumps(facts))
    result = evaluate(checkpoint(), SPEC.name, halves, store=tmp_path / "runs")
    assert 0 <= result.metrics["jf"] <= 1 and list(result.details["jf_by_sequence"]) == ["a", "b"]


def test_score__camvid_by_colors(pixel_patches: Callable[..., Dense]) -> None:
    outcome = _score(pixel_patches("camvid", "test", [*range(4), *range(62, 66)], (12, 16)), num_classes=11)
    assert list(outcome.details["jf_by_sequence"]) == ["0001TP", "Seq05VD"]
    assert 0.05 < outcome.metrics["jf"] < 0.6
    assert 0.1 < outcome.metrics["jf_static"] < 0.6
