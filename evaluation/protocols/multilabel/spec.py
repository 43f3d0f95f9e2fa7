"""The facts of classification into several classes at once; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol
from evaluation.protocols.ridge.spec import SPEC as RIDGE

__all__ = ["SPEC"]

SPEC = Protocol(
    name="multilabel",
    summary="several classes per image: mAP of ridge regression on standardised [CLS, mean], penalty chosen on train",
    target="evaluation.protocols.multilabel.score:score",
    version=1,
    tokens="pooled",
    label="labels.json",
    usual_for=(),
    metrics=(
        Metric("map", headline=True),  # mean over classes of the average precision
        Metric("map_ci_low", better=None),
        Metric("map_ci_high", better=None),
        Metric("val_map"),
    ),
    params=MappingProxyType({**RIDGE.params, "blocks": 20}),  # of which each is left out in turn for the interval
)
