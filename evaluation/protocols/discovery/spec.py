"""The facts of object discovery; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="discovery",
    summary="TokenCut: one box per image by a normalized cut of keys of the last attention layer; nothing is trained",
    target="evaluation.protocols.discovery.score:score",
    version=2,  # 2: mask_accuracy and mask_f
    tokens="encoder",
    label="seg.png",
    metrics=(
        Metric("corloc", headline=True),
        Metric("corloc_ci_low", better=None),
        Metric("corloc_ci_high", better=None),
        Metric("mask_iou"),  # as salient objects are scored: this, the share of right pixels, F with beta^2 = 0.3
        Metric("mask_accuracy"),
        Metric("mask_f"),
        Metric("edge_density", better=None),  # share of pairs of patches that are more alike than tau
        Metric("corloc_centered"),  # of keys without their mean over the image
        Metric("mask_iou_centered"),
        Metric("mask_accuracy_centered"),
        Metric("mask_f_centered"),
        Metric("corloc_tokens"),  # of patch tokens instead of keys
        Metric("mask_iou_tokens"),
        Metric("mask_accuracy_tokens"),
        Metric("mask_f_tokens"),
        Metric("corloc_whole_image", better=None),  # of the labels alone, the same for every backbone
        Metric("mask_iou_whole_image", better=None),
        Metric("mask_accuracy_whole_image", better=None),
        Metric("mask_f_whole_image", better=None),
    ),
    params=MappingProxyType({"tau": 0.2, "eps": 1e-5, "least_iou": 0.5}),
    usual_for=(),
)
