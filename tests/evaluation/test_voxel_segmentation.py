"""Linear segmentation of volumes: interpolation, loss, metrics beside scikit-learn's, selection, degenerate inputs."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from sklearn.metrics import f1_score

from evaluation.data import LabelMaps
from evaluation.extraction.forward import Dense
from evaluation.metrics import dice_per_class, foreground_dice, jackknife_interval
from evaluation.protocol import LABELS, EvaluationError
from evaluation.protocols.linear_maps import (
    Fit,
    Standardiser,
    Whitener,
    _soft_dice_loss,
    draw_places,
    logits_at,
    upsampled,
)
from evaluation.protocols.voxel_segmentation import score as module
from evaluation.registry import PROTOCOLS

CPU = torch.device("cpu")
PARAMS = {
    **PROTOCOLS["voxel_segmentation"].params,
    "min_steps": 60,
    "epochs": 1,
    "lrs": (0.03, 0.3),
    "voxels_per_volume": 600,
    "voxels_per_step": 300,
}


class _Stored:
    """Stands in for a `Dataset` of label volumes."""

    def __init__(self, volumes: Sequence[npt.NDArray[Any]]) -> None:
        self._volumes, self.num_samples = volumes, len(volumes)

    def read(self, sample_idx: int) -> dict[str, Any]:
        file = io.BytesIO()
        np.save(file, self._volumes[sample_idx])
        return {"__key__": f"k{sample_idx}", "seg.npy": file.getvalue()}


def _dense(patches: npt.NDArray[Any], volumes: Sequence[npt.NDArray[Any]], num_classes: int = 3) -> Dense:
    stored: Any = _Stored(volumes)
    label = LABELS["seg.npy"]
    maps = LabelMaps(stored, num_classes=num_classes, ignore_index=255, sequences={}, label=label)
    return Dense(patches.astype(np.float16), maps)


def _scene(num_volumes: int, seed: int) -> tuple[npt.NDArray[Any], list[npt.NDArray[np.uint8]]]:
    """Maps (n, 3, 4, 2, 5) of tokens whose first three channels tell the class, and their labels of 12 x 12 x 8."""
    rng = np.random.default_rng(seed)
    classes = rng.choice(3, (num_volumes, 3, 4, 2), p=(0.6, 0.2, 0.2))
    patches = np.concatenate((np.eye(3)[classes], np.zeros((num_volumes, 3, 4, 2, 2))), axis=-1)
    patches += 0.1 * rng.standard_normal(patches.shape)
    return patches, [np.kron(one, np.ones((4, 3, 4))).astype(np.uint8) for one in classes]


def _score(train: Dense, test: Dense, num_classes: int = 3) -> Any:
    return module.score(train, test, num_classes=num_classes, params=PARAMS, seed=0, device=CPU)


def test_upsampled__is_linear_along_each_axis() -> None:
    values = np.random.default_rng(0).random((3, 4, 2))
    expected = values
    for axis, size in enumerate((7, 8, 5)):
        have = expected.shape[axis]
        at = (np.arange(size) + 0.5) * have / size - 0.5
        expected = np.apply_along_axis(lambda line, x=at: np.interp(x, np.arange(len(line)), line), axis, expected)
    found = upsampled(torch.from_numpy(values)[None, None], (7, 8, 5))[0, 0]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_whitener__no_axis_is_smaller_than_another() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((20, 3, 4, 2, 5)) * [0.1, 1, 2, 3, 4] + 5 * rng.standard_normal((20, 3, 4, 2, 1)) + 2
    whitened = Whitener.of(tokens.astype(np.float16), CPU)(torch.from_numpy(tokens).float()).flatten(0, -2).numpy()
    np.testing.assert_allclose(np.cov(whitened.T), np.eye(5), atol=0.1)
    constant = np.concatenate((tokens[..., :2], np.full_like(tokens[..., :1], 7)), axis=-1)
    assert np.isfinite(Whitener.of(constant.astype(np.float16), CPU)(torch.from_numpy(constant).float()).numpy()).all()


def test_logits_at__drawn_voxels_are_those_of_the_upsampled_map() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(7 * 8 * 5).reshape(7, 8, 5)  # each voxel a class of its own, so that a label says where it is
    places = draw_places(_dense(np.zeros((1, 1, 1, 1, 1)), [labels.astype(np.int16)], 280).labels, 280, 50, seed=0)
    logits = torch.from_numpy(rng.random((1, 2, 3, 4, 2)))
    found = logits_at(logits, places.points.double())
    expected = upsampled(logits, labels.shape).flatten(2)[:, :, places.labels[0].long()]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_soft_dice__is_what_loops_say() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.standard_normal((2, 3, 4, 6)), rng.integers(-1, 3, (2, 6))  # class 3 never occurs
    shares = np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)
    expected = []
    for head in range(3):
        scores = []
        for one in (1, 2):
            valid = labels >= 0
            share, truth = shares[:, head, one][valid], labels[valid] == one
            scores.append(2 * share[truth].sum() / (share.sum() + truth.sum()))
        expected.append(1 - np.mean(scores))
    repeated = torch.from_numpy(labels)[:, None].expand(-1, 3, -1)
    np.testing.assert_allclose(_soft_dice_loss(torch.from_numpy(logits), repeated).numpy(), expected, rtol=1e-12)


def test_dice__is_scikit_learns_f1() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 4, 500), rng.integers(0, 4, 500)
    confusion = torch.zeros(5, 5, dtype=torch.int64)
    np.add.at(confusion.numpy(), (truth, predicted), 1)
    dice = dice_per_class(confusion)
    np.testing.assert_allclose(dice[:4].numpy(), f1_score(truth, predicted, average=None), rtol=1e-12)
    assert dice[4].isnan()  # in neither, so it does not count
    assert float(foreground_dice(confusion)) == pytest.approx(float(dice[1:4].mean()))


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(predicted, truth) of what is counted, of each test volume in turn."""
    seen: list[tuple[Any, Any]] = []
    original = module.confusion_matrix

    def counted(predicted: torch.Tensor, truth: torch.Tensor, num_classes: int) -> torch.Tensor:
        seen.append((predicted.numpy(), truth.numpy()))
        return original(predicted, truth, num_classes)

    monkeypatch.setattr(module, "confusion_matrix", counted)
    return seen


