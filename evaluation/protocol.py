"""What an evaluation is, without torch: `Protocol`, `Metric`, how scores are compared and written, and the error.

A `Protocol` states everything that decides a score besides weights and data. A `Metric` states what a number means, so
that nobody who chooses, sorts or prints scores has to assume that they are fractions of which more is better.

Not here: the protocols themselves (`evaluation.protocols`), finding them by name (`evaluation.registry`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Literal, TypeVar

__all__ = [
    "CI_SUFFIXES",
    "FLOORS",
    "FRACTION",
    "LABELS",
    "BrokenError",
    "EvaluationError",
    "Label",
    "Metric",
    "Protocol",
    "best",
    "described",
    "floors",
    "format_interval",
    "format_value",
    "less_is_better",
    "ranked",
]

FRACTION = "fraction"
# What takes no backbone, by the end of the name of a metric that is only reported, beside the one that it is a floor
# of: what people call it. The first two are in the place of a digest of weights, too (`evaluation.floor`).
FLOORS: Mapping[str, str] = MappingProxyType(
    {
        "pixels": "raw pixels",
        "distances": "distances of points",
        "position_prior": "position prior",
        "position": "distance of patches",
        "whole_image": "the whole image",
        "static": "labels that stay",
        "constant": "best constant",
        "neighbors": "mean of neighbors",
    }
)
CI_SUFFIXES = ("_ci_low", "_ci_high")  # of the metrics that bound the 95 % interval of another

Key = TypeVar("Key", int, tuple[float, int])


class EvaluationError(ValueError):
    """An evaluation that cannot be done as asked, in one line: what, where, what is allowed."""


class BrokenError(EvaluationError):
    """An evaluation that would be possible, had not its weights diverged or its disk failed."""


@dataclass(frozen=True)
class Metric:
    """What one number of a protocol means.

    Attributes:
        unit: "fraction" (of 1, written as percent), or what to write behind the number: "m", "dB", or "" for nothing.
        better: Which scores are better; None for numbers that are only reported (bounds of intervals, comparisons).
        headline: Whether this number stands for the protocol in tables and charts.

    Raises:
        EvaluationError: `better` is something else, or a headline has no direction.
    """

    name: str
    unit: str = FRACTION
    better: Literal["higher", "lower"] | None = "higher"
    headline: bool = False

    def __post_init__(self) -> None:
        if self.better not in ("higher", "lower", None):
            raise EvaluationError(f"metric {self.name!r}: better={self.better!r}; allowed: 'higher', 'lower', None")
        if self.headline and self.better is None:
            raise EvaluationError(f"metric {self.name!r}: better=None, but the headline needs 'higher' or 'lower'")


@dataclass(frozen=True)
class Label:
    """Where samples hold what a protocol predicts, and of which form it is.

    Attributes:
        fields: Sample fields of which one holds it, the preferred first.
        axes: Of the map that it is, 2 of an image and 3 of a volume; 0: one class index for the sample.
        array: Which array of an npz it is.
        values: What it holds: indices of classes, distances from the camera, or lists of several classes per sample.
    """

    fields: tuple[str, ...]
    axes: int = 0
    array: str = "label"
    values: Literal["classes", "meters", "several"] = "classes"


# What `Protocol.label` may be.
LABELS: Mapping[str, Label] = MappingProxyType(
    {
        "cls": Label(("cls",)),
        "labels.json": Label(("labels.json",), values="several"),
        "seg.png": Label(("seg.png",), axes=2),
        "seg.npy": Label(("seg.npy", "labels.npy", "npz"), axes=3),
        "depth.png": Label(("depth.png", "depth.npy"), axes=2, values="meters"),
    }
)


@dataclass(frozen=True)
class Protocol:
    """One way to evaluate a frozen backbone.

    Attributes:
        target: "module:function" of the head, called as
            `score(train, test, *, num_classes, params, seed, device) -> Outcome`; with tokens="decoded" as
            `score(held_out, *, params, seed) -> Outcome`. `num_classes` is 0 where labels are no classes.
        version: Raised whenever the code behind `target` changes what it computes.
        tokens: "pooled" gives the head `extract.Pooled` (CLS and mean of patches), "patches" gives `extract.Dense`,
            "encoder" `extract.Frozen`: the samples and the encoder, which the protocol runs as it likes;
            "decoded" `extract.Decoded`: held-out samples, and what the encoder and the decoder of the checkpoint make
            of them where a part is hidden.
        label: What the target is, a key of `LABELS`: "cls" the class of a sample, "labels.json" a list of classes that
            it belongs to, with tokens="pooled", "seg.png" a map of classes over an
            image, "seg.npy" one over a volume, "depth.png" a map of distances in meters; None of a protocol that needs
            none, as those with tokens="decoded" do.
        metrics: What the head reports. A plain name is accepted and means a fraction of which more is better. The
            headline is the one that says so, else the first that has a direction.
        params: Every number the head depends on.
        usual_for: Kinds of backbones that are evaluated so unless protocols are named; None: all that it fits.
        kinds: Kinds of backbones that it is for; None: all that give its `tokens`.
        num_layers: With tokens="pooled", of how many of the last layers there are features, see `Pooled.inner`.

    Raises:
        EvaluationError: An unknown label, no metric with a direction, a name twice, or more than one headline.
    """

    name: str
    summary: str
    target: str
    version: int
    tokens: Literal["pooled", "patches", "encoder", "decoded"]
    label: str | None
    metrics: tuple[Metric, ...]
    params: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    usual_for: tuple[str, ...] | None = None
    num_layers: int = 1
    kinds: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.label not in ([None] if self.tokens == "decoded" else [*LABELS, None]):
            known = "None is allowed" if self.tokens == "decoded" else f"known are {', '.join(LABELS)}, and None"
            raise EvaluationError(f"protocol {self.name!r}: label={self.label!r}; {known}")
        try:
            object.__setattr__(self, "metrics", described(self.metrics))
        except EvaluationError as error:
            raise EvaluationError(f"protocol {self.name!r}: {error}") from None

    @property
    def headline(self) -> Metric:
        """The metric that stands for the protocol."""
        return next(metric for metric in self.metrics if metric.headline)

    @property
    def target_label(self) -> Label | None:
        """Where samples hold the target; None: they need none."""
        return None if self.label is None else LABELS[self.label]


def described(metrics: Iterable[Metric | str]) -> tuple[Metric, ...]:
    """`metrics` with `Metric(name)` for plain names and with one headline: the first with a direction, if none says so.

    Raises:
        EvaluationError: No metric has a direction, a name occurs twice, or more than one is the headline.
    """
    found = [Metric(metric) if isinstance(metric, str) else metric for metric in metrics]
    names = [metric.name for metric in found]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise EvaluationError(f"names metrics twice: {', '.join(repeated)}")
    headlines = [metric.name for metric in found if metric.headline]
    if len(headlines) > 1:
        raise EvaluationError(f"has {len(headlines)} headlines ({', '.join(headlines)}); one metric stands for it")
    if not headlines:
        first = next((idx for idx, metric in enumerate(found) if metric.better is not None), None)
        if first is None:
            raise EvaluationError("has no metric with a direction; at least one needs better='higher' or 'lower'")
        found[first] = replace(found[first], headline=True)
    return tuple(found)


def floors(metric: Metric, reported: Iterable[Metric]) -> dict[str, str]:
    """Which floors a metric has: what people call each, by the name of the metric that says what it scores.

    Args:
        metric: of a record.
        reported: all metrics of that record.
    """
    ends = {f"{metric.name}_{end}": name for end, name in FLOORS.items()}
    return {other.name: ends[other.name] for other in reported if other.better is None and other.name in ends}


def best(scores: Mapping[Key, float], metric: Metric) -> Key | None:
    """The key of the best score; of equal scores the smallest key; None when no score is finite.

    Keys are what is chosen from: the step of a checkpoint, the version of a model, the row of a table. So of two
    checkpoints that score the same the earlier one is best.

    Raises:
        EvaluationError: `metric` has no direction.
    """
    order = ranked(scores, metric)
    return order[0] if order else None


def ranked(scores: Mapping[Key, float], metric: Metric) -> list[Key]:
    """Keys from the best to the worst score by the rule of `best`; scores that are not finite are left out.

    Raises:
        EvaluationError: `metric` has no direction.
    """
    finite = [key for key in scores if math.isfinite(scores[key])]
    return sorted(finite, key=lambda key: (less_is_better(scores[key], metric), key))


def less_is_better(score: float, metric: Metric) -> float:
    """`score` by a scale on which less is better, whatever the direction of `metric`.

    Raises:
        EvaluationError: `metric` has no direction.
    """
    if metric.better is None:
        raise EvaluationError(f"metric {metric.name!r} is only reported; scores of it cannot be compared")
    return -score if metric.better == "higher" else score


def format_value(value: float, unit: str) -> str:
    """A score for people: `0.125` is "12.5%" as a fraction, "0.125 m" in meters, "0.125" without a unit."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.1%}" if unit == FRACTION else f"{value:.4g} {unit}".rstrip()


def format_interval(low: float, high: float, unit: str) -> str:
    """The bounds of an interval for people: "52.1-56.5%" as fractions, "0.125 m to 0.375 m" in meters."""
    bounds = [format_value(bound, unit) for bound in (low, high)]
    return "-".join([bounds[0].removesuffix("%"), bounds[1]]) if unit == FRACTION else " to ".join(bounds)
