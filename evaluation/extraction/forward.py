"""Frozen features of both splits: one pass of a backbone, whatever its kind, written to a cache entry.

Two sorts: "pooled" holds the CLS token, the mean of patch tokens after the final norm, and their maximum where the kind
of backbone asks for it, in float32; "patches" holds the map of patch tokens after the final norm in float16, of an
encoder in stages one map of each. Register tokens enter neither, tokens of padding no mean. The backbone runs in
evaluation and inference mode; rows are placed by sample index, so the batch size decides nothing.

Not here: how a sample becomes input (one file per kind of backbone beside this one), heads (`evaluation.protocols`).

Legend: B batch, N patch tokens, D width, n samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import default_collate

from data_pipelines.content import content_hash
from data_pipelines.errors import DataError
from evaluation.data import DepthMaps, LabelMaps, OpenedData, class_label, class_list
from evaluation.extraction.recipe import Extraction
from evaluation.features import ArrayWriter
from evaluation.progress import counted
from evaluation.protocol import BrokenError, EvaluationError, Label
from evaluation.threads import Threads

if TYPE_CHECKING:  # timm takes seconds to import, and cached features need no backbone
    from backbones.encoder import Encoder
    from backbones.features import Features

__all__ = [
    "Dense",
    "Layer",
    "Pooled",
    "Samples",
    "Taken",
    "batches_of",
    "labels_of",
    "measured",
    "moved",
    "num_classes_of",
    "num_test_in_train",
    "pooled_batches",
    "splits_of",
    "write_features",
]

SPLITS = ("train", "test")
_FINER = "stage"  # name of the map of a stage but the last, before its number
_INNER = "before_last"  # name of a layer before the last one, before how many layers before

Note = TypeVar("Note")
Labels = TypeVar("Labels", LabelMaps, DepthMaps, Tensor)
Taken = dict[str, Tensor]  # what is kept of the features of a batch, by name, each (B, ...) on the CPU


class Samples(Protocol):
    """What can be read from: a `Dataset`, or anything else that is numbered from 0."""

    num_samples: int

    def read(self, sample_id: int, /) -> dict[str, Any]:
        """Fields of one sample as bytes, its key as `"__key__"`."""

    def where(self, sample_id: int, /) -> str:
        """How messages name it."""

    def require_field(self, *candidates: str) -> str:
        """The first of these fields that every sample has."""


class Layer(NamedTuple):
    """What one layer makes of the samples, after the final norm of the encoder."""

    cls: Tensor | None  # (n, D) float32
    patch_mean: Tensor  # (n, D) float32


@dataclass(frozen=True)
class Pooled:
    """One vector per sample of one split."""

    cls: Tensor | None  # (n, D) float32
    patch_mean: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64, 0 of samples without, which their protocols do not read; (n, C) bool of "labels.json"
    patch_max: Tensor | None = None  # (n, D) float32, the greatest of all tokens; of kinds whose extraction says so
    inner: tuple[Layer, ...] = ()  # the last but one layer first, `Protocol.num_layers - 1` at most; plain ViTs only

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Of all layers that there are features of, the last one first."""
        return (Layer(self.cls, self.patch_mean), *self.inner)


@dataclass(frozen=True)
class Dense(Generic[Labels]):
    """Patch maps of one split, memory-mapped, beside its labels: maps at their own size, or (n,) int64 classes."""

    patches: npt.NDArray[np.float16]  # (n, rows, cols, D); of volumes (n, x, y, z, D)
    labels: Labels
    finer: tuple[npt.NDArray[np.float16], ...] = ()  # of the stages before the last, if there are any, the finest first

    @property
    def maps(self) -> tuple[npt.NDArray[np.float16], ...]:
        """Of all stages, over the same extent, the finest first."""
        return (*self.finer, self.patches)


