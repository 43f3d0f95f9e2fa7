"""The facts of retrieval by class; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="retrieval",
    summary="test images of the same class found by cosine of standardised [CLS, mean of patches]: mAP and Recall@k",
    target="evaluation.protocols.retrieval.score:score",
    version=1,
    tokens="pooled",
    label="cls",
    usual_for=(),
    metrics=(
        Metric("map_trapz", headline=True),
        Metric("map_trapz_ci_low", better=None),
        Metric("map_trapz_ci_high", better=None),
        Metric("recall_1"),  # share of queries with one of their class among the first so many
        Metric("recall_5"),
        Metric("recall_10"),
        Metric("map_trapz_cls"),  # of the CLS token as it is, where there is one
        Metric("map_trapz_patch_mean"),  # of the mean of patch tokens as it is
    ),
    params=MappingProxyType({"max_queries": 10_000}),
)
