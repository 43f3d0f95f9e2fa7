"""The training loop. Ray starts it by default, torchrun can start it as well; it imports neither Ray nor MLflow.

One step: take the rank's micro-batches from the stream, forward and backward through the objective, one optimiser step,
the objective's after-step work. What the loop has to say goes to the run's journal (one JSON line per record, rank 0
only); terminal, MLflow, evaluations and the report all read that file, so none of them can slow a step down.

    torchrun --nproc-per-node 2 -m pretrain.worker RECIPE [key=value ...] --run-dir DIR

What is not here: DeepSpeed (`pretrain.training.engine`), checkpoints (`pretrain.training.state`), placement
(`cluster`).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from backbones.registry import create_backbone
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.storage.stores import FetchOptions
from data_pipelines.streaming.mixture import Mixture, Part
from data_pipelines.streaming.stream import Stream, StreamState
from data_pipelines.streaming.unindexed import UnindexedStream
from data_pipelines.views.maker import views_from
from data_pipelines.views.photometric import PARAMS_SUFFIX
from objectives import registry as objectives
from objectives.base import Objective, Progress
from pretrain.checkpoints import store as checkpoint
from pretrain.config.schema import DataConfig, Recipe
from pretrain.errors import RequestError
from pretrain.record.journal import Journal
from pretrain.training import state as snapshot
from pretrain.training.engine import Engine, StepResult, init_distributed, pick_device
from pretrain.training.guard import Watch
from pretrain.training.image_grid import write_pictures
from pretrain.training.schedules import learning_rate, weight_decay

__all__ = ["train"]

Listener = Callable[[dict[str, Any]], None]
START_STEPS = 2  # the first steps of a process pay for caches and allocations: they do not count as throughput


def train(
    recipe: Recipe,
    run_dir: Path,
    *,
    listener: Listener | None = None,
    launched: float | None = None,
    placed: float | None = None,
) -> None:
    """Train to the recipe's last step, from the newest complete checkpoint in `run_dir` if there is one.

    Args:
        recipe: Resolved recipe.
        run_dir: Directory of the run, the same on all ranks (shared storage when they are on several nodes).
        listener: Gets each journal record on rank 0 as well.
        launched: Unix time at which the user asked for the run; the start-up record counts from there.
        placed: Unix time at which this process was ready to import this module.

    Raises:
        ValueError: World size and recipe disagree.
        FloatingPointError: Too many steps had a loss that is not finite, or the run collapsed and
            `train.stop_on_collapse` is set.
        CheckpointError: The newest checkpoint is damaged or does not fit this run.
    """
    entered = time.time()
    clock = {"launched": launched or entered, "placed": placed or entered, "entered": entered}
    device = pick_device(recipe.train.device)
    rank, world_size = init_distributed(device)
    if world_size != recipe.train.workers:
        raise ValueError(f"{world_size} workers were started, but train.workers={recipe.train.workers}")
    clock["joined"] = time.time()

    torch.manual_seed(recipe.train.seed)  # the same initial weights on every rank
    objective = build_objective(recipe)
    engine = Engine(objective, recipe, device)
    torch.manual_seed(recipe.train.seed + 1 + rank)  # stochastic depth and the like differ between ranks
    clock["built"] = time.time()

    pids = [0] * world_size
    dist.all_gather_object(pids, os.getpid())  # all ranks; rank 0 writes down which process is which rank
    found = snapshot.newest(run_dir)
    state = snapshot.stream_state(found[1]) if found else StreamState(0, 0)
    stream = build_stream(recipe, objective, rank, state, pin_memory=device.type == "cuda")
    with Journal(run_dir / "journal.jsonl") if rank == 0 else _Silence() as journal:
        say = _speaker(journal, listener if rank == 0 else None)
        step = found[0].step if found else 0
        place = {"world_size": world_size, "device": str(device), "pids": pids, "decoder": stream.decoder}
        exact = stream.order_signature.get("exact", True)  # whether a resumed run sees what an unbroken one would
        say("start", step=step, total_steps=recipe.train.steps, exact=exact, **place)
        if objective.compares_images and (recipe.train.accumulation or 1) > 1:
            text = (
                f"{recipe.objective.name} compares the images of a micro-batch: {recipe.train.accumulation} of them "
                "are not what one large one is; train.accumulation=1 is"
            )
            say("warning", step=step, about="accumulation", text=text)
        if found:
            say("resumed", **snapshot.restore(*found, engine, stream))
        elif recipe.evaluation.baseline and not checkpoint.published(run_dir):
            path = snapshot.take(run_dir, 0, engine, stream, recipe, training_state=False)
            say("checkpoint", step=0, path=path.relative_to(run_dir))
        run_steps(recipe, run_dir, engine, stream, step, say, clock)
        say("finished", step=recipe.train.steps)
    dist.barrier()  # all ranks: nobody leaves while rank 0 still publishes
    dist.destroy_process_group()


def run_steps(
    recipe: Recipe,
    run_dir: Path,
    engine: Engine,
    stream: Stream,
    first_step: int,
    say: Callable[..., None],
    clock: dict[str, float],
) -> None:
    """The steps from `first_step` to the last one."""
    total, accumulation = recipe.train.steps, recipe.train.accumulation or 1
    batches = iter(stream)
    samples = _SampleRecord(run_dir) if recipe.data.record_samples else _Silence()
    window, watch = _Window(), Watch(recipe.train, say)
    for step in range(first_step, total):
        fetched = time.perf_counter()
        loaded = [next(batches) for _ in range(accumulation)]
        window.waited += time.perf_counter() - fetched
        samples.write(step + 1, loaded)
        micro_batches = [stream.finish(_to_device(batch, engine.device)) for batch in loaded]
        if step == first_step:
            clock["first_batch"] = time.time()

        done = step + 1
        is_logged = done % recipe.train.log_every == 0 or done == total
        progress = Progress(step, total, is_logged)
        rates = {"lr": learning_rate(recipe, step), "weight_decay": weight_decay(recipe, step)}
        engine.set_schedule(rates["lr"], rates["weight_decay"])
        result = engine.step(micro_batches, progress)
        if not result.applied:
            watch.skipped(done)

        window.steps += 1
        if step == first_step:
            _announce_startup(clock, say)
        if is_logged:
            values = _mean_over_ranks(result)  # host sync: only on logged steps
            if recipe.data.max_corrupt_fraction:
                values["corrupt_samples"] = _sum_over_ranks(stream.num_corrupt, engine.device)
            throughput = window.close(recipe.train.global_batch_size)
            seen = {"samples_seen": done * recipe.train.global_batch_size, "memory_mb": _peak_memory_mb(engine.device)}
            say("metrics", step=done, values={**values, **rates, **throughput, **seen})
            watch.judge(engine.objective.diagnose(values, progress), done)
        pause = time.perf_counter()
        if _is_due(done, total, recipe.train.pictures_every):
            pictures = engine.pictures(micro_batches[0])
            if dist.get_rank() == 0:
                say("pictures", step=done, path=write_pictures(run_dir, done, pictures).relative_to(run_dir))
        if _is_due(done, total, recipe.train.checkpoint_every):
            path = snapshot.take(run_dir, done, engine, stream, recipe)
            say("checkpoint", step=done, path=path.relative_to(run_dir))
        window.began += time.perf_counter() - pause  # pictures and checkpoints are not part of a step's time
        if done - first_step == START_STEPS and window.steps > 1:
            window.restart()
    del batches  # ends the loader's processes


def build_objective(recipe: Recipe) -> Objective:
    """The recipe's objective around its backbone, initialised from torch's global generator."""
    settings = recipe.backbone
    backbone = create_backbone(
        settings.name,
        image_size=settings.image_size,
        patch_size=settings.patch_size,
        in_chans=settings.in_chans,
        options=dict(settings.options),
        pixel_mean=tuple(settings.pixel_mean),
        pixel_std=tuple(settings.pixel_std),
    )
    return objectives.load(recipe.objective.name)(backbone, recipe.objective)


def build_stream(
    recipe: Recipe, objective: Objective, rank: int, state: StreamState, *, pin_memory: bool = False
) -> Stream:
    """This rank's share of the recipe's sample order, from `state` on, in the views that the objective asks for."""
    assert recipe.train.micro_batch_size is not None  # filled in by `pretrain.config.checks`
    return _stream_of(recipe.data)(
        views_from(objective.views()),
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
        rank=rank,
        world_size=recipe.train.workers,
        seed=recipe.train.seed,
        state=state,
        num_workers=recipe.data.loader_workers,
        prefetch_batches=recipe.data.prefetch_batches,
        block_size=recipe.data.block_size,
        window=recipe.data.window,
        num_streams=recipe.data.num_streams,
        max_corrupt_fraction=recipe.data.max_corrupt_fraction,
        decoder=recipe.data.decoder,
        scaled_decoding=recipe.data.scaled_decoding,
        resampler=recipe.data.resampler,
        pin_memory=pin_memory,
    )


def _stream_of(data: DataConfig) -> Callable[..., Stream]:
    """The kind of stream that the recipe wants, bound to its data."""
    if data.unindexed == "index":
        return partial(Stream, open_data(data))
    assert data.train is not None  # checked by `pretrain.config.checks`
    return partial(UnindexedStream, data.train, fetch=_fetch_options(data))


def open_data(data: DataConfig) -> Dataset | Mixture:
    """The recipe's data set, or its mixture of several."""
    fetch = _fetch_options(data)
    if data.train is not None:
        return open_dataset(data.train, fetch=fetch, limit=data.limit)
    opened = ((part, open_dataset(part.shards, fetch=fetch, limit=part.limit)) for part in data.mixture)
    return Mixture([Part(part.name, dataset, weight=part.weight, repeat=part.repeat) for part, dataset in opened])


