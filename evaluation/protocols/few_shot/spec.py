"""The facts of classification from a few labels; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

# (name, classes, labels of each); None: all classes. Those with a number of them are the table of Point-MAE.
_EPISODES = (
    ("top1_1shot", None, 1),
    ("top1_5shot", None, 5),
    ("top1_10shot", None, 10),
    ("top1_5way_10shot", 5, 10),
    ("top1_5way_20shot", 5, 20),
    ("top1_10way_10shot", 10, 10),
    ("top1_10way_20shot", 10, 20),
)
_NAMES = tuple(name for name, _, _ in _EPISODES)
_HEADLINE = "top1_5shot"

SPEC = Protocol(
    name="few_shot",
    summary="linear SVM fitted on 1, 5 or 10 labels per class of frozen features, mean of 10 draws; also 5 or 10 ways",
    target="evaluation.protocols.few_shot.score:score",
    version=1,
    tokens="pooled",
    label="cls",
    usual_for=("points",),
    metrics=(
        *(Metric(name, headline=name == _HEADLINE) for name in _NAMES),
        *(Metric(f"{name}_std", better=None) for name in _NAMES),
        Metric(f"{_HEADLINE}_ci_low", better=None),
        Metric(f"{_HEADLINE}_ci_high", better=None),
    ),
    params=MappingProxyType(
        {
            "episodes": _EPISODES,
            "headline": _HEADLINE,
            "draws": 10,
            "c": 1.0,
        }
    ),
)
