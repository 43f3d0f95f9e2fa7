"""What metrics mean, one rule for the best of several scores, one way to write them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from evaluation.protocol import EvaluationError, Metric, best, described, format_value, ranked
from evaluation.registry import PROTOCOLS

HIGHER = Metric("top1")
LOWER = Metric("error", unit="m", better="lower")


def test_best__follows_the_direction() -> None:
    scores = {20: 0.5, 40: 0.9, 60: 0.1}
    assert best(scores, HIGHER) == 40
    assert best(scores, LOWER) == 60
    assert ranked(scores, HIGHER) == [40, 20, 60]
    assert ranked(scores, LOWER) == [60, 20, 40]


@pytest.mark.parametrize("metric", [HIGHER, LOWER])
def test_best__of_equal_scores_the_smallest_key_whatever_the_order_of_arrival(metric: Metric) -> None:
    assert best({60: 0.5, 20: 0.5, 40: 0.5}, metric) == 20
    assert ranked({60: 0.5, 20: 0.5, 40: 0.5}, metric) == [20, 40, 60]


def test_best__scores_that_are_not_finite_are_never_best() -> None:
    assert best({20: math.nan, 40: math.inf, 60: 0.1}, HIGHER) == 60
    assert best({20: math.nan, 40: -math.inf, 60: 0.1}, LOWER) == 60
    assert best({20: math.nan}, HIGHER) is None
    assert best({}, LOWER) is None


def test_best__refuses_what_is_only_reported() -> None:
    with pytest.raises(EvaluationError, match="metric 'bound' is only reported"):
        best({20: 0.5}, Metric("bound", better=None))


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.1234, "fraction", "12.3%"),
        (0.42134, "m", "0.4213 m"),
        (23.456, "dB", "23.46 dB"),
        (1234.5, "", "1234"),
        (-0.5, "m", "-0.5 m"),
        (math.nan, "m", "nan"),
        (math.inf, "fraction", "inf"),
    ],
)
def test_format_value__writes_the_unit(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


def test_described__plain_names_are_fractions_of_which_more_is_better() -> None:
    assert described(("top1", "top5")) == (Metric("top1", "fraction", "higher", headline=True), Metric("top5"))


def test_described__the_headline_is_the_one_that_says_so_else_the_first_with_a_direction() -> None:
    bound = Metric("low", better=None)
    assert [metric.name for metric in described((bound, "a", "b")) if metric.headline] == ["a"]
    assert [metric.name for metric in described(("a", replace(LOWER, headline=True))) if metric.headline] == ["error"]


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ((), "protocol 'knn': has no metric with a direction"),
        ((Metric("a", better=None),), "protocol 'knn': has no metric with a direction"),
        (("a", "b", "a"), "protocol 'knn': names metrics twice: a"),
        ((Metric("a", headline=True), Metric("b", headline=True)), r"has 2 headlines \(a, b\); one metric stands"),
    ],
)
def test_protocol__refuses_metrics_that_contradict_each_other(metrics: tuple[Metric, ...], message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        replace(PROTOCOLS["knn"], metrics=metrics)


def test_metric__refuses_an_unknown_direction_and_a_headline_without_one() -> None:
    with pytest.raises(EvaluationError, match="metric 'a': better='more'; allowed: 'higher', 'lower', None"):
        Metric("a", better="more")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="metric 'a': better=None, but the headline needs 'higher' or 'lower'"):
        Metric("a", better=None, headline=True)