def write_features(
    writer: ArrayWriter,
    backbone: Encoder,
    extraction: Extraction,
    data: OpenedData,
    recipe: Mapping[str, Any],
    *,
    batch_size: int,
    device: torch.device,
    threads: Threads,
) -> None:
    """Runs the backbone over both splits and writes `SPLIT.labels` and what a `Pooled` has, or `SPLIT.patches`.

    And `SPLIT.contents`, (n,) uint64, the `content_hash` of what the backbone was given.

    Raises:
        EvaluationError: features are not finite, or a label is outside the classes; names the sample.
        DataError: a sample cannot be read or decoded; names it.
    """
    backbone = backbone.to(device).eval()
    for split in SPLITS:
        dataset = getattr(data, split)
        contents = writer.create(f"{split}.contents", (dataset.num_samples,), np.uint64)
        field = dataset.require_field(*extraction.inputs)

        def note(sample_idx: int, sample: Mapping[str, Any], field: str = field, contents: Any = contents) -> int:
            """The class label; 0 where there is none, or where the features go to a dense head, which reads its own."""
            contents[sample_idx] = content_hash(sample[field])
            is_labelled = recipe["tokens"] == "pooled" and "cls" in sample
            return class_label(sample, data.classes) if is_labelled else 0

        settings: dict[str, Any] = {"batch_size": batch_size, "device": device, "threads": threads}
        if recipe["tokens"] == "pooled":
            labelled = pooled_batches(dataset, backbone, extraction, recipe, note, **settings)
            _write_pooled(writer, split, dataset.num_samples, labelled, recipe["storage"])
        else:
            take_maps = partial(_patch_maps, backbone, extraction)
            batches = batches_of(dataset, extraction, recipe, note, take_maps, **settings)
            _write_patches(writer, split, dataset.num_samples, batches)


def pooled_batches(
    samples: Samples,
    backbone: Encoder,
    extraction: Extraction,
    recipe: Mapping[str, Any],
    note: Callable[[int, Mapping[str, Any]], Note],
    *,
    batch_size: int,
    device: torch.device,
    threads: Threads,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[slice, Taken, list[Note]]]:
    """Features of samples in their order: (rows, `cls`, `patch_max` and `patch_mean` (B, D) as far as given, notes).

    Args:
        samples: Those from `start` to before `stop` are read.
        backbone: On `device`, in evaluation mode.
        recipe: As `feature_recipe` makes it, of pooled tokens.
        note: What else is wanted of a sample, by its number and fields; called once for each, in other threads.

    Raises:
        EvaluationError, DataError: As `write_features`.
    """
    return batches_of(
        samples,
        extraction,
        recipe,
        note,
        lambda batch, _: _pooled_layers(backbone, batch, extraction.pooling, recipe.get("layers", 1)),
        batch_size=batch_size,
        device=device,
        threads=threads,
        start=start,
        stop=stop,
    )


def splits_of(
    arrays: Mapping[str, npt.NDArray[Any]],
    data: OpenedData,
    extraction: Extraction,
    recipe: Mapping[str, Any],
    label: Label | None,
) -> tuple[Pooled | Dense[Any], Pooled | Dense[Any], int]:
    """Returns (train, test, number of classes) as a head takes them, from the arrays that `write_features` wrote."""
    if recipe["tokens"] == "pooled":
        train, test = (_pooled(arrays, split) for split in SPLITS)
        if label is not None and label.values == "several":
            train, test = (
                replace(one, labels=_is_of_class(getattr(data, split), data.classes or ()))
                for one, split in zip((train, test), SPLITS, strict=True)
            )
        return train, test, data.num_classes or 1 + int(max(train.labels.max(), test.labels.max()))
    dense: list[Dense[Any]] = [
        Dense(
            arrays[f"{split}.patches"],
            labels_of(data, split, extraction, recipe, label),
            tuple(arrays[name] for name in sorted(arrays) if name.startswith(f"{split}.{_FINER}")),
        )
        for split in SPLITS
    ]
    return dense[0], dense[1], num_classes_of(data, label, [one.labels for one in dense])


def labels_of(
    data: OpenedData, split: str, extraction: Extraction, recipe: Mapping[str, Any], label: Label | None
) -> LabelMaps | DepthMaps | Tensor:
    """Labels of a split as `Dense` and `Frozen` have them; of a protocol without labels zeros (n,)."""
    dataset = getattr(data, split)
    if label is None:
        return torch.zeros(dataset.num_samples, dtype=torch.int64)
    if label.values == "several":
        return _is_of_class(dataset, data.classes or ())
    if label.axes == 0:
        numbers = range(dataset.num_samples)
        return torch.tensor([class_label(dataset.read(number), data.classes) for number in numbers])
    if label.values == "meters":
        return DepthMaps(dataset, label=label, scale=data.depth_scale, sequences=data.sequences)
    if data.num_classes is None:  # `EvaluationData.open` refuses such data
        raise AssertionError("dense labels without a number of classes")
    return LabelMaps(
        dataset,
        num_classes=data.num_classes,
        ignore_index=data.ignore_index,
        sequences=data.sequences,
        label=label,
        lay=_laying(dataset, extraction, recipe),
    )


