"""The facts of the linear support vector machine; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="svm",
    summary="linear SVM on standardised frozen features ([max, mean] of points), C chosen on held-out train samples",
    target="evaluation.protocols.svm.score:score",
    version=2,  # 2: C = 10 as well
    tokens="pooled",
    label="cls",
    usual_for=("points",),
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("val_top1"),
        Metric("top1_distances", better=None),  # of clouds, by the same head, see `evaluation.floor`
        Metric("top1_c1"),  # C = 1 on the features as they are, scikit-learn's default
    ),
    params=MappingProxyType(
        {
            "cs": (0.001, 0.01, 0.075, 0.1, 1.0, 10.0),
            "folds": 3,  # below `holdout_from` training samples; one held-out third above
            "holdout_from": 2000,
        }
    ),
)