def _fetch_options(data: DataConfig) -> FetchOptions:
    return FetchOptions(
        cache_dir=data.cache_dir, cache_bytes=int(data.cache_gb * 1e9), mode=data.fetch, allow_pipe=data.allow_pipe
    )


class _Window:
    """Time and steps since the last logged step."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.steps, self.waited, self.began = 0, 0.0, time.perf_counter()

    def close(self, global_batch_size: int) -> dict[str, float]:
        elapsed = time.perf_counter() - self.began
        values = {
            "images_per_s": self.steps * global_batch_size / elapsed,
            "step_s": elapsed / self.steps,
            "data_wait_fraction": self.waited / elapsed,
        }
        self.restart()
        return values


class _Silence:
    """The journal of every rank but the first."""

    def __enter__(self) -> _Silence:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def write(self, *_: object, **fields: Any) -> None:
        return None


class _SampleRecord:
    """Which samples each step of this rank took: one JSON line per step, with sample ids in the order of the batches.

    A step that was trained twice, after a restart from an earlier checkpoint, has two equal lines.
    """

    def __init__(self, run_dir: Path) -> None:
        path = run_dir / "samples" / f"rank-{dist.get_rank():05d}.jsonl"
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("a")

    def write(self, step: int, batches: Sequence[dict[str, torch.Tensor]]) -> None:
        ids = [sample_id for batch in batches for sample_id in batch["sample_id"].tolist()]
        self._file.write(json.dumps({"step": step, "world_size": dist.get_world_size(), "ids": ids}) + "\n")
        self._file.flush()


def _speaker(journal: Journal | _Silence, listener: Listener | None) -> Callable[..., None]:
    def say(kind: str, **fields: Any) -> None:
        journal.write(kind, **fields)
        if listener is not None:
            listener({"time": time.time(), "kind": kind, **fields})

    return say


def _announce_startup(clock: dict[str, float], say: Callable[..., None]) -> None:
    """Where the time before the first step went; seconds of wall clock, CPU seconds of this process."""
    now = time.time()
    say(
        "startup",
        total_s=now - clock["launched"],
        placed_s=clock["placed"] - clock["launched"],
        imported_s=clock["entered"] - clock["placed"],
        joined_s=clock["joined"] - clock["entered"],
        built_s=clock["built"] - clock["joined"],
        first_batch_s=clock["first_batch"] - clock["built"],
        first_step_s=now - clock["first_batch"],
        worker_cpu_s=time.process_time(),
    )


def _to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Photometric parameters stay: from the host they steer the device without a sync."""
    return {
        name: tensor if name.endswith(PARAMS_SUFFIX) else tensor.to(device, non_blocking=True)
        for name, tensor in batch.items()
    }