def _is_of_class(samples: Samples, classes: Sequence[str]) -> Tensor:
    """(n, C) bool, of lists of classes."""
    is_of = torch.zeros(samples.num_samples, len(classes), dtype=torch.bool)
    for number in range(samples.num_samples):
        is_of[number, class_list(samples.read(number), classes)] = True
    return is_of


def num_classes_of(data: OpenedData, label: Label | None, labels: Sequence[Any]) -> int:
    """How many classes labels are of: as the data set says, else as many as occur; 0 where they are no classes."""
    if label is None or label.values != "classes":
        return 0
    return data.num_classes or 1 + int(max(one.max() for one in labels))


def _laying(samples: Samples, extraction: Extraction, recipe: Mapping[str, Any]) -> Any:
    """`Extraction.lay` of the labels of a sample."""
    lay, field = extraction.lay, samples.require_field(*extraction.inputs)
    return None if lay is None else lambda labels, sample: lay(labels, sample[field], recipe)


def num_test_in_train(arrays: Mapping[str, npt.NDArray[Any]]) -> int | None:
    """How many test samples have the content of a train sample; None for features of an older version."""
    names = [f"{split}.contents" for split in SPLITS]
    return int(np.isin(arrays[names[1]], arrays[names[0]]).sum()) if all(name in arrays for name in names) else None


def _pooled(arrays: Mapping[str, npt.NDArray[Any]], split: str) -> Pooled:
    def tensor(name: str) -> Tensor:
        stored = torch.from_numpy(np.array(arrays[f"{split}.{name}"]))
        return stored.float() if stored.dtype == torch.float16 else stored  # heads compute in single precision

    def present(name: str) -> Tensor | None:
        return tensor(name) if f"{split}.{name}" in arrays else None

    inner: list[Layer] = []
    while f"{split}.{_INNER}_{len(inner) + 1}_patch_mean" in arrays:
        name = f"{_INNER}_{len(inner) + 1}"
        inner.append(Layer(present(f"{name}_cls"), tensor(f"{name}_patch_mean")))
    return Pooled(present("cls"), tensor("patch_mean"), tensor("labels"), present("patch_max"), tuple(inner))


def _write_pooled(
    writer: ArrayWriter,
    split: str,
    num_samples: int,
    batches: Iterator[tuple[slice, Taken, list[int]]],
    storage: str,
) -> None:
    labels_out = writer.create(f"{split}.labels", (num_samples,), np.int64)
    outs: dict[str, npt.NDArray[Any]] = {}
    for rows, pooled, labels in batches:
        for name, vectors in pooled.items():
            if name not in outs:
                outs[name] = writer.create(f"{split}.{name}", (num_samples, vectors.shape[1]), storage)
            if vectors.abs().max() > np.finfo(outs[name].dtype).max:
                raise EvaluationError(
                    f"a feature of {float(vectors.abs().max()):.3g} is beyond half precision; keep features in single "
                    "precision (evaluation.half_features=false, without --half-features)"
                )
            outs[name][rows] = vectors.numpy()
        labels_out[rows] = labels


def _write_patches(
    writer: ArrayWriter, split: str, num_samples: int, batches: Iterator[tuple[slice, Taken, list[int]]]
) -> None:
    outs: dict[str, npt.NDArray[Any]] = {}
    for rows, taken, _ in batches:
        for name, tokens in taken.items():
            if name not in outs:
                outs[name] = writer.create(f"{split}.{name}", (num_samples, *tokens.shape[1:]), np.float16)
            outs[name][rows] = tokens.numpy()


def _pooled_layers(backbone: Encoder, batch: Any, pooling: Sequence[str], num_layers: int) -> Taken:
    """`_pooled_tokens` of the last layer, and of those before it where they are asked for and can be read."""
    depth = getattr(backbone, "num_layers", 0)
    wanted = range(max(1, depth - num_layers + 1), depth)  # counted from 1, the last one without
    if not wanted:
        return _pooled_tokens(backbone.tokens(batch), pooling)
    encoder: Any = backbone  # an `ImageEncoder`, which has layers to read
    features = encoder.features(encoder.preprocess(batch), layers=wanted)
    taken = _pooled_tokens(features, pooling)
    for back, level in enumerate(reversed(features.levels), start=1):
        pooled = _pooled_tokens(encoder.read_out(level, features.grid), ("mean",))
        taken |= {f"{_INNER}_{back}_{name}": vectors for name, vectors in pooled.items()}
    return taken


