"""The facts of robustness against spoiled patches; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="robustness",
    summary="nearest clean training images of test images with 1, 4, 16 patches spoiled, and with all out of order",
    target="evaluation.protocols.robustness.score:score",
    version=1,
    tokens="encoder",
    label="cls",
    kinds=("image",),
    usual_for=(),
    metrics=(
        Metric("top1_perturbed", headline=True),  # mean over corruptions and numbers of patches
        Metric("top1_perturbed_ci_low", better=None),
        Metric("top1_perturbed_ci_high", better=None),
        Metric("top1_clean"),
        Metric("drop", better="lower"),  # of top-1, from clean to perturbed
        Metric("cosine", ""),  # of CLS (without one, the mean of patches), clean and perturbed
        Metric("cosine_unchanged", ""),  # of tokens of patches that were left as they are
        # All patches out of order: texture stays and structure is gone. High ones say that texture was enough.
        Metric("top1_permuted", better=None),
        Metric("cosine_permuted", "", better=None),
    ),
    params=MappingProxyType(
        {"k": 20, "temperature": 0.07, "corruptions": ("noise", "blur", "shuffle"), "patches": (1, 4, 16)}
    ),
)
