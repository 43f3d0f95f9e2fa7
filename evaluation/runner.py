"""`evaluate`: (checkpoint, protocol, data) -> result, computed once.

The key of a result is the SHA-256 of the weights digest (names, dtypes, shapes and bytes of what the backbone loads,
and its architecture; not the path, not the step), the feature recipe, the data digest and the protocol with its version
and parameters. Batch size and device are outside it: they decide no score. The store is asked first, then the feature
cache; only then is the backbone loaded and run. When to evaluate what, and where, is decided elsewhere.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from safetensors import safe_open

from backbones.images.base import ImageEncoder
from backbones.io import BACKBONE_FILE, load_backbone, weights_digest
from evaluation import registry
from evaluation.data import EvaluationData, LabelMaps, OpenedData
from evaluation.extraction.images import Dense, Pooled, feature_recipe, pooled_splits, write_features
from evaluation.registry import EvaluationError, Protocol, image_size_px, load_head
from evaluation.store import ArrayWriter, EvaluationResult, FeatureCache, ResultStore, digest_of

__all__ = ["EvaluationResult", "evaluate"]


def evaluate(
    checkpoint: Path,
    protocol: str,
    data: EvaluationData,
    *,
    store: Path,
    image_size: int | tuple[int, int] | None = None,
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    seed: int = 0,
    force: bool = False,
) -> EvaluationResult:
    """Grades a frozen backbone, or returns the stored grade of the same weights, protocol and data.

    Args:
        checkpoint: directory with `backbone.safetensors`, or that file.
        protocol: one of `registry.names()`.
        store: storage root; results go to `store/evaluations`, features to `store/features`.
        image_size: pixels per side, (height, width) for dense protocols, None for the backbone's own size.
        batch_size: images per forward pass; decides speed and memory, no score.
        seed: of the selection splits, the batch order and the bootstrap.
        force: compute and replace the result even when it is stored; intact features are used again.

    Raises:
        EvaluationError: unknown protocol, data that does not fit it, a size patches do not tile, non-finite features.
        BackboneError, DataError (both `ValueError`): missing or damaged weights or shards.
    """
    started = time.perf_counter()
    spec = registry.protocol(protocol)
    opened = data.open(spec)
    weights = weights_digest(checkpoint)
    recipe = feature_recipe(spec, _size(checkpoint, spec, image_size))
    feature_facts = {"weights": weights, "features": recipe, "data": opened.digest}
    facts = {"protocol": spec.name, "version": spec.version, "params": dict(spec.params), "seed": seed}
    key = digest_of({**feature_facts, **facts})
    on_device = torch.device(device)

    def make() -> EvaluationResult:
        def write(writer: ArrayWriter) -> None:
            backbone = load_backbone(checkpoint)
            if not isinstance(backbone, ImageEncoder):
                raise EvaluationError(f"backbones of kind {backbone.kind!r} cannot be evaluated; only images can")
            write_features(writer, backbone, opened, recipe, batch_size=batch_size, device=on_device)

        arrays, were_made = FeatureCache(store).once(digest_of(feature_facts), feature_facts, write)
        extracted = time.perf_counter()
        train, test, num_classes = _splits(spec, arrays, opened)
        outcome = load_head(spec)(train, test, num_classes=num_classes, params=spec.params, seed=seed, device=on_device)
        if set(outcome.metrics) != set(spec.metrics):
            raise EvaluationError(
                f"protocol {spec.name!r} reported {sorted(outcome.metrics)}, but registers {sorted(spec.metrics)}"
            )
        return EvaluationResult(
            key=key,
            protocol=spec.name,
            version=spec.version,
            data=data.name,
            data_digest=opened.digest,
            weights_digest=weights,
            metrics={name: float(outcome.metrics[name]) for name in spec.metrics},
            details={
                **outcome.details,
                "image_size": recipe["size"],
                "num_train": opened.train.num_samples,
                "num_test": opened.test.num_samples,
                "seed": seed,
                "features_cached": not were_made,
                "seconds_features": round(extracted - started, 3),
            },
            seconds=round(time.perf_counter() - started, 3),
        )

    return ResultStore(store).once(key, make, data=data.name, force=force)


def _size(checkpoint: Path, spec: Protocol, requested: int | tuple[int, int] | None) -> tuple[int, int]:
    """(height, width) in pixels, from the request and the architecture written in the weights file."""
    path = Path(checkpoint)
    with safe_open(path / BACKBONE_FILE if path.is_dir() else path, framework="pt") as file:
        architecture = json.loads(file.metadata()["pretrain.backbone"])
    height, width = image_size_px(requested, architecture["image_size"], architecture["patch_size"])
    if spec.tokens == "pooled" and height != width:
        raise EvaluationError(
            f"image_size {(height, width)}: protocol {spec.name!r} takes square images, give one number"
        )
    return height, width


def _splits(
    spec: Protocol, arrays: Mapping[str, npt.NDArray[Any]], data: OpenedData
) -> tuple[Pooled | Dense, Pooled | Dense, int]:
    """Returns (train, test, number of classes) as the head takes them."""
    if spec.tokens == "pooled":
        train, test = pooled_splits(arrays)
        return train, test, data.num_classes or 1 + int(max(train.labels.max(), test.labels.max()))
    if data.num_classes is None:  # `EvaluationData.open` refuses such data
        raise AssertionError("dense labels without a number of classes")
    dense = [
        Dense(
            arrays[f"{split}.patches"],
            LabelMaps(dataset, num_classes=data.num_classes, ignore_index=data.ignore_index, sequences=data.sequences),
        )
        for split, dataset in (("train", data.train), ("test", data.test))
    ]
    return dense[0], dense[1], data.num_classes