def _pooled_tokens(features: Features, pooling: Sequence[str]) -> Taken:
    """CLS tokens (B, D), if there are any, maxima of patch tokens if asked for, and their means; float32."""
    features = replace(features, tokens=features.tokens.float())
    pooled = {} if features.cls is None else {"cls": features.cls.float().cpu()}
    if "max" in pooling:
        tokens, is_valid = features.tokens, features.is_valid
        counted = tokens if is_valid is None else tokens.masked_fill(~is_valid.unsqueeze(-1), -torch.inf)
        pooled["patch_max"] = counted.amax(dim=1).cpu()
    return {**pooled, "patch_mean": features.mean.cpu()}


def _patch_maps(backbone: Encoder, extraction: Extraction, batch: Any, _: range) -> Taken:
    """Patch tokens (B, rows, columns, D), of volumes (B, x, y, z, D), in float16; of each stage if there are some."""
    if extraction.maps is None:
        features = backbone.tokens(batch)
        if features.grid is None:
            raise EvaluationError("the backbone has no grid of tokens to make a map of")
        maps: Sequence[Tensor] = [features.tokens.unflatten(1, features.grid)]
    else:
        maps = extraction.maps(backbone, batch)
    names = [*(f"{_FINER}{number:02d}" for number in range(len(maps) - 1)), "patches"]
    return {name: tokens.to(torch.float16).cpu() for name, tokens in zip(names, maps, strict=True)}


def measured(
    samples: Samples,
    extraction: Extraction,
    recipe: Mapping[str, Any],
    take: Callable[[Any, range], Taken],
    **settings: Any,
) -> Taken:
    """What `take` makes of all samples, (n, ...) by name; `settings` as those of `batches_of`."""
    found: dict[str, list[Tensor]] = {}

    def on_cpu(batch: Any, numbers: range) -> Taken:
        return {name: values.cpu() for name, values in take(batch, numbers).items()}

    for _, taken, _ in batches_of(samples, extraction, recipe, lambda *_: None, on_cpu, **settings):
        for name, values in taken.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(parts) for name, parts in found.items()}


def batches_of(
    samples: Samples,
    extraction: Extraction,
    recipe: Mapping[str, Any],
    note: Callable[[int, Mapping[str, Any]], Note],
    take: Callable[[Any, range], Taken],
    *,
    batch_size: int,
    device: torch.device,
    threads: Threads,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[tuple[slice, Taken, list[Note]]]:
    """Yields (rows, what `take` makes of a batch on the device and the numbers of its samples, notes) in sample order.

    Each batch is read, decoded and encoded in one of `threads`. A device other than the CPU gets one batch at a time:
    it would be no faster with several, and would need the memory of all.
    """
    field = samples.require_field(*extraction.inputs)
    end = samples.num_samples if stop is None else stop
    reading = threading.Lock()  # the data set opens and closes shard files as it reads
    encoding = nullcontext() if device.type == "cpu" else threading.Lock()

    def read(sample_idx: int) -> dict[str, Any]:
        with reading:
            return samples.read(sample_idx)

    def load(sample_idx: int) -> tuple[Any, Note]:
        sample = read(sample_idx)
        try:
            noted = note(sample_idx, sample)
            return extraction.prepare(sample[field], recipe), noted
        except (DataError, EvaluationError) as error:
            raise type(error)(f"{samples.where(sample_idx)}: {error}") from error

    def encode(first: int) -> tuple[slice, Taken, list[Note]]:
        numbers = range(first, min(first + batch_size, end))
        inputs, notes = zip(*map(load, numbers), strict=True)
        batch = moved(default_collate(list(inputs)), device)
        with encoding, torch.inference_mode():
            taken = take(batch, numbers)
        for features in taken.values():
            require_finite(features, first)
        return slice(numbers.start, numbers.stop), taken, list(notes)

    def require_finite(features: Tensor, first: int) -> None:
        is_bad = ~features.reshape(len(features), -1).isfinite().all(dim=1)
        if is_bad.any():
            key = read(first + int(is_bad.nonzero()[0]))["__key__"]
            raise BrokenError(
                f"features are not finite ({int(is_bad.sum())} of {len(is_bad)} samples of a batch, first {key!r}); "
                "the weights hold NaN or have diverged"
            )

    firsts = range(start, end, batch_size)
    return counted(threads.map(encode, firsts), len(firsts), f"encoding {end - start} samples")


def moved(batch: Any, device: torch.device) -> Any:
    """A tensor, or a mapping of tensors, on `device`."""
    return {key: value.to(device) for key, value in batch.items()} if isinstance(batch, Mapping) else batch.to(device)
