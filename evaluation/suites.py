"""Protocols that are run together: a first answer, what a report needs, or all but those that take hours.

Those that do not fit a backbone or its data are left out: `misfit` says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data_pipelines.shards.dataset import Dataset

__all__ = ["SUITES", "first_shards", "misfit", "protocols_of"]

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
NEEDLESS = (("svm", "image"),)  # ridge regression tells as much of images in a tenth of the time
ON_REQUEST = ("finetune",)  # takes many times what all others take together
SUITES = ("quick", "standard", "full")


def protocols_of(suite: str, kind: str) -> tuple[str, ...]:
    """Names of the protocols of one of `SUITES` for backbones of a kind; "full" has those of other packages as well."""
    from evaluation.registry import names  # here, for the command line: it reads what every protocol is

    if suite == "full":
        return tuple(name for name in names() if name not in ON_REQUEST)
    return tuple(name for name in (QUICK if suite == "quick" else STANDARD) if (name, kind) not in NEEDLESS)


def misfit(name: str, kind: str, splits: Sequence[Dataset] = ()) -> str | None:
    """Why a protocol is left out of a suite, as far as that can be told without weights; None where it is not.

    Labels have to be in both splits: data whose held-out samples have none are unlabelled to a protocol.

    Args:
        name: of a protocol.
        kind: of the backbone; of one that a plug-in adds nothing is known here.
        splits: the training samples, and those that are tested on; none where nothing is known of the data.

    Raises:
        EvaluationError: the protocol is a plug-in's that cannot be imported.
    """
    from evaluation.registry import EvaluationError, fitting, protocol

    label = protocol(name).target_label
    if not fitting(kind, [name]):
        return f"not for backbones of kind {kind}"
    if label is None or not splits:
        return None
    from evaluation.data import has_labels, require_classes  # with numpy, which a recipe without suites does without

    if not all(has_labels(split, label) for split in splits):
        return f"no labels {' or '.join(label.fields)}"
    try:
        require_classes(splits[0], label)
    except EvaluationError:
        return "dataset.json lists no classes"
    return None


def first_shards(directory: Path) -> list[Dataset]:
    """The first shard of both splits, which show what labels there are.

    Raises:
        DataError: one of them cannot be read.
    """
    from data_pipelines.shards.dataset import open_dataset
    from data_pipelines.split_names import held_out

    patterns = ("train-*.tar", f"{held_out(directory)}-*.tar")
    return [open_dataset(str(min(directory.glob(pattern)))) for pattern in patterns]
