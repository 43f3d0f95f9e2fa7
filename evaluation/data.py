"""Labelled evaluation data: a directory with `train-*.tar`, `test-*.tar` (else `val-*.tar`) and `dataset.json`.

`dataset.json` gives `classes` (names in index order), `ignore_index` for dense labels and optionally
`splits.train.sequences` (sequence name -> sample keys), which keeps frames of one video on one side of every selection
split. Reading shards belongs to `data_pipelines`; resizing and features to `extraction`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import IMAGE_FIELDS, decode_label, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.fields import decode_field, label_mix_up
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.split_names import held_out
from evaluation.keys import digest_of
from evaluation.protocol import EvaluationError, Protocol

__all__ = ["IGNORED", "EvaluationData", "LabelMaps", "OpenedData", "class_label"]

IGNORED = -1  # what `LabelMaps` puts where the data has its ignore value
DEFAULT_IGNORE_INDEX = 255


@dataclass(frozen=True)
class EvaluationData:
    """A named directory of labelled shards; `name` is what tables and `select` call it."""

    name: str
    root: Path

    def open(self, spec: Protocol, inputs: Sequence[str] = IMAGE_FIELDS) -> OpenedData:
        """Opens both splits and checks that every sample has what `spec` needs.

        Args:
            inputs: sample fields of which one holds what the backbone is given; see `extraction.recipe`.

        Raises:
            EvaluationError, DataError: a split, a field or the list of classes is missing; names the data.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise EvaluationError(f"evaluation data {self.name!r}: no directory {root}")
        splits = {}
        for split, prefix in (("train", "train"), ("test", held_out(root))):
            if not any(root.glob(f"{prefix}-*.tar")):
                raise EvaluationError(f"evaluation data {self.name!r}: no {prefix}-*.tar in {root}")
            splits[split] = dataset = open_dataset(str(root / f"{prefix}-*.tar"))
            dataset.require_field(*inputs)
            dataset.require_field(spec.label)
        description = splits["train"].description
        opened = OpenedData(
            name=self.name,
            train=splits["train"],
            test=splits["test"],
            classes=_classes(description, self.name),
            ignore_index=description.get("ignore_index", DEFAULT_IGNORE_INDEX),
            sequences=_sequences(description),
        )
        if spec.label == "seg.png" and opened.num_classes is None:
            raise EvaluationError(
                f"evaluation data {self.name!r}: {root / 'dataset.json'} must list `classes` for dense labels"
            )
        return opened


@dataclass(frozen=True)
class OpenedData:
    """Both splits of one data set and the facts that decide how they are scored."""

    name: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...] | None  # in index order
    ignore_index: int | None
    sequences: dict[str, str]  # sample key -> sequence

    @property
    def num_classes(self) -> int | None:
        return None if self.classes is None else len(self.classes)

    @property
    def digest(self) -> str:
        """Identity of contents, splits and label rules; independent of where the shards lie."""
        facts = {
            "train": self.train.digest,
            "test": self.test.digest,
            "num_classes": self.num_classes,
            "ignore_index": self.ignore_index,
            "sequences": self.sequences,
        }
        return digest_of(facts)


class LabelMaps:
    """Dense labels of one split, decoded when asked for and never resized."""

    def __init__(self, dataset: Dataset, *, num_classes: int, ignore_index: int | None, sequences: dict[str, str]):
        self._dataset = dataset
        self._ignore_index = ignore_index
        self._sequences = sequences
        self.num_classes = num_classes

    def __len__(self) -> int:
        return int(self._dataset.num_samples)

    def read(self, sample_idx: int) -> tuple[npt.NDArray[np.int64], str | None]:
        """Returns the label map (H, W), `IGNORED` where ignored, and the sequence of the sample, if it has one.

        Raises:
            EvaluationError, DataError: it does not decode, or has a value that is no class; names the sample.
        """
        sample = self._dataset.read(sample_idx)
        key = str(sample["__key__"])
        try:
            labels = decode_mask(sample["seg.png"]).astype(np.int64)
        except DataError as error:
            raise DataError(f"{self._dataset.where(sample_idx)}, field seg.png: {error}") from None
        if self._ignore_index is not None:
            labels[labels == self._ignore_index] = IGNORED
        if labels.max() >= self.num_classes:
            raise EvaluationError(
                f"sample {key!r}: label {labels.max()} in seg.png, but dataset.json lists {self.num_classes} classes "
                f"and ignore_index {self._ignore_index}"
            )
        return labels, self._sequences.get(key)


def class_label(sample: Mapping[str, Any], classes: Sequence[str] | None) -> int:
    """Returns the class index of `sample`, checked against the classes when these are known, also by its name."""
    label = decode_label(sample["cls"])
    if label < 0 or (classes is not None and label >= len(classes)):
        raise EvaluationError(f"sample {sample['__key__']!r}: class {label} is outside 0..{len(classes or ()) - 1}")
    if problem := label_mix_up(label, _described(sample), classes):
        raise EvaluationError(f"sample {sample['__key__']!r}: {problem}")
    return label


def _described(sample: Mapping[str, Any]) -> Any:
    """The json field; None without one, or where it is no JSON, which is no matter of labels."""
    try:
        return decode_field("json", sample["json"]) if "json" in sample else None
    except DataError:
        return None


def _classes(description: dict[str, Any], name: str) -> tuple[str, ...] | None:
    classes = description.get("classes")
    if classes is None:
        return None
    if not isinstance(classes, list) or not classes:
        raise EvaluationError(f"evaluation data {name!r}: `classes` in dataset.json must be a list of names")
    return tuple(map(str, classes))


def _sequences(description: dict[str, Any]) -> dict[str, str]:
    """Sample key -> sequence over all splits of a `dataset.json`."""
    splits = description.get("splits", {})
    named = [split.get("sequences", {}) for split in splits.values() if isinstance(split, dict)]
    return {key: sequence for sequences in named for sequence, keys in sequences.items() for key in keys}
