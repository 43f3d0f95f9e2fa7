"""`evaluate`: (checkpoint, protocol, data) -> result, computed once.

The key of a result is the SHA-256 of the weights digest (names, dtypes, shapes and bytes of what the backbone loads,
and its architecture; not the path, not the step), the feature recipe, the data digest and the protocol with its version
and parameters. Batch size and device are outside it: they decide no score. The store is asked first, then the feature
cache; only then is the backbone loaded and run. When to evaluate what, and where, is decided elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from backbones.io import BACKBONE_FILE, load_backbone, weights_digest
from data_pipelines.parsing import parse_json
from evaluation import registry
from evaluation.data import EvaluationData
from evaluation.extraction.forward import num_test_in_train, splits_of, write_features
from evaluation.extraction.recipe import Size, extraction_of, feature_facts, feature_recipe
from evaluation.features import ArrayWriter, FeatureCache
from evaluation.keys import digest_of
from evaluation.protocol import EvaluationError
from evaluation.registry import load_head
from evaluation.results import EvaluationResult, ResultStore
from evaluation.threads import Threads

__all__ = ["EvaluationResult", "architecture_of", "available_device", "evaluate"]

CPU_BATCH = 32  # its activations stay in the caches of a core; 64 and more took 3 to 30 % longer per image
DEVICE_BATCH = 128


def evaluate(
    checkpoint: Path,
    protocol: str,
    data: EvaluationData,
    *,
    store: Path,
    image_size: Size | None = None,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    force: bool = False,
    threads: Threads | None = None,
) -> EvaluationResult:
    """Evaluates a frozen backbone, or returns the stored result of the same weights, protocol and data.

    Args:
        checkpoint: directory with `backbone.safetensors`, or that file.
        protocol: one of `registry.names()`.
        store: storage root; results go to `store/evaluations`, features to `store/features`.
        image_size: pixels per side, (height, width) for dense protocols, None for the backbone's own size.
        batch_size: samples per forward pass; decides speed and memory, no score. None: `CPU_BATCH`, elsewhere
            `DEVICE_BATCH`.
        device: where the backbone and the head run; None: `available_device()`.
        seed: of the selection splits, the batch order and the bootstrap.
        force: compute and replace the result even when it is stored; intact features are used again.
        threads: what computes; None: as many threads as torch would use.

    Raises:
        EvaluationError: unknown protocol, data that does not fit it, a size patches do not tile, non-finite features.
        BackboneError, DataError (both `ValueError`): missing or damaged weights or shards.
    """
    started = time.perf_counter()
    spec = registry.protocol(protocol)
    reported = [metric.name for metric in spec.metrics]
    weights, architecture = weights_digest(checkpoint), architecture_of(checkpoint)
    extraction = extraction_of(architecture.get("kind", "image"))
    recipe = feature_recipe(extraction, spec, architecture, image_size)
    opened = data.open(spec, extraction.inputs)
    features_of = feature_facts(weights, recipe, opened.digest)
    facts = {"protocol": spec.name, "version": spec.version, "params": dict(spec.params), "seed": seed}
    key = digest_of({**features_of, **facts})
    on_device = available_device() if device is None else torch.device(device)
    computing = threads or Threads(torch.get_num_threads())
    batch = batch_size or (CPU_BATCH if on_device.type == "cpu" else DEVICE_BATCH)

    def make() -> EvaluationResult:
        def write(writer: ArrayWriter) -> None:
            backbone = computing.run(load_backbone, checkpoint)
            settings: dict[str, Any] = {"batch_size": batch, "device": on_device, "threads": computing}
            write_features(writer, backbone, extraction, opened, recipe, **settings)

        arrays, were_made = FeatureCache(store).once(digest_of(features_of), features_of, write)
        extracted = time.perf_counter()
        train, test, num_classes = splits_of(arrays, opened, extraction, recipe, spec.target_label)
        settings = {"num_classes": num_classes, "params": spec.params, "seed": seed, "device": on_device}
        outcome = computing.run(load_head(spec), train, test, **settings)
        if not {spec.headline.name} <= set(outcome.metrics) <= set(reported):  # some need what not all backbones have
            raise EvaluationError(
                f"protocol {spec.name!r} reported {sorted(outcome.metrics)}, but registers {sorted(reported)}"
            )
        return EvaluationResult(
            key=key,
            protocol=spec.name,
            version=spec.version,
            data=data.name,
            data_digest=opened.digest,
            weights_digest=weights,
            metrics={name: float(outcome.metrics[name]) for name in reported if name in outcome.metrics},
            details={
                **outcome.details,
                **({"image_size": recipe["size"]} if "size" in recipe else {}),
                "num_train": opened.train.num_samples,
                "num_test": opened.test.num_samples,
                "num_test_in_train": num_test_in_train(arrays),
                "seed": seed,
                "features_cached": not were_made,
                "seconds_features": round(extracted - started, 3),
            },
            seconds=round(time.perf_counter() - started, 3),
            described=spec.metrics,
        )

    result = ResultStore(store).once(key, make, data=data.name, force=force)
    # A stored result has its numbers in another order, and one of an older version does not say what they mean.
    known = tuple(metric for metric in spec.metrics if metric.name in result.metrics)
    return replace(result, metrics={metric.name: result.metrics[metric.name] for metric in known}, described=known)


def available_device() -> torch.device:
    """CUDA when this process sees a device of it, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def architecture_of(checkpoint: Path) -> Mapping[str, Any]:
    """What the weights file says about the backbone."""
    path = Path(checkpoint)
    with safe_open(path / BACKBONE_FILE if path.is_dir() else path, framework="pt") as file:
        architecture: dict[str, Any] = parse_json(file.metadata()["pretrain.backbone"])
    return architecture
