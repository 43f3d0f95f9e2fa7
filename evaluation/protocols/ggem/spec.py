"""The facts of pooling by a group generalized mean; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol
from evaluation.protocols.attentive.spec import SPEC as ATTENTIVE

__all__ = ["SPEC"]

SPEC = Protocol(
    name="ggem",
    summary="group generalized mean (GGeM) of patch tokens with learned exponents, then a linear layer; rate by train",
    target="evaluation.protocols.ggem.score:score",
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
    params=MappingProxyType({**ATTENTIVE.params, "first_p": 3.0, "shift": 4.0, "p_rate": 10.0}),
)
