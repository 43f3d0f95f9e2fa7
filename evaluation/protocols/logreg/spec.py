"""The facts of logistic regression; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="logreg",
    summary="logistic regression on standardised [CLS, mean of patches], C chosen on held-out train images",
    target="evaluation.protocols.logreg.score:score",
    version=1,
    tokens="pooled",
    label="cls",
    usual_for=(),
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("val_top1"),
    ),
    params=MappingProxyType(
        {
            "cs": tuple(10.0 ** (half / 2) for half in range(-12, 3)),  # 1e-6 to 10
            "tol": 1e-6,
            "max_iter": 1000,
            "folds": 5,  # below `holdout_from` training images; one held-out fifth above
            "holdout_from": 2000,
        }
    ),
)
