"""`evaluate`: (checkpoint, protocol, data) -> result, computed once.

The key of a result is the SHA-256 of the weights digest (names, dtypes, shapes and bytes of what the backbone loads,
and its architecture; not the path, not the step), the feature recipe, the data digest and the protocol with its version
and parameters; of a protocol that needs the checkpoint's decoder also that one's digest. Batch size and device are
outside it: they decide no score. The store is asked first, then the feature cache; only then is the backbone loaded and
run. When to evaluate what, and where, is decided elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open

from backbones.io import BACKBONE_FILE, heads_digest, heads_spec, load_backbone, weights_digest
from data_pipelines.parsing import parse_json
from evaluation import registry
from evaluation.comparison import PerSample
from evaluation.data import EvaluationData
from evaluation.extraction.decoding import Decoded, load_reconstruction, require_decoder
from evaluation.extraction.forward import labels_of, num_classes_of, num_test_in_train, splits_of, write_features
from evaluation.extraction.frozen import Frozen
from evaluation.extraction.recipe import Extraction, Reads, Size, extraction_of, feature_facts, feature_recipe
from evaluation.features import ArrayWriter, FeatureCache
from evaluation.floor import floor_of, is_small
from evaluation.keys import digest_of
from evaluation.metrics import Outcome
from evaluation.protocol import EvaluationError, Protocol
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
    reads: Reads = Reads(),  # noqa: B008 - it cannot be changed
    half_features: bool = False,
    known_as: Mapping[str, str | int] = MappingProxyType({}),
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
        reads: what of its samples the backbone was trained on, where that is known.
        half_features: store vectors of samples in half precision, which is another result.
        known_as: whose weights they are, for people: stands in the details of a result that is computed.

    Raises:
        EvaluationError: unknown protocol, data that does not fit it, a size patches do not tile, non-finite features.
        BackboneError, DataError (both `ValueError`): missing or damaged weights or shards.
    """
    started = time.perf_counter()
    spec = registry.protocol(protocol)
    reported = [metric.name for metric in spec.metrics]
    weights, architecture = weights_digest(checkpoint), architecture_of(checkpoint)
    extraction = extraction_of(architecture.get("kind", "image")).reading(reads)
    recipe = feature_recipe(extraction, spec, architecture, image_size, reads, in_half=half_features)
    on_device = available_device() if device is None else torch.device(device)
    asked = _Asked(
        checkpoint,
        spec,
        data,
        extraction,
        recipe,
        store=store,
        seed=seed,
        device=on_device,
        batch_size=batch_size or (CPU_BATCH if on_device.type == "cpu" else DEVICE_BATCH),
        threads=threads or Threads(torch.get_num_threads()),
    )
    computation = {"decoded": _on_reconstructions, "encoder": _on_samples}.get(spec.tokens, _on_features)
    data_digest, inputs, compute = computation(asked, weights)
    facts = {"protocol": spec.name, "version": spec.version, "params": dict(spec.params), "seed": seed}
    key = digest_of({**inputs, **facts})
    results = ResultStore(store)

    def make() -> EvaluationResult:
        outcome, details = compute()
        _keep(outcome, key, results)
        metrics = {**outcome.metrics, **_floor(asked, results)}
        if not {spec.headline.name} <= set(metrics) <= set(reported):  # some need what not all backbones have
            raise EvaluationError(
                f"protocol {spec.name!r} reported {sorted(metrics)}, but registers {sorted(reported)}"
            )
        return EvaluationResult(
            key=key,
            protocol=spec.name,
            version=spec.version,
            data=data.name,
            data_digest=data_digest,
            weights_digest=weights,
            metrics={name: float(metrics[name]) for name in reported if name in metrics},
            details={
                **details,
                **outcome.details,
                **({"image_size": recipe["size"]} if "size" in recipe else {}),
                **({"half_features": True} if half_features and spec.tokens == "pooled" else {}),
                **({"known_as": dict(known_as)} if known_as else {}),
                "seed": seed,
            },
            seconds=round(time.perf_counter() - started, 3),
            described=spec.metrics,
        )

    result = results.once(key, make, data=data.name, force=force)
    # A stored result has its numbers in another order, and one of an older version does not say what they mean.
    known = tuple(metric for metric in spec.metrics if metric.name in result.metrics)
    return replace(result, metrics={metric.name: result.metrics[metric.name] for metric in known}, described=known)


def _keep(outcome: Outcome, key: str, results: ResultStore) -> None:
    of_samples = None
    if outcome.per_sample is not None:
        groups = None if outcome.groups is None else outcome.groups.cpu().numpy()
        of_samples = PerSample(outcome.per_sample.cpu().numpy(), groups)
    if of_samples is not None or outcome.shown:
        results.keep(key, of_samples, {name: array.cpu().numpy() for name, array in outcome.shown.items()})


@dataclass(frozen=True)
class _Asked:
    """What was asked for, and how it is computed."""

    checkpoint: Path
    spec: Protocol
    data: EvaluationData
    extraction: Extraction
    recipe: Mapping[str, Any]
    store: Path
    seed: int
    batch_size: int
    device: torch.device
    threads: Threads


# A data digest, what a result is found by beside the protocol, and what computes it and more details of it.
_Computation = tuple[str, dict[str, Any], Callable[[], tuple[Outcome, dict[str, Any]]]]


