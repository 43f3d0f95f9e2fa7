"""What a recipe trains on: the data it names, and one rank's share of it as a stream of views on this rank's device.

Not here: the order of samples and their decoding (`data_pipelines`), which views there are (`Objective.views`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from data_pipelines.shards.dataset import Dataset
from data_pipelines.streaming.joined import Joined
from data_pipelines.streaming.mixture import Mixture
from data_pipelines.streaming.stream import Samples, Stream, StreamState
from data_pipelines.streaming.unindexed import UnindexedSamples, UnindexedStream
from data_pipelines.views.photometric import PARAMS_SUFFIX
from data_pipelines.views.specs import views_from
from objectives.base import Objective
from pretrain.config.data import fetch_options, open_data
from pretrain.config.schema import DataConfig, Recipe
from pretrain.record.events import SourceOpened
from pretrain.record.run_dir import RunDir

__all__ = ["SampleRecord", "Transfer", "build_stream", "num_corrupt", "sources_of", "to_device"]


def build_stream(
    recipe: Recipe, objective: Objective, rank: int, state: StreamState, *, pin_memory: bool = False
) -> Stream:
    """This rank's share of the recipe's sample order, from `state` on, in the views that the objective asks for."""
    assert recipe.train.micro_batch_size is not None  # filled in by `pretrain.config.checks.batch`, as is the next one
    assert recipe.data.loader_workers is not None
    return _stream_of(recipe.data)(
        views_from(objective.views()),
        mix=[(share, views_from(views)) for share, views in objective.mixed_views()],
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        rank=rank,
        world_size=recipe.train.workers,
        seed=recipe.train.seed,
        state=state,
        num_workers=recipe.data.loader_workers,
        prefetch_batches=recipe.data.prefetch_batches,
        loader_timeout_s=recipe.data.loader_timeout_s,
        block_size=recipe.data.block_size,
        window=recipe.data.window,
        num_streams=recipe.data.num_streams,
        max_corrupt_fraction=recipe.data.max_corrupt_fraction,
        decoder=recipe.data.decoder,
        scaled_decoding=recipe.data.scaled_decoding,
        resampler=recipe.data.resampler,
        exif_rotation=recipe.data.exif_rotation,
        pin_memory=pin_memory,
    )


def _stream_of(data: DataConfig) -> Callable[..., Stream]:
    """The kind of stream that the recipe wants, bound to its data."""
    if data.unindexed == "index":
        return partial(Stream, open_data(data))
    assert data.train is not None  # checked by `pretrain.config.checks.data`
    return partial(UnindexedStream, data.train, fetch=fetch_options(data))


def sources_of(opened: Samples, data: DataConfig, step: int, stage: str) -> list[SourceOpened]:
    """The sources of samples, one event for each, with what `dataset.json` says of how they were packed.

    Args:
        opened: What a stream reads.
        data: What the recipe says of it.
        step: Steps of the run that are done.
        stage: Its name.
    """
    known: dict[str, Any] = {"step": step, "stage": stage}
    if isinstance(opened, Dataset):
        return [SourceOpened(**known, name="", shards=str(data.train), share=1.0, **_counts(opened))]
    if isinstance(opened, Mixture | Joined):
        of_slots = np.bincount(opened.pattern) / len(opened.pattern) if isinstance(opened, Mixture) else None
        return [
            SourceOpened(
                **known,
                name=part.name,
                shards=written.shards,
                share=1.0 if of_slots is None else float(of_slots[number]),  # joined ones give to every sample
                **_counts(part.dataset),
            )
            for number, (part, written) in enumerate(zip(opened.parts, data.mixture, strict=True))
        ]
    assert isinstance(opened, UnindexedSamples)  # `_stream_of` knows no other
    uncounted: dict[str, Any] = {"samples": 0, "num_shards": len(opened.shards), "digest": opened.digest}
    return [SourceOpened(**known, name="", shards=str(data.train), share=1.0, **uncounted)]


def _counts(dataset: Dataset) -> dict[str, Any]:
    """What is known of a data set: of `dataset.json`, which anybody may have written, as much as can be read."""
    told = dataset.description
    splits = told.get("splits")
    found = splits.items() if isinstance(splits, Mapping) else ()
    counts = {name: split["samples"] for name, split in found if isinstance(split, Mapping) and "samples" in split}
    left_out = {name: told.get(name) for name in ("duplicates", "rejected")}
    return {
        "samples": dataset.num_samples,
        "num_shards": len(dataset.shards),
        "digest": dataset.digest,
        "fields": tuple(sorted(dataset.fields)),
        "splits": {str(name): count for name, count in counts.items() if type(count) is int},
        **{name: count for name, count in left_out.items() if type(count) is int},
    }


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on a device, but for photometric parameters: from the host they steer the device without a sync."""
    return {
        name: tensor if name.endswith(PARAMS_SUFFIX) else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


class Transfer:
    """Brings batches to a device while that still works on what it was given before.

    On CUDA the copies go through a stream of their own: the end of a step (optimizer, teacher) hides those of the next
    one's first micro-batch, and each backward pass hides the next micro-batch. Page-locked batches only; others are
    copied while the host waits.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The batch on the device, as `to_device`; what computes with it next comes after the copies."""
        if self._stream is None:
            return to_device(batch, self._device)
        with torch.cuda.stream(self._stream):
            moved = to_device(batch, self._device)
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for tensor in moved.values():
            if tensor.is_cuda:
                tensor.record_stream(current)  # its memory must not be given to another copy while it is in use
        return moved


def num_corrupt(stream: Stream, device: torch.device) -> float:
    """Damaged samples that were replaced so far, on all ranks. A collective, and a host sync."""
    total = torch.tensor(float(stream.num_corrupt), device=device)
    dist.all_reduce(total)
    return float(total)


class SampleRecord:
    """Which samples each step of this rank took: one JSON line per step, with sample ids in the order of the batches.

    A step that was trained twice, after a restart from an earlier checkpoint, has two equal lines.

    Args:
        run: The run whose samples these are.
        is_wanted: False: nothing is written.
    """

    def __init__(self, run: RunDir, *, is_wanted: bool) -> None:
        path = run.samples(dist.get_rank())
        if is_wanted:
            path.parent.mkdir(exist_ok=True)
        self._file = path.open("a") if is_wanted else None

    def write(self, step: int, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        """Note the batches of a step (1-based)."""
        if self._file is not None:
            ids = [sample_id for batch in batches for sample_id in batch["sample_id"].tolist()]
            self._file.write(json.dumps({"step": step, "world_size": dist.get_world_size(), "ids": ids}) + "\n")
            self._file.flush()
