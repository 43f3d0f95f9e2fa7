"""Linear depth: golden errors, loss and bins, planted distances, degenerate inputs, selection, real frames."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from evaluation import EvaluationData, evaluate
from evaluation.data import DepthMaps
from evaluation.extraction.images import Dense
from evaluation.protocol import LABELS, EvaluationError
from evaluation.protocols.depth.score import binned_distance, errors, score, siglog
from evaluation.protocols.linear_maps import upsampled
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
SPEC = PROTOCOLS["depth"]
PARAMS = {
    **SPEC.params,
    "num_bins": 32,
    "min_steps": 50,
    "lrs": (1e-2, 3e-2),
    "folds": 2,
    "pixels_per_image": 200,
    "pixels_per_step": 100,
}


def _golden_maps(number: int) -> tuple[Tensor, Tensor]:
    """(predicted, measured) distances (48, 64) of block D_depth, NaN where nothing was measured."""
    y, x = np.mgrid[:48, :64]
    truth = 2 + 1.5 * np.sin(0.2 * x + number) + 0.05 * y * (1 + number)
    predicted = truth * (1 + 0.3 * np.sin(0.31 * x + 0.17 * y + number)) + 0.1
    truth[(x + 2 * y) % 17 == number] = np.nan
    truth[(3 * x + y) % 41 == 0] = 12
    return torch.from_numpy(predicted), torch.from_numpy(truth)


def test_errors__golden_means_over_images(golden: dict[str, Any]) -> None:
    block = golden["D_depth"]
    crop = (slice(4, 47), slice(4, 60))
    found = torch.stack([errors(*(part[crop] for part in _golden_maps(number)), 0.001, 10.0) for number in (0, 1)])
    for column, name in enumerate(("rmse", "abs_rel", "a1")):
        precision = 1e-7 if name == "a1" else 1e-8  # shares of pixels were stored as float32
        expected = [image[name] for image in block["per_image"]]
        assert found[:, column].tolist() == pytest.approx(expected, rel=precision)
        assert float(found[:, column].mean()) == pytest.approx(block["mean_over_images"][name], rel=precision)
    whole = errors(*_golden_maps(0), 0.001, 10.0).tolist()
    assert whole == pytest.approx([block["image0_full_frame"][name] for name in ("rmse", "abs_rel", "a1")], rel=1e-7)


def test_siglog__golden_loss(golden: dict[str, Any]) -> None:
    block, (predicted, truth) = golden["D_depth"], _golden_maps(0)
    crop = (slice(4, 47), slice(4, 60))
    predicted, truth = predicted[crop], truth[crop]
    is_valid = (truth > 0.001) & (truth < 10)
    guess = predicted[is_valid].clamp(0.001, 10)
    assert float(siglog(guess, truth[is_valid])) == pytest.approx(block["image0_siglog_loss"], rel=1e-8)
    level = siglog(guess, truth[is_valid], level_only=True)
    assert float(level) == pytest.approx(block["image0_siglog_loss_during_first_100_calls"], rel=1e-7)


def test_siglog__slope_is_finite_where_everything_is_right() -> None:
    predicted = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    siglog(predicted, torch.tensor([1.0, 2.0, 4.0])).backward()
    assert predicted.grad is not None and predicted.grad.tolist() == [0, 0, 0]


def test_binned_distance__golden_bins(golden: dict[str, Any]) -> None:
    bins, places = np.meshgrid(np.arange(256), np.arange(6))
    logits = torch.from_numpy(np.sin(0.05 * (bins + 1) * (places + 1)))
    found = binned_distance(logits, 0.001, 10.0).tolist()
    assert found == pytest.approx(golden["D_bins"]["relu_plus_0p1_linear_norm"], rel=1e-8)


class StoredDepths:
    """Stands in for a `Dataset` of distances that were never written to disk."""

    def __init__(self, maps: Sequence[npt.NDArray[Any]]) -> None:
        self._maps = maps
        self.num_samples = len(maps)

    def where(self, sample_idx: int) -> str:
        return f"k{sample_idx}"

    def read(self, sample_idx: int) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, self._maps[sample_idx])
        return {"__key__": f"k{sample_idx}", "depth.npy": file.getvalue()}


def _dense(
    patches: npt.NDArray[Any], maps: Sequence[npt.NDArray[Any]], sequences: dict[str, str] | None = None
) -> Dense[DepthMaps]:
    stored: Any = StoredDepths(maps)
    labels = DepthMaps(stored, label=LABELS["depth.png"], scale=0.001, sequences=sequences or {})
    return Dense(patches.astype(np.float16), labels)


def _rooms(num_images: int, seed: int, factor: float = 1.0) -> tuple[npt.NDArray[Any], list[npt.NDArray[Any]]]:
    """Patch maps (n, 4, 4, 8) whose first channel is the distance of the patch, and that as maps of 16 x 12 pixels."""
    rng = np.random.default_rng(seed)
    meters = rng.uniform(0.8, 6.0, (num_images, 4, 4))
    patches = np.concatenate((meters[..., None], 0.1 * rng.standard_normal((num_images, 4, 4, 7))), axis=-1)
    maps = upsampled(torch.from_numpy(meters)[None], (16, 12))[0].numpy()
    return patches, list((factor * maps).astype(np.float32))


def _score(train: Dense[DepthMaps], test: Dense[DepthMaps], **changed: Any) -> Any:
    return score(train, test, num_classes=0, params={**PARAMS, **changed}, seed=0, device=CPU)


def test_score__tokens_that_tell_the_distance_beat_the_position_prior() -> None:
    outcome = _score(_dense(*_rooms(30, 0)), _dense(*_rooms(10, 1)))
    assert set(outcome.metrics) == {metric.name for metric in SPEC.metrics}
    assert outcome.metrics["rmse"] < 0.6 * outcome.metrics["rmse_position_prior"]
    assert outcome.metrics["delta1"] > 0.2 + outcome.metrics["delta1_position_prior"]
    assert outcome.metrics["rmse_ci_low"] < outcome.metrics["rmse"] < outcome.metrics["rmse_ci_high"]
    assert outcome.details["range_m"] == [0.001, 10.0]


def test_score__constant_tokens_give_one_distance_and_no_crash() -> None:
    _, maps = _rooms(6, 0)
    split = _dense(np.full((6, 4, 4, 3), 2.0), maps)
    outcome = _score(split, split)
    assert 0.9 < outcome.metrics["rmse"] / np.concatenate(maps).std() < 1.5
    assert outcome.metrics["rmse_position_prior"] < outcome.metrics["rmse"]


def test_score__the_range_follows_the_training_images_and_far_pixels_count_nowhere() -> None:
    far = _score(_dense(*_rooms(10, 0, factor=8.0)), _dense(*_rooms(4, 1, factor=8.0)))
    assert far.details["range_m"] == [0.001, 80.0]
    outcomes = []
    for beyond in (np.nan, 0.0, 50.0):
        (patches, maps), (test_patches, test_maps) = _rooms(10, 0), _rooms(4, 1)
        for one in maps:
            one[15, 11] = beyond  # less than a hundredth of the pixels
        for one in test_maps:
            one[:8] = beyond
        outcomes.append(_score(_dense(patches, maps), _dense(test_patches, test_maps)))
    assert outcomes[0] == outcomes[1] == outcomes[2]


def test_score__images_without_distances_are_not_scored_and_only_such_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches, maps = _rooms(6, 1)
    maps[2] = np.zeros_like(maps[2])
    train = _dense(*_rooms(10, 0))
    outcome = _score(train, _dense(patches, maps))
    assert outcome.details["num_scored"] == len(outcome.per_sample) == 5 and np.isfinite(outcome.metrics["rmse"])
    monkeypatch.setattr(f"{score.__module__}._Fit", None)  # it trains
    with pytest.raises(EvaluationError, match=r"no test image has a distance between 0\.001 and 10 m"):
        _score(train, _dense(patches[2:3], maps[2:3]))
    with pytest.raises(EvaluationError, match="no distance was measured in the training images"):
        _score(_dense(patches[[2, 2]], [maps[2]] * 2), train)
    with pytest.raises(EvaluationError, match="set depth_scale in dataset"):
        _score(_dense(*_rooms(4, 0, factor=1000.0)), train)


def test_score__test_labels_do_not_choose_the_head() -> None:
    train, (patches, maps) = _dense(*_rooms(12, 0)), _rooms(6, 1)
    honest, shuffled = _score(train, _dense(patches, maps)), _score(train, _dense(patches, maps[1:] + maps[:1]))
    assert shuffled.details["val_rmse_by_lr"] == honest.details["val_rmse_by_lr"]
    assert shuffled.metrics["rmse"] > 1.2 * honest.metrics["rmse"]


def test_score__sequences_stay_whole() -> None:
    sequences = {f"k{i}": "day" if i < 6 else "night" for i in range(12)}
    outcome = _score(_dense(*_rooms(12, 0), sequences), _dense(*_rooms(8, 1), sequences), min_steps=5)
    assert outcome.details["selection"] == "2 fold(s) of sequences"
    assert outcome.details["interval_over"] == "7 blocks of frames"


def test_score__one_training_image_is_refused() -> None:
    split = _dense(*_rooms(1, 0))
    with pytest.raises(EvaluationError, match="at least 2 training images, got 1"):
        _score(split, split)


def test_evaluate__as_it_is_named(
    checkpoint: Callable[..., Path], tmp_path: Path, png: Callable[..., bytes], write_shards: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from dataclasses import replace

    monkeypatch.setitem(PROTOCOLS, "depth", replace(SPEC, params=PARAMS))
    rng, root = np.random.default_rng(0), tmp_path / "rooms"
    for split, count in (("train", 4), ("test", 3)):
        samples = [
            {
                "png": png(rng.integers(0, 255, (16, 16, 3), np.uint8)),
                "depth.png": png(rng.integers(500, 4000, (12, 16)).astype(np.uint16)),
            }
            for _ in range(count)
        ]
        write_shards(root, split, samples)
    (root / "dataset.json").write_text(json.dumps({}))
    result = evaluate(checkpoint(), SPEC.name, EvaluationData("rooms", root), store=tmp_path / "runs")
    assert 0 < result.metrics["rmse"] < 4


def test_score__the_mean_distance_of_a_real_room(pixel_patches: Callable[..., Dense[DepthMaps]]) -> None:
    train = pixel_patches("rgbd_7scenes", "train", range(100), (6, 8))
    test = pixel_patches("rgbd_7scenes", "test", range(25), (6, 8))
    outcome = _score(train, test, min_steps=5, epochs=1, lrs=(1e-2,))
    # What the data set states of itself is of pooled pixels, by 0.547 m, 0.217 and 0.554.
    assert outcome.metrics["rmse_position_prior"] == pytest.approx(0.547, abs=0.02)
    assert outcome.metrics["abs_rel_position_prior"] == pytest.approx(0.217, abs=0.005)
    assert outcome.metrics["delta1_position_prior"] == pytest.approx(0.554, abs=0.01)
