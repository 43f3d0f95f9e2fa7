"""The facts of the linear probe; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="linear",
    summary="linear classifier on frozen [CLS, mean of patches], learning rate chosen on held-out train images",
    target="evaluation.protocols.linear.score:score",
    version=1,
    tokens="pooled",
    label="cls",
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("top1_pixels", better=None),  # of raw pixels by the same head, see `evaluation.floor`
        Metric("top1_distances", better=None),  # of clouds, the same
        Metric("val_top1"),
        Metric("top1_best_on_test", better=None),  # chosen with the test labels, so nothing may be chosen by it
    ),
    params=MappingProxyType(
        {
            "lrs": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
            "momentum": 0.9,
            "batch_size": 256,
            "min_steps": 300,
            "epochs": 30,
            "folds": 5,  # below `holdout_from` training images; one held-out fifth above
            "holdout_from": 2000,
        }
    ),
)
