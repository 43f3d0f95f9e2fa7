"""The facts of the grid of linear probes; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="linear_grid",
    summary="DINOv2's grid of linear probes on cached features: learning rate x 1 or 4 layers x with mean of patches",
    target="evaluation.protocols.linear_grid.score:score",
    version=1,
    tokens="pooled",
    label="cls",
    usual_for=(),
    num_layers=4,
    metrics=(
        Metric("top1", headline=True),
        Metric("top1_ci_low", better=None),
        Metric("top1_ci_high", better=None),
        Metric("mean_class_top1"),
        Metric("val_top1"),
        Metric("top1_best_on_test", better=None),  # chosen with the test labels, so nothing may be chosen by it
    ),
    params=MappingProxyType(
        {
            # DINOv2's 13 and three more above them, for there are fewer steps than its 12 500.
            "base_lrs": (*(float(f"{first}e{exponent}") for exponent in range(-5, 0) for first in (1, 2, 5)), 1.0),
            "momentum": 0.9,
            "batch_size": 256,
            "min_steps": 300,
            "epochs": 30,
            "folds": 5,  # below `holdout_from` training images; one held-out fifth above
            "holdout_from": 2000,
        }
    ),
)