def _mean_over_ranks(output: StepResult) -> dict[str, float]:
    values = torch.stack([output.loss, *output.metrics.values()])
    dist.all_reduce(values)  # all ranks, logged steps only; rank 0 writes the mean
    return dict(zip(["loss", *output.metrics], (values / dist.get_world_size()).tolist(), strict=True))


def _sum_over_ranks(count: int, device: torch.device) -> float:
    total = torch.tensor(float(count), device=device)
    dist.all_reduce(total)  # all ranks, logged steps only
    return float(total)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _is_due(done: int, total: int, every: int | None) -> bool:
    return every is not None and every > 0 and (done % every == 0 or done == total)


def main() -> None:
    """Entry point for torchrun: no Ray, no evaluations; checkpoints, journal and terminal lines as always."""
    import argparse

    from pretrain.config.load import load_recipe
    from pretrain.reporting.terminal import Terminal

    parser = argparse.ArgumentParser(prog="torchrun ... -m pretrain.worker", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run-dir", type=Path, required=True, help="new, or one to go on with")
    arguments = parser.parse_intermixed_args()
    try:
        recipe = load_recipe(arguments.recipe, arguments.overrides)
    except RequestError as error:
        print("\n".join(f"error: {mistake}" for mistake in error.mistakes), file=sys.stderr)
        raise SystemExit(2) from None

    def listener(record: dict[str, Any]) -> None:
        terminal.show(record)
        if record["kind"] == "checkpoint":
            checkpoint.prune(arguments.run_dir, keep_last=recipe.train.keep_last)

    with Terminal(recipe) as terminal:
        train(recipe, arguments.run_dir, listener=listener)


if __name__ == "__main__":
    main()