def test_score__tokens_that_tell_the_class(judged: list[tuple[Any, Any]]) -> None:
    outcome = _score(_dense(*_scene(30, 0)), _dense(*_scene(12, 1)))
    assert set(outcome.metrics) == {metric.name for metric in PROTOCOLS["voxel_segmentation"].metrics}
    assert outcome.metrics["dice"] > 0.7 > 0.4 > outcome.metrics["dice_position_prior"]
    assert outcome.metrics["dice_ci_low"] < outcome.metrics["dice"] < outcome.metrics["dice_ci_high"]
    volumes = judged
    predicted, truth = (np.concatenate([one[part] for one in volumes]) for part in (0, 1))
    expected = f1_score(truth, predicted, average=None, labels=[0, 1, 2])
    np.testing.assert_allclose(outcome.details["dice_per_class"], expected, rtol=1e-9)
    assert outcome.metrics["dice"] == pytest.approx(expected[1:].mean())
    each = [f1_score(true, guess, average="macro", labels=[1, 2], zero_division=np.nan) for guess, true in volumes]
    assert outcome.metrics["dice_per_volume"] == pytest.approx(np.nanmean(each), abs=1e-6)


def test_score__what_tells_the_class_may_be_small_beside_what_all_channels_share() -> None:
    """As of trained encoders, along few axes of which most of the variance lies; behind a `Standardiser` Dice was 0."""
    (train, train_labels), (test, test_labels) = _scene(30, 0), _scene(12, 1)
    for number, patches in enumerate((train, test)):
        patches += 30 * np.random.default_rng(number).standard_normal(patches[..., :1].shape)
    assert _score(_dense(train, train_labels), _dense(test, test_labels)).metrics["dice"] > 0.65


def test_score__test_labels_choose_nothing() -> None:
    patches, volumes = _scene(12, 1)
    train = _dense(*_scene(30, 0))
    honest, wrong = _score(train, _dense(patches, volumes)), _score(train, _dense(patches, volumes[1:] + volumes[:1]))
    assert honest.details["val_dice_by_lr"] == wrong.details["val_dice_by_lr"]
    assert wrong.metrics["dice"] < honest.metrics["dice"] - 0.3


def test_score__ignored_voxels_count_nowhere(judged: list[tuple[Any, Any]]) -> None:
    (train_patches, train), (test_patches, test) = _scene(20, 0), _scene(6, 1)
    for volume in (*train, *test):
        volume[:3] = 255
    outcome = _score(_dense(train_patches, train), _dense(test_patches, test))
    predicted, truth = (np.concatenate([one[part] for one in judged]) for part in (0, 1))
    assert (truth == -1).mean() == 0.25
    counts = truth >= 0
    expected = f1_score(truth[counts], predicted[counts], average=None, labels=[1, 2])
    assert outcome.metrics["dice"] == pytest.approx(expected.mean())


def test_score__constant_tokens_say_nothing() -> None:
    patches, volumes = _scene(10, 0)
    split = _dense(np.ones_like(patches), volumes)
    outcome = _score(split, split)
    assert outcome.metrics["dice"] < 0.35 and outcome.metrics["dice_ci_low"] >= 0


