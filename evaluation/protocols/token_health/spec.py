"""The facts of the label-free scores of patch tokens; their code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="token_health",
    summary="label-free: how alike patch tokens of an image are, layer by layer, and how many are outliers in length",
    target="evaluation.protocols.token_health.score:score",
    version=1,
    tokens="encoder",
    label=None,
    kinds=("image",),
    usual_for=(),
    metrics=(
        Metric("patch_cosine", "", better="lower", headline=True),  # after the final norm, as heads are given them
        Metric("patch_cosine_ci_low", "", better=None),
        Metric("patch_cosine_ci_high", "", better=None),
        Metric("cls_patch_cosine", "", better=None),  # of encoders with a CLS token
        # Of the lengths of tokens before the final norm.
        Metric("outlier_share", better="lower"),
        Metric("max_over_median", "", better="lower"),
    ),
    params=MappingProxyType({"deviations": 5.0}),
)
