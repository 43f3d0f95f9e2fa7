"""Label-free scores of patch tokens: golden outliers, patches that are alike, registers, encoders without layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.extraction.points import POINTS
from evaluation.extraction.recipe import feature_recipe
from evaluation.protocols.token_health.score import cls_cosine, outlier_threshold, pair_cosine
from evaluation.registry import PROTOCOLS, fitting


def test_outlier_threshold__golden(golden: dict[str, Any]) -> None:
    lengths = 20 + 3 * np.sin(0.7 * np.arange(196))
    lengths[[5, 77, 150]] = 160, 240, 95
    block, found = golden["K_artifact"], torch.from_numpy(lengths)
    threshold = outlier_threshold(found, 5.0)
    assert threshold == pytest.approx(block["median"] + 5 * 1.4826 * block["mad"], rel=1e-8)
    share = float((found > threshold).double().mean())
    assert share == pytest.approx(block["frac_above_median_plus_5_scaled_mad"], abs=1e-9)


def test_outlier_threshold__rounding_makes_no_outliers() -> None:
    lengths = torch.full((196,), 20.0)
    lengths[3] += 1e-5
    assert not (lengths > outlier_threshold(lengths, 5.0)).any()


def test_cosines__are_those_of_all_pairs() -> None:
    tokens = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    pairs = [(a, b) for a in range(5) for b in range(5) if a != b]
    by_hand = torch.stack([F.cosine_similarity(tokens[:, a], tokens[:, b]) for a, b in pairs]).mean(0)
    assert torch.allclose(pair_cosine(tokens), by_hand, atol=1e-6)
    to_first = torch.stack([F.cosine_similarity(tokens[:, 0], tokens[:, b]) for b in range(1, 5)]).mean(0)
    assert torch.allclose(cls_cosine(tokens[:, 0], tokens[:, 1:]), to_first, atol=1e-6)


def test_evaluate__patches_that_are_all_alike(
    checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path
) -> None:
    """Samples need no labels of classes."""

    def blind(tensors: dict[str, Tensor]) -> None:
        for name in ("patch_embed.proj.weight", "pos_embed"):
            tensors[name].zero_()

    seen = evaluate(checkpoint(depth=2, reg_tokens=2), "token_health", halves, store=tmp_path / "runs")
    assert set(seen.metrics) == {metric.name for metric in PROTOCOLS["token_health"].metrics}
    assert seen.metrics["patch_cosine_ci_low"] < seen.metrics["patch_cosine"] < 0.999
    assert len(seen.details["patch_cosine_by_layer"]) == len(seen.details["cls_patch_cosine_by_layer"]) == 2
    alike = evaluate(checkpoint(edit=blind, depth=2, reg_tokens=2), "token_health", halves, store=tmp_path / "runs")
    assert alike.metrics["patch_cosine"] == pytest.approx(1, abs=1e-5)
    assert alike.metrics["outlier_share"] == 0 and alike.metrics["max_over_median"] == pytest.approx(1, abs=1e-5)
    assert alike.metrics["cls_patch_cosine"] < 0.99  # the class token is another


def test_evaluate__one_patch_is_refused(
    checkpoint: Callable[..., Path], halves: EvaluationData, tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match="at least 2 patches; give a larger image_size"):
        evaluate(checkpoint(), "token_health", halves, store=tmp_path / "runs", image_size=8)


def test_kinds__other_encoders_are_refused_by_kind() -> None:
    assert "token_health" in fitting("image") and "token_health" not in fitting("points")
    with pytest.raises(EvaluationError, match="'token_health' is for backbones of kind image; backbone 'x' is of kind"):
        feature_recipe(POINTS, PROTOCOLS["token_health"], {"kind": "points", "name": "x", "settings": {}}, None)
