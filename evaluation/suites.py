"""Protocols that are run together: a first answer, what a report needs, or all there is.

Which of them fit a backbone and its data is decided where they are run: those that do not are left out.
"""

from __future__ import annotations

__all__ = ["SUITES", "protocols_of"]

QUICK = ("knn", "ridge", "spectrum", "svm", "masked_reconstruction")
STANDARD = (
    *QUICK,
    "linear",
    "logreg",
    "few_shot",
    "token_health",
    "segmentation",
    "patch_knn",
    "voxel_segmentation",
)
SUITES = ("quick", "standard", "full")


def protocols_of(suite: str) -> tuple[str, ...]:
    """Names of the protocols of one of `SUITES`; "full" has those of other packages as well."""
    from evaluation.registry import names  # here, for the command line: it reads what every protocol is

    return {"quick": QUICK, "standard": STANDARD}.get(suite) or names()
