"""The facts of the label-free scores of pooled features; their code is in `score`."""

from __future__ import annotations

from types import MappingProxyType

from evaluation.protocol import Metric, Protocol

__all__ = ["SPEC"]


def _of(token: str) -> tuple[Metric, ...]:
    """What is said of one vector per image; only `rankme` has a direction, for these are alarms and no ranking."""
    names = ("effective_rank", "participation_ratio", "alpha", "std", "uniformity")
    return tuple(Metric(f"{name}_{token}", "", better=None) for name in names)


SPEC = Protocol(
    name="spectrum",
    summary="label-free: effective ranks, decay of the spectrum, spread and uniformity of CLS and of mean of patches",
    target="evaluation.protocols.spectrum.score:score",
    version=1,
    tokens="pooled",
    label=None,
    usual_for=(),
    metrics=(
        Metric("rankme_mean", "", headline=True),
        Metric("rankme_mean_ci_low", "", better=None),
        Metric("rankme_mean_ci_high", "", better=None),
        *_of("mean"),
        Metric("rankme_cls", ""),
        Metric("rankme_cls_ci_low", "", better=None),
        Metric("rankme_cls_ci_high", "", better=None),
        *_of("cls"),
    ),
    params=MappingProxyType(
        {
            "max_rows": 25_600,  # as in the RankMe paper
            "max_rows_of_pairs": 2048,
            "blocks": 10,  # of which each is left out in turn for the interval
        }
    ),
)
