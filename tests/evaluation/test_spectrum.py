"""Label-free scores of pooled features: golden values, collapse, and what they need."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from evaluation.extraction.forward import Pooled
from evaluation.protocol import EvaluationError
from evaluation.protocols.spectrum.score import effective_rank, score, spread, uniformity
from evaluation.registry import PROTOCOLS

SPEC = PROTOCOLS["spectrum"]


def _score(rows: Tensor, cls: Tensor | None = None) -> Any:
    split = Pooled(cls, rows, torch.zeros(len(rows), dtype=torch.int64))
    nothing = dataclasses.replace(split, patch_mean=rows[:0])
    return score(split, nothing, num_classes=0, params=SPEC.params, seed=0, device=torch.device("cpu"))


@pytest.fixture
def matrix(golden: dict[str, Any]) -> Tensor:
    i, j = np.meshgrid(np.arange(160), np.arange(128), indexing="ij")
    rows = np.cos(0.37 * (i + 1) * (i + 1) * (j + 1) + j) * (j + 1.0) ** -0.6 + 0.05
    assert rows.sum() == pytest.approx(golden["B_matrix"]["sum"], abs=1e-7)
    return torch.from_numpy(rows)


def test_score__golden(golden: dict[str, Any], matrix: Tensor) -> None:
    block, outcome = golden["B_rankme"], _score(matrix, cls=matrix[:, :3])
    metrics = outcome.metrics
    assert metrics["rankme_mean"] == pytest.approx(block["paper_uncentred_sv_eps1e7"], rel=1e-8)
    assert metrics["effective_rank_mean"] == pytest.approx(block["centred_singular_values_eps1e7"], rel=1e-8)
    assert metrics["participation_ratio_mean"] == pytest.approx(block["participation_ratio"], rel=1e-7)
    assert metrics["alpha_mean"] == pytest.approx(golden["B_alphareq"]["alpha"], rel=1e-7)
    assert metrics["rankme_mean_ci_low"] < metrics["rankme_mean"] < metrics["rankme_mean_ci_high"]
    for count in (80, 32):  # fewer rows than features
        assert _score(matrix[:count]).metrics["rankme_mean"] == pytest.approx(
            block[f"paper_first_{count}_rows"], rel=1e-6
        )
    assert {metric.name for metric in SPEC.metrics} - set(metrics) == {"alpha_cls"}  # three features are too few for it
    assert metrics["rankme_cls"] <= 3.001


def test_score__collapse_is_seen() -> None:
    generator = torch.Generator().manual_seed(0)
    isotropic = torch.randn(400, 16, generator=generator)
    line = torch.randn(400, 1, generator=generator) * torch.randn(1, 16, generator=generator)
    healthy, collapsed = _score(isotropic).metrics, _score(line).metrics
    assert healthy["rankme_mean"] > 15.5 and healthy["std_mean"] == pytest.approx(1, abs=0.03)
    assert collapsed["rankme_mean"] < 1.1 and collapsed["participation_ratio_mean"] == pytest.approx(1)


def test_score__constant_features_have_rank_one() -> None:
    metrics = _score(torch.linspace(0.1, 3, 8).expand(57, 8)).metrics
    for name in ("rankme_mean", "effective_rank_mean", "participation_ratio_mean"):
        assert metrics[name] == pytest.approx(1, abs=1e-3)
    assert metrics["std_mean"] == pytest.approx(0, abs=1e-6) and metrics["uniformity_mean"] == pytest.approx(
        0, abs=1e-6
    )


def test_uniformity__of_opposite_rows() -> None:
    assert uniformity(torch.tensor([[3.0, 0], [-1, 0]])) == pytest.approx(-8)
    assert spread(torch.tensor([[3.0, 0], [-1, 0], [0, 2], [0, -7]])) == pytest.approx(1)


def test_effective_rank__counts_equal_directions() -> None:
    assert float(effective_rank(torch.tensor([4.0, 4.0, 4.0, 0.0]))) == pytest.approx(3, rel=1e-4)


def test_score__one_image_is_refused() -> None:
    with pytest.raises(EvaluationError, match="spectrum needs at least 2 training images, got 1"):
        _score(torch.ones(1, 4))
