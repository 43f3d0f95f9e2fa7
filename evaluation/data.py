"""Labelled evaluation data: a directory with `train-*.tar`, `test-*.tar` (else `val-*.tar`) and `dataset.json`.

`dataset.json` gives `classes` (names in index order), `ignore_index` for dense labels and optionally
`splits.train.sequences` (sequence name -> sample keys), which keeps frames of one video on one side of every selection
split. Reading shards belongs to `data_pipelines`; resizing and features to `extraction`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import IMAGE_FIELDS, array_names, decode_array, decode_label, decode_mask
from data_pipelines.errors import DataError
from data_pipelines.fields import decode_field, label_mix_up
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.split_names import held_out
from evaluation.keys import digest_of
from evaluation.protocol import LABELS, EvaluationError, Label, Protocol

__all__ = [
    "IGNORED",
    "DepthMaps",
    "EvaluationData",
    "LabelMaps",
    "OpenedData",
    "class_label",
    "class_list",
    "has_labels",
    "require_classes",
    "require_labels",
]

IGNORED = -1  # what `LabelMaps` puts where the data has its ignore value
MILLIMETERS = 0.001  # meters per unit of a depth.png, unless `depth_scale` of dataset.json says otherwise
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
        root = self._folder()
        splits = {}
        for split, prefix in (("train", "train"), ("test", held_out(root))):
            splits[split] = dataset = self._open_split(prefix, inputs)
            require_labels(dataset, spec.target_label)
        description = splits["train"].description
        opened = OpenedData(
            name=self.name,
            train=splits["train"],
            test=splits["test"],
            classes=_classes(description, self.name),
            ignore_index=description.get("ignore_index", DEFAULT_IGNORE_INDEX),
            sequences=_sequences(description),
            depth_scale=_depth_scale(description, self.name),
        )
        try:
            require_classes(splits["train"], spec.target_label)
        except EvaluationError as error:
            raise EvaluationError(f"evaluation data {self.name!r}: {root}: {error}") from None
        return opened

    def open_held_out(self, inputs: Sequence[str]) -> Dataset:
        """The samples that are tested on, of whatever labels; no others have to be there.

        Raises:
            EvaluationError, DataError: there are none, or a field is missing; names the data.
        """
        return self._open_split(held_out(self._folder()), inputs)

    def _folder(self) -> Path:
        root = Path(self.root)
        if not root.is_dir():
            raise EvaluationError(f"evaluation data {self.name!r}: no directory {root}")
        return root

    def _open_split(self, prefix: str, inputs: Sequence[str]) -> Dataset:
        root = self._folder()
        if not any(root.glob(f"{prefix}-*.tar")):
            raise EvaluationError(f"evaluation data {self.name!r}: no {prefix}-*.tar in {root}")
        dataset = open_dataset(str(root / f"{prefix}-*.tar"))
        dataset.require_field(*inputs)
        return dataset


@dataclass(frozen=True)
class OpenedData:
    """Both splits of one data set and the facts that decide how they are scored."""

    name: str
    train: Dataset
    test: Dataset
    classes: tuple[str, ...] | None  # in index order
    ignore_index: int | None
    sequences: dict[str, str]  # sample key -> sequence
    depth_scale: float = MILLIMETERS

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
            **({} if self.depth_scale == MILLIMETERS else {"depth_scale": self.depth_scale}),
        }
        return digest_of(facts)


class LabelMaps:
    """Dense labels of one split, decoded when asked for and never resized.

    Args:
        dataset: holds the samples.
        label: where they have their labels.
        lay: brings the labels of a sample to where the backbone saw it: `lay(labels, sample)`. None: maps of any size
            lie over the whole input.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        num_classes: int,
        ignore_index: int | None,
        sequences: dict[str, str],
        label: Label = LABELS["seg.png"],
        lay: Callable[[npt.NDArray[np.int64], Mapping[str, Any]], npt.NDArray[np.int64]] | None = None,
    ):
        self._dataset = dataset
        self._ignore_index = ignore_index
        self._sequences = sequences
        self._label = label
        self._lay = lay
        self.num_classes = num_classes

    def __len__(self) -> int:
        return int(self._dataset.num_samples)

    @property
    def axes(self) -> int:
        """2 of images, 3 of volumes."""
        return self._label.axes

    def name_of(self, sample_idx: int) -> tuple[str, str | None]:
        """Returns the key of a sample and its sequence or None."""
        key = str(self._dataset.read(sample_idx)["__key__"])
        return key, self._sequences.get(key)

    def read(self, sample_idx: int) -> tuple[npt.NDArray[np.int64], str | None]:
        """Returns the label map (H, W) or (X, Y, Z), `IGNORED` where ignored, and the sequence of the sample or None.

        Raises:
            EvaluationError, DataError: it does not decode, or has a value that is no class; names the sample.
        """
        sample = self._dataset.read(sample_idx)
        key = str(sample["__key__"])
        field = next(name for name in self._label.fields if name in sample)
        try:
            labels = _decoded(sample[field], field, self._label)
        except DataError as error:
            raise DataError(f"{self._dataset.where(sample_idx)}, field {field}: {error}") from None
        is_ignored = np.zeros(labels.shape, bool) if self._ignore_index is None else labels == self._ignore_index
        if wrong := [value for value in _bounds(labels[~is_ignored]) if not 0 <= value < self.num_classes]:
            raise EvaluationError(
                f"sample {key!r}: label {wrong[-1]} in {field}, but dataset.json lists {self.num_classes} classes "
                f"and ignore_index {self._ignore_index}"
            )
        labels[is_ignored] = IGNORED
        try:
            return labels if self._lay is None else self._lay(labels, sample), self._sequences.get(key)
        except (DataError, EvaluationError) as error:
            raise type(error)(f"sample {key!r}: {error}") from None


