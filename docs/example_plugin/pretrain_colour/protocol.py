"""The facts of the evaluation. They are apart from its code, so that a command line that names it loads no torch."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.registry import Protocol

__all__ = ["CLASS_MEAN"]

CLASS_MEAN = Protocol(
    name="class_mean",
    summary="nearest class mean by cosine on the standardised mean of patch tokens; nothing is trained or chosen",
    target="pretrain_colour.class_mean:score",
    version=1,  # raise it whenever `score` computes something else: stored results are then made again
    tokens="pooled",
    label="cls",
    metrics=("top1", "top1_ci_low", "top1_ci_high", "rank_share"),
    params=MappingProxyType({"eps": 1e-6}),
)