def _on_features(asked: _Asked, weights: str) -> _Computation:
    """By frozen features of both splits."""
    opened = asked.data.open(asked.spec, asked.extraction.inputs)
    inputs = feature_facts(weights, asked.recipe, opened.digest)

    def write(writer: ArrayWriter) -> None:
        backbone = asked.threads.run(load_backbone, asked.checkpoint)
        settings: dict[str, Any] = {"batch_size": asked.batch_size, "device": asked.device, "threads": asked.threads}
        write_features(writer, backbone, asked.extraction, opened, asked.recipe, **settings)

    def compute() -> tuple[Outcome, dict[str, Any]]:
        started = time.perf_counter()
        arrays, were_made = FeatureCache(asked.store).once(digest_of(inputs), inputs, write)
        extracted = time.perf_counter()
        train, test, num_classes = splits_of(arrays, opened, asked.extraction, asked.recipe, asked.spec.target_label)
        settings = {"num_classes": num_classes, "params": asked.spec.params, "seed": asked.seed}
        outcome = asked.threads.run(load_head(asked.spec), train, test, **settings, device=asked.device)
        return outcome, {
            "num_train": opened.train.num_samples,
            "num_test": opened.test.num_samples,
            "num_test_in_train": num_test_in_train(arrays),
            "features_cached": not were_made,
            "seconds_features": round(extracted - started, 3),
        }

    return opened.digest, inputs, compute


def _on_samples(asked: _Asked, weights: str) -> _Computation:
    """By what the protocol makes of the encoder and both splits."""
    opened = asked.data.open(asked.spec, asked.extraction.inputs)

    def compute() -> tuple[Outcome, dict[str, Any]]:
        label = asked.spec.target_label
        encoder = asked.threads.run(load_backbone, asked.checkpoint).to(asked.device).eval()
        train, test = (
            Frozen(
                getattr(opened, split),
                encoder,
                labels_of(opened, split, asked.extraction, asked.recipe, label),
                asked.extraction,
                asked.recipe,
                batch_size=asked.batch_size,
                device=asked.device,
                threads=asked.threads,
            )
            for split in ("train", "test")
        )
        num_classes = num_classes_of(opened, label, [train.labels, test.labels])
        settings = {"num_classes": num_classes, "params": asked.spec.params, "seed": asked.seed}
        outcome = load_head(asked.spec)(train, test, **settings, device=asked.device)
        return outcome, {"num_train": len(train), "num_test": len(test)}

    return opened.digest, feature_facts(weights, asked.recipe, opened.digest), compute


def _on_reconstructions(asked: _Asked, weights: str) -> _Computation:
    """By what encoder and decoder make of held-out samples."""
    require_decoder(asked.spec.name, str(asked.checkpoint), heads_spec(asked.checkpoint))
    held_out, heads = asked.data.open_held_out(asked.extraction.inputs), heads_digest(asked.checkpoint)
    digest = digest_of({"test": held_out.digest})

    def compute() -> tuple[Outcome, dict[str, Any]]:
        decoded = Decoded(
            held_out,
            asked.threads.run(load_reconstruction, asked.checkpoint).to(asked.device),
            asked.extraction,
            asked.recipe,
            seed=asked.seed,
            batch_size=asked.batch_size,
            device=asked.device,
            threads=asked.threads,
        )
        outcome = load_head(asked.spec)(decoded, params=asked.spec.params, seed=asked.seed)
        return outcome, {"heads_digest": heads, "num_test": held_out.num_samples}

    return digest, feature_facts(weights, asked.recipe, digest) | {"heads": heads}, compute


def _floor(asked: _Asked, results: ResultStore) -> dict[str, float]:
    """What samples score without a backbone, by the name of the metric that says so; empty where nothing says it."""
    spec = asked.spec
    floor = floor_of(spec, architecture_of(asked.checkpoint).get("kind", "image"))
    if floor is None:  # most protocols: the data are not opened again for them
        return {}
    opened = asked.data.open(spec, asked.extraction.inputs)
    if not is_small(opened):
        return {}
    facts = {"protocol": spec.name, "version": spec.version, "params": dict(spec.params), "seed": asked.seed}
    key = digest_of({**floor.key_facts(opened), **facts})
    started = time.perf_counter()

    def make() -> EvaluationResult:
        train, test = floor.splits_of(opened, asked.extraction.inputs, asked.threads)
        num_classes = num_classes_of(opened, spec.target_label, [train.labels, test.labels])
        settings = {"num_classes": num_classes, "params": spec.params, "seed": asked.seed}
        outcome = asked.threads.run(load_head(spec), train, test, **settings, device=asked.device)
        _keep(outcome, key, results)
        known = tuple(metric for metric in spec.metrics if metric.name in outcome.metrics)
        return EvaluationResult(
            key=key,
            protocol=spec.name,
            version=spec.version,
            data=asked.data.name,
            data_digest=opened.digest,
            weights_digest=floor.name,
            metrics={metric.name: float(outcome.metrics[metric.name]) for metric in known},
            details={**outcome.details, "num_test": opened.test.num_samples, "seed": asked.seed, **floor.facts},
            seconds=round(time.perf_counter() - started, 3),
            described=known,
        )

    scored = results.once(key, make, data=asked.data.name)
    return {f"{spec.headline.name}_{floor.name}": scored.metrics[spec.headline.name]}


def available_device() -> torch.device:
    """CUDA when this process sees a device of it, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def architecture_of(checkpoint: Path) -> Mapping[str, Any]:
    """What the weights file says about the backbone."""
    path = Path(checkpoint)
    with safe_open(path / BACKBONE_FILE if path.is_dir() else path, framework="pt") as file:
        architecture: dict[str, Any] = parse_json(file.metadata()["pretrain.backbone"])
    return architecture
