"""The facts of the nearest-neighbour vote; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="knn",
    summary="weighted vote of the 20 nearest training images by cosine, temperature 0.07, on standardised [CLS, mean]",
    target="evaluation.protocols.knn.score:score",
    version=2,
    tokens="pooled",
    label="cls",
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("top1_pixels", better=None),  # of raw pixels by the same head, see `evaluation.floor`
        Metric("top1_distances", better=None),  # of clouds, the same
        Metric("top1_cls"),  # of the CLS token as it is, where there is one
        Metric("top1_patch_mean"),  # of the mean of patch tokens as it is
    ),
    params=MappingProxyType({"k": 20, "temperature": 0.07, "diagnostic_ks": (1, 5, 10, 20, 50, 100, 200)}),
)
