"""The facts of ridge regression on class indicators; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="ridge",
    summary="closed-form ridge regression on standardised [CLS, mean of patches], penalty chosen on train",
    target="evaluation.protocols.ridge.score:score",
    version=2,  # 2: penalties from 1e-8 on; of 10 000 photos 1e-4 was chosen, the least before
    tokens="pooled",
    label="cls",
    usual_for=(),
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("val_top1"),
        Metric("top1_raw"),  # of the features as they are, with a penalty chosen for these
    ),
    params=MappingProxyType(
        {
            "penalties": tuple(10.0**exponent for exponent in range(-8, 7)),  # times the mean eigenvalue
            "folds": 5,  # below `holdout_from` training images; one held-out fifth above
            "holdout_from": 2000,
        }
    ),
)
