"""Spoiled patches: what is spoiled and what is not, whatever the batch; texture that stays where order is gone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.protocols.robustness.score import CORRUPTIONS, drawing, spoiled, to_images, to_patches
from evaluation.registry import PROTOCOLS


def _images(count: int = 2) -> Any:
    return torch.randint(0, 256, (count, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _rngs(*seeds: int) -> list[np.random.Generator]:
    return [np.random.default_rng(seed) for seed in seeds]


def test_to_patches__row_by_row_and_back() -> None:
    images = _images()
    patches = to_patches(images, (2, 3))
    assert patches.shape == (2, 6, 3, 4, 4)
    assert torch.equal(patches[:, 4], images[:, :, 4:8, 4:8])
    assert torch.equal(to_images(patches, (2, 3)), images)


@pytest.mark.parametrize("how", CORRUPTIONS)
def test_spoiled__only_at_those_places(how: str) -> None:
    patches = to_patches(_images(), (2, 3))
    places = torch.tensor([[4, 0], [1, 2]])
    found = spoiled(patches, places, how, _rngs(1, 2))
    is_changed = (found != patches).flatten(2).any(-1)
    assert is_changed.nonzero().tolist() == [[0, 0], [0, 4], [1, 1], [1, 2]]
    if how == "shuffle":
        assert torch.equal(found.flatten(3).sort(-1).values, patches.flatten(3).sort(-1).values)
    if how == "blur":
        assert found[0, 4].flatten(1).unique(dim=1).shape[1] == 1
        assert (found[0, 4].float().mean((1, 2)) - patches[0, 4].float().mean((1, 2))).abs().max() <= 0.5
    alone = spoiled(patches[1:], places[1:], how, _rngs(2))
    assert torch.equal(alone[0], found[1])


def test_drawing__is_another_for_each_seed_sample_and_purpose() -> None:
    first = [drawing(*of).random() for of in ((0, 0), (0, 1), (1, 0), (0, 0, "noise"), (0, 0, "shuffle"))]
    assert len(set(first)) == 5 and first[0] == drawing(0, 0).random()


def test_evaluate__colors_outlive_order_and_noise_does_harm(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = PROTOCOLS["robustness"]
    params = {**spec.params, "patches": (1, 24, 25)}  # of 25, of which all cannot be spoiled
    monkeypatch.setitem(PROTOCOLS, "robustness", dataclasses.replace(spec, params=params))
    result = evaluate(checkpoint(), "robustness", colours, store=tmp_path / "runs", image_size=40)
    metrics, cases = result.metrics, result.details["by_case"]
    assert set(metrics) == {metric.name for metric in spec.metrics}
    assert list(cases) == [f"{how} {count}" for how in ("noise", "blur", "shuffle") for count in (1, 24)]
    assert metrics["top1_clean"] == metrics["top1_permuted"] == cases["blur 24"]["top1"] == 1.0
    assert cases["noise 24"]["top1"] < cases["noise 1"]["top1"] == 1.0
    assert metrics["top1_perturbed"] == pytest.approx(sum(case["top1"] for case in cases.values()) / 6)
    assert metrics["drop"] == pytest.approx(1 - metrics["top1_perturbed"]) != 0
    assert cases["noise 24"]["cosine"] < cases["noise 1"]["cosine"] < 1
    assert 0.99 < cases["noise 24"]["cosine_unchanged"] < 1 - 1e-5  # attention spreads it
    assert metrics["top1_perturbed_ci_low"] < metrics["top1_perturbed"] < metrics["top1_perturbed_ci_high"]


def test_evaluate__the_batch_decides_nothing(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path
) -> None:
    backbone = checkpoint()
    one, other = (
        evaluate(backbone, "robustness", colours, store=tmp_path / f"runs{size}", batch_size=size) for size in (23, 5)
    )
    assert one.metrics == pytest.approx(other.metrics, abs=1e-5)
    again = evaluate(backbone, "robustness", colours, store=tmp_path / "seed", seed=1)
    assert again.metrics["cosine"] != pytest.approx(one.metrics["cosine"], abs=1e-6)


def test_evaluate__one_patch_is_refused(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="more patches than are spoiled; give a larger image_size"):
        evaluate(checkpoint(), "robustness", colours, store=tmp_path / "runs", image_size=8)
