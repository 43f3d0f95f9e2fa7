"""Frozen features of labelled images, computed once per (weights, recipe, data) and kept on disk.

Two kinds: "pooled" holds the CLS token and the mean of patch tokens after the final norm in float32, from resized and
centre-cropped images; "patches" holds the patch map after the final norm in float16, from whole images squeezed to the
asked size (a crop would lose labelled pixels). Register tokens enter neither. The backbone runs in eval and inference
mode; rows are placed by sample index, so the batch size decides nothing. Heads are in `linear`, `knn`, `segmentation`.

Legend: B batch, N patch tokens, D width, n samples.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode import IMAGE_FIELDS, decode_image
from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.maker import eval_view
from evaluation.data import LabelMaps, OpenedData, class_label
from evaluation.registry import EvaluationError, Protocol
from evaluation.store import ArrayWriter

if TYPE_CHECKING:  # timm takes seconds to import, and cached features need no backbone
    from backbones.images.base import Backbone

__all__ = ["Dense", "Pooled", "feature_recipe", "pooled_splits", "write_features"]

EXTRACTOR_VERSION = 1
SPLITS = ("train", "test")


@dataclass(frozen=True)
class Pooled:
    """Image-level features of one split."""

    cls: Tensor | None  # (n, D) float32
    patch_mean: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64


@dataclass(frozen=True)
class Dense:
    """Patch maps of one split, memory-mapped, beside its label maps at their own size."""

    patches: npt.NDArray[np.float16]  # (n, rows, cols, D)
    labels: LabelMaps


def feature_recipe(spec: Protocol, size: tuple[int, int]) -> dict[str, Any]:
    """Everything besides weights and data that decides the features; normalisation is part of the weights' spec."""
    shared = {"version": EXTRACTOR_VERSION, "tokens": spec.tokens, "size": list(size), "norm": "final"}
    if spec.tokens == "pooled":
        return {**shared, "resize": "shorter side, centre crop", "labels": "cls", "storage": "float32"}
    return {**shared, "resize": "squeeze, bicubic", "storage": "float16"}


def write_features(
    writer: ArrayWriter,
    backbone: Backbone,
    data: OpenedData,
    recipe: Mapping[str, Any],
    *,
    batch_size: int,
    device: torch.device,
) -> None:
    """Runs the backbone over both splits and writes `SPLIT.cls`, `.patch_mean`, `.labels` or `SPLIT.patches`."""
    if backbone.in_chans != 3:
        raise EvaluationError(f"the backbone takes {backbone.in_chans} channels; evaluation images are RGB (3)")
    backbone = backbone.to(device).eval()
    for split in SPLITS:
        dataset = getattr(data, split)
        batches = _batches(dataset, _preparation(data, dataset, recipe), batch_size)
        if recipe["tokens"] == "pooled":
            _write_pooled(writer, split, dataset, backbone, batches, device)
        else:
            _write_patches(writer, split, dataset, backbone, batches, device)


def pooled_splits(arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[Pooled, Pooled]:
    """Builds (train, test) from cached arrays."""

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[name]))

    train, test = (
        Pooled(
            cls=tensor(f"{split}.cls") if f"{split}.cls" in arrays else None,
            patch_mean=tensor(f"{split}.patch_mean"),
            labels=tensor(f"{split}.labels"),
        )
        for split in SPLITS
    )
    return train, test


def _write_pooled(
    writer: ArrayWriter,
    split: str,
    dataset: Dataset,
    backbone: Backbone,
    batches: Iterator[tuple[slice, Tensor, Tensor]],
    device: torch.device,
) -> None:
    num_samples, width = dataset.num_samples, backbone.embed_dim
    labels_out = writer.create(f"{split}.labels", (num_samples,), np.int64)
    mean_out = writer.create(f"{split}.patch_mean", (num_samples, width), np.float32)
    cls_out: npt.NDArray[Any] | None = None
    with torch.inference_mode():
        for rows, images, labels in batches:
            features = backbone.features(backbone.preprocess(images.to(device)))
            mean = features.patches.float().mean(dim=1)  # (B, D)
            _check_finite(mean, dataset, rows)
            mean_out[rows] = mean.cpu().numpy()
            if features.cls is not None:
                _check_finite(features.cls, dataset, rows)
                if cls_out is None:
                    cls_out = writer.create(f"{split}.cls", (num_samples, width), np.float32)
                cls_out[rows] = features.cls.float().cpu().numpy()
            labels_out[rows] = labels.numpy()


def _write_patches(
    writer: ArrayWriter,
    split: str,
    dataset: Dataset,
    backbone: Backbone,
    batches: Iterator[tuple[slice, Tensor, Tensor]],
    device: torch.device,
) -> None:
    patches_out: npt.NDArray[Any] | None = None
    with torch.inference_mode():
        for rows, images, _ in batches:
            features = backbone.features(backbone.preprocess(images.to(device)))
            patches = features.patches.to(torch.float16)  # (B, N, D)
            _check_finite(patches, dataset, rows)
            if patches_out is None:
                shape = (dataset.num_samples, *features.grid, backbone.embed_dim)
                patches_out = writer.create(f"{split}.patches", shape, np.float16)
            patches_out[rows] = patches.unflatten(1, features.grid).cpu().numpy()


def _check_finite(features: Tensor, dataset: Dataset, rows: slice) -> None:
    is_bad = ~features.flatten(1).isfinite().all(dim=1)
    if is_bad.any():
        first = rows.start + int(is_bad.nonzero()[0])
        key = dataset.read(first)["__key__"]
        raise EvaluationError(
            f"features are not finite ({int(is_bad.sum())} of {len(is_bad)} images of a batch, first {key!r}); "
            "the weights hold NaN or have diverged"
        )


def _preparation(
    data: OpenedData, dataset: Dataset, recipe: Mapping[str, Any]
) -> Callable[[Mapping[str, Any]], tuple[Tensor, int]]:
    """Returns the function from a sample to (uint8 (3, H, W) image, class index or 0)."""
    field = dataset.require_field(*IMAGE_FIELDS)
    height, width = recipe["size"]

    def pooled(sample: Mapping[str, Any]) -> tuple[Tensor, int]:
        return eval_view(decode_image(sample[field]), height), class_label(sample, data.num_classes)

    def dense(sample: Mapping[str, Any]) -> tuple[Tensor, int]:
        picture = Image.fromarray(decode_image(sample[field])).resize((width, height), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1), 0

    return pooled if recipe["tokens"] == "pooled" else dense


def _batches(
    dataset: Dataset, prepare: Callable[[Mapping[str, Any]], tuple[Tensor, int]], batch_size: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yields (rows, images, labels) in sample order, one batch decoded ahead by as many threads as torch may use."""

    reading = threading.Lock()  # the data set opens and closes shard files as it reads

    def load(sample_idx: int) -> tuple[Tensor, int]:
        with reading:
            sample = dataset.read(sample_idx)
        try:
            return prepare(sample)
        except (DataError, EvaluationError) as error:
            raise type(error)(f"{dataset.where(sample_idx)}: {error}") from error

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:

        def submit(start: int) -> list[Future[tuple[Tensor, int]]]:
            return [pool.submit(load, i) for i in range(start, min(start + batch_size, dataset.num_samples))]

        ahead = submit(0)
        for start in range(0, dataset.num_samples, batch_size):
            batch, ahead = ahead, submit(start + batch_size)
            images, labels = zip(*(future.result() for future in batch), strict=True)
            yield slice(start, start + len(images)), torch.stack(images), torch.tensor(labels)
