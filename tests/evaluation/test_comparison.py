"""Differences between two backbones on the same samples: intervals that hold, and what is not to be compared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation import EvaluationData, EvaluationError, evaluate
from evaluation.comparison import PerSample, difference
from evaluation.metrics import foreground_dice, mean_iou, tallies
from evaluation.protocol import Metric
from evaluation.results import ResultStore

TOP1 = Metric("top1", headline=True)


def test_difference__of_rights_and_wrongs_is_narrower_than_the_intervals_of_both() -> None:
    """31 lost and 52 won of 2000: the pair of the golden McNemar block, whose p is 0.028."""
    first, second = np.zeros(2000, bool), np.zeros(2000, bool)
    first[:700] = second[:700] = True
    first[700:731] = True
    second[731:783] = True
    found = difference("top1", PerSample(first), PerSample(second))
    assert found.value == pytest.approx(21 / 2000)
    assert found.low == pytest.approx(0.0015, abs=3e-4) and found.high == pytest.approx(0.0195, abs=3e-4)
    assert found.is_beyond_noise and found.is_better(TOP1) and not found.is_better(Metric("error", better="lower"))
    back = difference("top1", PerSample(second), PerSample(first))
    assert back == pytest.approx((-found.value, -found.high, -found.low))


def test_difference__few_samples_that_all_agree_are_no_certainty() -> None:
    same = PerSample(np.ones(10, bool))
    found = difference("top1", same, same)
    assert found.value == 0 and found.low < -0.1 and found.high > 0.1 and not found.is_beyond_noise


def test_difference__covers_the_truth_and_finds_nothing_where_nothing_is() -> None:
    rng = np.random.default_rng(0)
    covered = found = 0
    for _ in range(400):
        hard = rng.random(60)
        first, second = hard < rng.normal(0.5, 0.1, 60), hard < rng.normal(0.5, 0.1, 60)
        one = difference("top1", PerSample(first), PerSample(second))
        covered += one.low <= 0 <= one.high
        better = hard < rng.normal(0.8, 0.1, 60)
        found += difference("top1", PerSample(first), PerSample(better)).is_beyond_noise
    assert covered >= 0.93 * 400 and found >= 0.9 * 400


@pytest.mark.parametrize("metric", ["miou", "dice"])
def test_difference__of_summed_counts_is_that_of_the_scores(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(1, 50, (2, 30, 4, 4), generator=generator)
    counts[1] += 40 * torch.eye(4, dtype=torch.int64)  # better on every image
    first, second = (PerSample(tallies(one).numpy()) for one in counts)
    found = difference(metric, first, second)
    score = mean_iou if metric == "miou" else lambda confusion: float(foreground_dice(confusion))
    assert found.value == pytest.approx(score(counts[1].sum(0)) - score(counts[0].sum(0)), rel=1e-9)
    assert found.low > 0
    frames = [PerSample(np.repeat(one.values, 9, axis=0), np.repeat(np.arange(30), 9)) for one in (first, second)]
    assert difference(metric, *frames) == pytest.approx(found, rel=1e-6)


def test_difference__refuses_other_samples_and_unknown_scores() -> None:
    with pytest.raises(EvaluationError, match=r"shapes \(3,\) and \(4,\) are not of the same samples"):
        difference("top1", PerSample(np.ones(3, bool)), PerSample(np.ones(4, bool)))
    counts = PerSample(np.ones((3, 3, 2)))
    with pytest.raises(EvaluationError, match="'mine' follows from counts; known are miou, dice"):
        difference("mine", counts, counts)


@pytest.mark.parametrize("protocol", ["knn", "segmentation"])
def test_evaluate__keeps_what_its_headline_is_made_of(
    checkpoint: Callable[..., Path], colours: EvaluationData, halves: EvaluationData, tmp_path: Path, protocol: str
) -> None:
    data = halves if protocol == "segmentation" else colours
    result = evaluate(checkpoint(), protocol, data, store=tmp_path / "runs")
    store = ResultStore(tmp_path / "runs")
    kept = store.per_sample(result.key)
    assert kept is not None and len(kept.values) == result.details["num_test"]
    if protocol == "knn":
        assert kept.values.mean() == pytest.approx(result.metrics["top1"])
    else:
        assert difference("miou", kept, kept).value == 0
    (tmp_path / "runs" / "evaluations" / f"{result.key}.npz").write_bytes(b"PK damaged")
    assert store.per_sample(result.key) is None
