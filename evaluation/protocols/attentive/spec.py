"""The facts of the attentive probe; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="attentive",
    summary="attentive probe: a learned query attends to the patch tokens, then a linear layer; learning rate by train",
    target="evaluation.protocols.attentive.score:score",
    version=1,
    tokens="patches",
    label="cls",
    kinds=("image",),
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
            "lrs": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
            "weight_decay": 0.01,
            "batch_size": 128,
            "min_steps": 300,
            "epochs": 20,
            "folds": 3,  # below `holdout_from` training images; one held-out third above
            "holdout_from": 2000,
        }
    ),
)