@pytest.mark.parametrize(
    ("change", "num_classes", "message"),
    [
        (lambda patches, volumes: (patches[:1], volumes[:1]), 3, "at least 2 training volumes, got 1"),
        (lambda patches, volumes: (patches, [v * 0 for v in volumes]), 1, "needs a class beside the ground"),
        (lambda patches, volumes: (patches, [v * 0 + 255 for v in volumes]), 3, "no labelled voxel in the training"),
    ],
)
def test_score__what_cannot_be_used(change: Callable[..., Any], num_classes: int, message: str) -> None:
    split = _dense(*change(*_scene(6, 0)), num_classes)
    with pytest.raises(EvaluationError, match=message):
        _score(split, split, num_classes)


def test_score__volumes_of_the_ground_alone_are_refused_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "Fit", None)  # it trains
    patches, volumes = _scene(6, 0)
    with pytest.raises(EvaluationError, match="the test volumes have no labelled voxel but of the ground"):
        _score(_dense(patches, volumes), _dense(patches, [volume * 0 for volume in volumes]))


def test_jackknife__covers_what_it_says_of_few_samples() -> None:
    """Dice of volumes that differ in size and difficulty: about 95 of 100 intervals hold the value of all volumes."""
    rng = np.random.default_rng(0)

    def volumes(number: int) -> torch.Tensor:
        size = rng.integers(100, 400, number)
        share = rng.beta(8, 3, number)
        hit = np.round(size * share).astype(int)
        missed, wrong = size - hit, rng.poisson(size * (1 - share))
        ground = np.full(number, 5000)
        counts = np.stack((np.stack((ground, wrong), 1), np.stack((missed, hit), 1)), 1)
        return torch.from_numpy(counts)  # (n, 2, 2)

    truth = float(foreground_dice(volumes(200_000).sum(dim=0)))
    for number in (5, 10, 20):
        intervals = [jackknife_interval(volumes(number), foreground_dice) for _ in range(400)]
        assert np.mean([low <= truth <= high for low, high in intervals]) > 0.92
        assert all(0 <= low < high <= 1 for low, high in intervals)


def test_jackknife__degenerate_counts() -> None:
    one = torch.tensor([[[90, 0], [0, 10]]])
    assert jackknife_interval(one, foreground_dice) == (0.0, 1.0)
    assert jackknife_interval(one.expand(5, -1, -1), foreground_dice) == (1.0, 1.0)


def test_fit__maps_of_stages_are_one_layer_on_all_of_them_upsampled() -> None:
    rng = np.random.default_rng(0)
    maps = [rng.standard_normal((2, *sides, dim)).astype(np.float16) for sides, dim in (((4, 6, 2), 3), ((2, 3, 1), 5))]
    _, volumes = _scene(2, 0)
    places = draw_places(_dense(maps[1], volumes).labels, 3, 40, seed=0)
    standardise = [Standardiser.of(tokens, CPU) for tokens in maps]
    settings: dict[str, Any] = {"per_step": 20, "params": PARAMS, "judge": float, "seed": 0, "device": CPU}
    fit = Fit(maps, places, standardise, 3, **settings)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(3, 8, generator=generator), torch.randn(3, generator=generator)
    size = (12, 18, 8)
    grids = [
        upsampled(one(torch.from_numpy(tokens).float()).movedim(-1, 1), size)
        for one, tokens in zip(standardise, maps, strict=True)
    ]
    logits = torch.einsum("kd,bdxyz->bkxyz", weight, torch.cat(grids, dim=1)) + bias.view(1, -1, 1, 1, 1)
    found = fit._logits(maps, weight, bias)
    torch.testing.assert_close(sum(upsampled(one, size) for one in found), logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(fit.predict(maps, weight, bias, size), logits.argmax(dim=1))


def test_score__a_finer_stage_tells_what_the_last_cannot() -> None:
    """The last stage is noise; the one before knows the class of each place."""
    (tokens, train_labels), (test_tokens, test_labels) = _scene(12, 0), _scene(6, 1)
    noise = np.random.default_rng(2).standard_normal((12, 2, 2, 1, 4))
    train = replace(_dense(noise, train_labels), finer=(tokens.astype(np.float16),))
    test = replace(_dense(noise[:6], test_labels), finer=(test_tokens.astype(np.float16),))
    blind = score_of(_dense(noise, train_labels), _dense(noise[:6], test_labels))
    assert score_of(train, test) > blind + 0.3


def score_of(train: Dense, test: Dense) -> float:
    outcome = module.score(train, test, num_classes=3, params=PARAMS, seed=0, device=CPU)
    return outcome.metrics["dice"]