class DepthMaps:
    """Distances from the camera of one split, decoded when asked for and never resized.

    Args:
        dataset: holds the samples.
        label: where they have them: PNGs of whole numbers, 0 where nothing was measured, or arrays of meters.
        scale: meters per unit of a PNG.
    """

    def __init__(self, dataset: Dataset, *, label: Label, scale: float, sequences: dict[str, str]):
        self._dataset = dataset
        self._label = label
        self._scale = scale
        self._sequences = sequences

    def __len__(self) -> int:
        return int(self._dataset.num_samples)

    def read(self, sample_idx: int) -> tuple[npt.NDArray[np.float32], str | None]:
        """Returns distances (H, W) in meters, NaN where none was measured, and the sequence of the sample or None.

        Raises:
            DataError: it does not decode; names the sample.
        """
        sample = self._dataset.read(sample_idx)
        field = next(name for name in self._label.fields if name in sample)
        try:
            png = field.endswith(".png")
            depth = decode_mask(sample[field]) * self._scale if png else decode_array(sample[field])
            if depth.ndim != 2 or depth.dtype.kind not in "fiu":
                raise DataError(f"distances are an array {depth.dtype} {depth.shape}; they must be numbers (H, W)")
        except DataError as error:
            raise DataError(f"{self._dataset.where(sample_idx)}, field {field}: {error}") from None
        meters = depth.astype(np.float32)
        is_measured = np.isfinite(meters) & (meters > 0)
        return np.where(is_measured, meters, np.float32(np.nan)), self._sequences.get(str(sample["__key__"]))


def _decoded(content: bytes, field: str, label: Label) -> npt.NDArray[np.int64]:
    """A map of class indices of `label.axes` axes.

    Raises:
        DataError: the bytes are none; says what they are.
    """
    if field.endswith(".png"):
        return decode_mask(content).astype(np.int64)
    values = decode_array(content, label.array if content.startswith(b"PK") else None)
    if values.dtype.kind not in "biu" or values.ndim != label.axes:
        raise DataError(
            f"labels are an array {values.dtype} {values.shape}; they must be whole numbers in {label.axes} axes"
        )
    return values.astype(np.int64)


