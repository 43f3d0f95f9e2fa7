"""The training loop. Ray starts it by default, torchrun can start it as well; it imports neither Ray nor MLflow.

One step: take the rank's micro-batches from the stream, forward and backward through the objective, one optimizer step,
the objective's after-step work. What happens goes to the run's event log (one JSON line per event, rank 0 only);
terminal, MLflow, evaluations and the report all read that file, so none of them can slow a step down.

    torchrun --nproc-per-node 2 -m pretrain.worker RECIPE [key=value ...] --run-dir DIR

Not here: DeepSpeed (`pretrain.training.engine`), data (`pretrain.training.inputs`), checkpoints
(`pretrain.training.state`, `pretrain.training.publication`), placement (`cluster`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from backbones.errors import BackboneError
from data_pipelines.errors import DataError, LoaderError
from data_pipelines.streaming.stream import Stream, StreamState
from objectives.base import Objective, Progress
from objectives.errors import ObjectiveError
from pretrain.checkpoints import store
from pretrain.checkpoints.initialization import Start
from pretrain.config.stages import Plan, Stage
from pretrain.config.worlds import with_workers, worlds
from pretrain.errors import EXIT_STOPPED, RequestError
from pretrain.record.disk import DiskFull
from pretrain.record.events import (
    CheckpointPublished,
    Event,
    Finished,
    Metrics,
    Preparing,
    Regrouping,
    Stopped,
    Taught,
    Visualizations,
    Warned,
)
from pretrain.record.events import Start as Started
from pretrain.record.heartbeat import Heartbeat, beating
from pretrain.record.journal import Journal
from pretrain.record.run_dir import RunDir
from pretrain.training import frozen_teachers, state
from pretrain.training.engine import Engine, init_distributed, pick_device
from pretrain.training.guard import HealthCheck
from pretrain.training.handover import take_over, weights_of
from pretrain.training.image_grid import write_image_grid
from pretrain.training.initial_weights import initial_weights
from pretrain.training.input_scale import scale_warning
from pretrain.training.inputs import SampleRecord, Transfer, build_stream, num_corrupt, sources_of
from pretrain.training.model import build_objective
from pretrain.training.outlook import accumulation_warning
from pretrain.training.publication import Publisher
from pretrain.training.schedules import learning_rate, weight_decay
from pretrain.training.spread_weights import Shared
from pretrain.training.stopping import StopRequest, watched
from pretrain.training.throughput import StartupClock, Throughput, peak_memory_mb

__all__ = ["train"]

Emit = Callable[[Event], None]


@dataclass(frozen=True)
class Process:
    """What is the same in all stages that a process trains.

    Attributes:
        plan: Resolved recipe of each stage.
        run: Directory of the run.
        device: Of this rank.
        emit: Takes events; of other ranks than the first they go nowhere.
        clock: Runs until the first step is done.
        stop: Whether this process was asked to end.
        heartbeat: Told what this rank is doing.
        size: Of the model, one line for people.
    """

    plan: Plan
    run: RunDir
    device: torch.device
    emit: Emit
    clock: StartupClock
    stop: StopRequest
    heartbeat: Heartbeat
    size: str


def train(
    plan: Plan,
    run_dir: Path,
    *,
    size: str = "",
    listener: Emit | None = None,
    launched: float | None = None,
    placed: float | None = None,
) -> Finished | Stopped | Regrouping:
    """Train to the last step of the last stage, from the newest complete checkpoint in `run_dir` if there is one.

    SIGTERM or Ctrl-C to any rank, or the file `RunDir.stop_request`, ends it after the next step, with a checkpoint; so
    does `RunDir.regroup_request`, to begin again.

    Args:
        plan: Resolved recipe of each stage.
        run_dir: Directory of the run, the same on all ranks (shared storage when they are on several nodes).
        size: What the start event says of the model's size.
        listener: Gets each event on rank 0 as well.
        launched: Unix time at which the user asked for the run, or these workers were to start again; the event of the
            start-up counts from there.
        placed: Unix time at which this process was ready to import this module.

    Returns:
        How it ended. Only the first rank knows that the workers are to begin again; others say that they stopped.

    Raises:
        ValueError: World size and recipe disagree, or a stage does not fit what it begins with.
        FloatingPointError: Too many steps were not finite, or the run collapsed and `train.stop_on_collapse` is set.
        CheckpointError: The newest checkpoint is damaged or does not fit this run.
        DataError: Data cannot be read, or too many samples are damaged.
        LoaderError: A loader process died or hangs.
    """
    clock = StartupClock(launched, placed)
    run, settings = RunDir(run_dir), plan.recipe.train
    device = pick_device(settings.device)
    with beating(run, int(os.environ["RANK"]), settings.hang_after_s) as heartbeat:
        heartbeat.beat("start", 0)
        rank, world_size = init_distributed(device, settings.collective_timeout_s)
        if world_size not in (possible := worlds(plan)):
            numbers = " or ".join(map(str, possible))
            raise ValueError(f"{world_size} workers were started, but train.workers={numbers}")
        plan = with_workers(plan, world_size)
        clock.note("joined")

        store.place(run_dir, plan.recipe.checkpoints.storage)
        start, found = state.find_start(run_dir, plan.stages[0].recipe)
        is_first = rank == 0
        with (
            Journal(run.journal) if is_first else nullcontext() as journal,
            watched(run if is_first else None) as stop,
        ):

            def emit(event: Event) -> None:
                if journal is not None:
                    journal.write(event)
                    if listener is not None:
                        listener(event)

            process = Process(plan, run, device, emit, clock, stop, heartbeat, size)
            first = 0 if found is None else plan.index_at(found.step)
            handed = Shared(device)  # weights of the stage before
            stopped: int | None = None
            for index in range(first, len(plan.stages)):
                if index > first:
                    start, found = state.stage_start(run_dir, plan, index), None
                stopped = train_stage(process, index, start, found, handed)
                if stopped is not None:
                    break
            end: Finished | Stopped | Regrouping = Finished(step=plan.total_steps)
            if stopped not in (None, plan.total_steps):
                why = stop.regroups()
                end = Stopped(step=stopped) if why is None else Regrouping(step=stopped, why=why)
            emit(end)
        dist.barrier()  # all ranks: nobody leaves while rank 0 still publishes
        dist.destroy_process_group()
    return end


def train_stage(process: Process, index: int, start: Start, found: state.Snapshot | None, handed: Shared) -> int | None:
    """One stage of the plan, to its last step or until it is stopped.

    Args:
        process: This one.
        index: The stage.
        start: How it begins.
        found: The training state that it goes on from, if `start` says so.
        handed: Weights of the stage before, by name; those of this one, in the end, when another follows.

    Returns:
        The step of the run after which it was stopped; None: it goes on.
    """
    plan, run, device, emit = process.plan, process.run, process.device, process.emit
    stage, recipe, rank = plan.stages[index], plan.stages[index].recipe, dist.get_rank()
    process.heartbeat.beat("start", found.step if found else stage.first_step)
    emit(Preparing(what="building the model"))
    torch.manual_seed(recipe.train.seed)  # the same initial weights on every rank
    with initial_weights(recipe.train.zero_stage or 0, device):
        objective = build_objective(recipe)
        initialized = state.begin_with(objective, start, stage, device) if start.how == "init_from" else None
        taken = take_over(objective, handed, stage.init_with) if start.how == "stage" else None
        teacher = frozen_teachers.fill(plan, index, objective, run.path)
        engine = Engine(objective, recipe, device)
    handed.clear()
    torch.manual_seed(recipe.train.seed + 1 + rank)  # stochastic depth and the like differ between ranks
    process.clock.note("built")

    begin = found.stream_state if found else StreamState(0, 0)
    stream = build_stream(recipe, objective, rank, begin, pin_memory=device.type == "cuda")
    if index == 0 or found:  # the first stage of this process
        _announce(process, stage, objective, stream, found.step if found else 0)
    if rank == 0:
        for source in sources_of(stream.dataset, recipe.data, found.step if found else stage.first_step, stage.name):
            emit(source)
    if teacher:
        emit(Taught(step=found.step if found else stage.first_step, stage=stage.name, teacher=teacher))
    if initialized:
        emit(initialized)
    if found:
        emit(state.restore(found, engine, stream, plan.optimizer_steps(index, found.step)))
    if taken:
        if not stage.reset_optimizer:
            state.carry_moments(run.path, stage, engine, taken)
        emit(taken.event(stage))
    if not found:
        objective.begin(engine.read_weights)
    with Publisher(run, stage, engine, stream, state.origin(start, found, initialized), emit) as publisher:
        if index == 0 and not found and recipe.evaluation.baseline and not store.published(run.path):
            publisher.take(0, training_state=False, is_last=True)
        stopped = run_steps(process, stage, engine, stream, found.step if found else stage.first_step, publisher)
    if index + 1 < len(plan.stages) and plan.stages[index + 1].init_from == index:
        handed.update(weights_of(engine))
    engine.close()
    return stopped


def run_steps(
    process: Process, stage: Stage, engine: Engine, stream: Stream, first_step: int, publisher: Publisher
) -> int | None:
    """The steps of a stage from the run's step `first_step` on, with their checkpoints.

    Schedules and `Progress` count the stage's own steps; what is written down counts those of the run.

    Returns:
        The step of the run after which it was stopped, with a checkpoint; None: all were done.
    """
    recipe, run, emit, clock, heartbeat = stage.recipe, process.run, process.emit, process.clock, process.heartbeat
    total, accumulation = recipe.train.steps, recipe.train.accumulation or 1
    batches = iter(stream)
    samples = SampleRecord(run, is_wanted=recipe.data.record_samples)
    rate, decay = learning_rate(recipe), weight_decay(recipe)
    throughput, health = Throughput(), HealthCheck(recipe.train, emit)

    transfer = Transfer(engine.device)

    def on_device(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return stream.finish(transfer(batch))

    for step in range(first_step - stage.first_step, total):
        done = stage.first_step + step + 1  # of the run
        heartbeat.beat("start" if clock.is_running else "data", done)
        with throughput.waiting():
            loaded = [next(batches) for _ in range(accumulation)]
        samples.write(done, loaded)
        clock.note("first_batch")
        if step == 0 and dist.get_rank() == 0:
            text = scale_warning(engine.objective, loaded[0], stream.dataset.fields, engine.device)
            if text is not None:
                emit(Warned(step=stage.first_step, about="input_scale", text=text))
        if not clock.is_running:  # the first step, which compiles and reserves, belongs to the start
            heartbeat.beat("step", done)

        is_logged = (step + 1) % recipe.train.log_every == 0 or step + 1 == total
        progress = Progress(step, total, is_logged)
        rates = {"lr": rate.at(step), "weight_decay": decay.at(step)}
        engine.set_schedule(rates["lr"], rates["weight_decay"], step)
        is_due = _is_due(step + 1, total, recipe.train.checkpoint_every)
        stop = process.stop.counts(checkpoint_is_due=is_due)
        result = engine.step((on_device(batch) for batch in loaded), progress, stop=stop)
        if not result.applied:
            health.skipped(done, result.bad_ranks)

        throughput.step_ended()
        if clock.is_running:
            emit(clock.startup())
        if is_logged:
            values = result.mean_over_ranks()  # host sync: only on logged steps
            if recipe.data.max_corrupt_fraction:
                values["corrupt_samples"] = num_corrupt(stream, engine.device)
            speed = throughput.report(recipe.train.global_batch_size)
            seen = {"samples_seen": stage.samples_seen(done), "memory_mb": peak_memory_mb(engine.device)}
            emit(Metrics(step=done, values={**values, **rates, **speed, **seen}))
            health.observe(engine.objective.diagnose(values, progress), done)
        with throughput.paused():
            if _is_due(step + 1, total, recipe.train.pictures_every):
                pictures = engine.pictures(on_device(loaded[0]))
                if dist.get_rank() == 0:
                    write_image_grid(run.visualizations(done), pictures)
                    emit(Visualizations(step=done, path=run.relative(run.visualizations(done))))
            publisher.tell()
            if result.stops or is_due:
                heartbeat.beat("checkpoint", done)
                publisher.take(done, is_last=result.stops or step + 1 == total)
        if result.stops:
            return done
    return None


def _announce(process: Process, stage: Stage, objective: Objective, stream: Stream, step: int) -> None:
    """Say what starts where, and what a user may not expect of these settings. A collective."""
    pids = [0] * dist.get_world_size()
    dist.all_gather_object(pids, os.getpid())  # all ranks; rank 0 writes down which process is which rank
    recipe, counted = stage.recipe, stage.recipe.data.unindexed == "index"
    start = Started(
        step=step,
        total_steps=process.plan.total_steps,
        world_size=len(pids),
        device=str(process.device),
        exact=stream.order_signature.get("exact", True),
        pids=tuple(pids),
        decoder=stream.decoder,
        size=process.size,
        epochs=recipe.train.steps * recipe.train.global_batch_size / stream.dataset.num_samples if counted else 0.0,
    )
    process.emit(start)
    if text := accumulation_warning(recipe, compares_images=objective.compares_images):
        process.emit(Warned(step=step, about="accumulation", text=text))


def _is_due(done: int, total: int, every: int | None) -> bool:
    return every is not None and every > 0 and (done % every == 0 or done == total)


def _saved_stage(run_dir: Path) -> list[str]:
    """A run that goes on keeps the ZeRO stage of its training state; its new number of ranks may suggest another."""
    newest = store.latest(run_dir)
    return [] if newest is None else [f"train.zero_stage={newest.manifest()['zero_stage']}"]


def main() -> None:
    """Entry point for torchrun: no Ray, no evaluations; checkpoints, event log and terminal lines as always.

    Exit code 75 says that it was stopped: the same command again goes on.
    """
    import argparse

    from pretrain.checkpoints.initialization import checked_plan
    from pretrain.config.load import load_plan
    from pretrain.known_checkpoints import KnownCheckpoints
    from pretrain.remote.places import uri_of
    from pretrain.reporting.terminal import Terminal
    from pretrain.screen import escape_diagnostics, say

    escape_diagnostics()
    parser = argparse.ArgumentParser(prog="torchrun ... -m pretrain.worker", description=main.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--run-dir", type=Path, required=True, help="new, or one to go on with")
    arguments = parser.parse_intermixed_args()
    try:
        scheme, is_uri, _ = str(arguments.run_dir).partition(":/")
        if is_uri:
            remedy = "expected a local directory; checkpoints alone go to a store, with checkpoints.storage=URI"
            raise RequestError(f"--run-dir {scheme}://...: {remedy}")
        kept = _saved_stage(arguments.run_dir)
        plan = checked_plan(load_plan(arguments.recipe, [*kept, *arguments.overrides]), arguments.run_dir)
        if uri := uri_of(Path(plan.recipe.storage)):
            remedy = f"the record of a run of torchrun is in its --run-dir; say checkpoints.storage={uri}"
            raise RequestError(f"storage={uri}: {remedy}")
        if (ranks := int(os.environ.get("WORLD_SIZE", "1"))) not in (possible := worlds(plan)):
            workers = " or ".join(map(str, possible))
            raise RequestError(f"train.workers={workers}: {ranks} processes were started; add train.workers={ranks}")
    except (RequestError, store.CheckpointError) as error:
        for mistake in getattr(error, "mistakes", (error,)):
            say(f"error: {mistake}", err=True)
        raise SystemExit(2) from None

    known = KnownCheckpoints(plan, arguments.run_dir)

    def listener(event: Event) -> None:
        terminal.show(event)
        known.see(event)
        if isinstance(event, CheckpointPublished):
            known.prune()

    if os.environ.get("RANK") == "0":
        RunDir(arguments.run_dir).take_back_requests()  # they were for the workers that have ended
    try:
        with Terminal(plan, run_dir=arguments.run_dir) as terminal:
            end = train(plan, arguments.run_dir, listener=listener)
    except (BackboneError, DataError, DiskFull, LoaderError, ObjectiveError, store.CheckpointError) as error:
        say(f"error: {error}", err=True)
        raise SystemExit(1) from None
    raise SystemExit(0 if isinstance(end, Finished) else EXIT_STOPPED)


if __name__ == "__main__":
    main()
