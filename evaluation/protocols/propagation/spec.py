"""The facts of label propagation through videos; its code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]

SPEC = Protocol(
    name="propagation",
    summary="labels of the first frame carried through each video by the 5 most similar patches; nothing is trained",
    target="evaluation.protocols.propagation.score:score",
    version=1,
    tokens="patches",
    label="seg.png",
    metrics=(
        Metric("jf", headline=True),  # mean of region IoU (J) and F of boundaries, over objects
        Metric("jf_ci_low", better=None),
        Metric("jf_ci_high", better=None),
        Metric("j"),
        Metric("f"),
        Metric(
            "jf_static", better=None
        ),  # of the labels of the first frame for all frames, the same for every backbone
    ),
    params=MappingProxyType(
        {
            "last_frames": 7,  # beside the first
            "radius": 12,  # patches
            "neighborhood": "square",
            "top_k": 5,
            "temperature": 0.1,
            "boundary": 0.008,  # of the diagonal, how far boundaries may be apart
        }
    ),
    usual_for=(),
)