def _bounds(labels: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Least and greatest; none of none."""
    return (int(labels.min()), int(labels.max())) if labels.size else ()


def has_labels(dataset: Dataset, label: Label | None) -> bool:
    """Whether samples have such labels: a field of theirs and, of an npz, in the first sample, the array.

    Those of a protocol that needs none are always there.
    """
    if label is None:
        return True
    field = next((name for name in label.fields if name in dataset.fields), None)
    if field is None or not field.endswith("npz"):
        return field is not None
    return label.array in array_names(dataset.read(0)[field])


def require_labels(dataset: Dataset, label: Label | None) -> None:
    """Refuse samples that have no such labels, as far as the fields of all and the first sample show.

    Raises:
        DataError: no field of theirs has them, or the npz of the first sample has no such array.
    """
    if label is None:
        return
    field = dataset.require_field(*label.fields)
    if not has_labels(dataset, label):
        found = ", ".join(array_names(dataset.read(0)[field]))
        raise DataError(f"{dataset.where(0)}, field {field}: no array {label.array!r} with labels; it has {found}")


def require_classes(dataset: Dataset, label: Label | None) -> None:
    """Refuse labels of which nothing says how many classes they have, unless they are one class per sample.

    Raises:
        EvaluationError: the data set lists no `classes`, which samples with a label each may do without.
    """
    if label is None or dataset.description.get("classes"):
        return
    if label.values == "several" or (label.values == "classes" and label.axes):
        of = "dense labels" if label.axes else label.fields[0]
        raise EvaluationError(
            f"{MANIFEST_NAME} must list `classes` for {of}, their names in index order: `pretrain data pack "
            "--classes NAME,...` writes them"
        )


def class_label(sample: Mapping[str, Any], classes: Sequence[str] | None) -> int:
    """Returns the class index of `sample`, checked against the classes when these are known, also by its name."""
    label = decode_label(sample["cls"])
    if label < 0 or (classes is not None and label >= len(classes)):
        raise EvaluationError(f"sample {sample['__key__']!r}: class {label} is outside 0..{len(classes or ()) - 1}")
    if problem := label_mix_up(label, _described(sample), classes):
        raise EvaluationError(f"sample {sample['__key__']!r}: {problem}")
    return label


def class_list(sample: Mapping[str, Any], classes: Sequence[str]) -> list[int]:
    """Returns the classes that `sample` belongs to, which may be none.

    Raises:
        EvaluationError: `labels.json` is no list of class indices, or has one twice; names the sample.
        DataError: it is no JSON.
    """
    found, known = decode_field("json", sample["labels.json"]), range(len(classes))
    is_list = isinstance(found, list) and all(type(label) is int and label in known for label in found)
    if not is_list or len(set(found)) < len(found):
        raise EvaluationError(
            f"sample {sample['__key__']!r}: labels.json {str(found)[:60]} must be a list of different classes "
            f"0..{len(classes) - 1}"
        )
    return list(found)


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


def _depth_scale(description: dict[str, Any], name: str) -> float:
    scale = description.get("depth_scale", MILLIMETERS)
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not 0 < scale < float("inf"):
        raise EvaluationError(
            f"evaluation data {name!r}: depth_scale {scale!r} in dataset.json must be meters per unit, such as 0.001"
        )
    return float(scale)


def _sequences(description: dict[str, Any]) -> dict[str, str]:
    """Sample key -> sequence over all splits of a `dataset.json`."""
    splits = description.get("splits", {})
    named = [split.get("sequences", {}) for split in splits.values() if isinstance(split, dict)]
    return {key: sequence for sequences in named for sequence, keys in sequences.items() for key in keys}
