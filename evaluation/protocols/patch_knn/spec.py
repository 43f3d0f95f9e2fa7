"""The facts of segmentation by nearest patches; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="patch_knn",
    summary="segmentation by the 30 nearest training patches, weighted exp(cosine / 0.02); nothing is trained",
    target="evaluation.protocols.patch_knn.score:score",
    version=1,
    tokens="patches",
    label="seg.png",
    metrics=(
        Metric("miou", headline=True),
        Metric("miou_ci_low", better=None),
        Metric("miou_ci_high", better=None),
        Metric("pixel_accuracy"),
        Metric("miou_position_prior", better=None),  # of the labels alone, the same for every backbone
    ),
    params=MappingProxyType(
        {
            "k": 30,
            "temperature": 0.02,
            "memory": 102_400,  # patches at most
            "most_void": 0.5,  # share of ignored pixels above which a patch is not remembered
        }
    ),
    usual_for=(),
)
