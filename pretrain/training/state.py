"""What a running training puts into a checkpoint and takes out of it again: the collective half of checkpointing.

Every rank writes its share (DeepSpeed's shards, its RNG states); rank 0 adds the backbone as safetensors and the
recipe, and publishes. Restoring verifies digests first and then counts what really came back.

Not here: the files and their atomic publication (`pretrain.checkpoints.store`), when to do either
(`pretrain.worker`).
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from backbones.io import save_backbone
from data_pipelines.streaming.stream import Stream, StreamState
from pretrain.checkpoints import store
from pretrain.config.load import to_yaml
from pretrain.config.schema import Recipe
from pretrain.record.events import Resumed
from pretrain.record.run_dir import BACKBONE, RECIPE
from pretrain.training.engine import Engine

__all__ = ["newest", "restore", "take"]

EXTRA_STATE = "objective.safetensors"  # buffers and teacher of the objective, the same on every rank


def take(
    run_dir: Path, step: int, engine: Engine, stream: Stream, recipe: Recipe, *, training_state: bool = True
) -> Path:
    """Publish a checkpoint after `step` optimizer steps. A collective; returns the published directory.

    Args:
        run_dir: Directory of the run.
        step: Optimiser steps done.
        engine: What to save.
        stream: Whose position after `step` is saved.
        recipe: Saved along.
        training_state: False for the backbone alone (the randomly initialised one, which nobody resumes from).
    """
    staged = store.staging_path(run_dir, step)
    state_dir = staged / store.TRAINING_STATE
    rank = dist.get_rank()
    if rank == 0:
        shutil.rmtree(staged, ignore_errors=True)
        (state_dir if training_state else staged).mkdir(parents=True)
    dist.barrier()  # all ranks: the directory is there
    if training_state:
        engine.save(state_dir)
        save_file(_rng_states(engine.device), state_dir / f"rng-{rank:05d}.safetensors")
    weights = engine.backbone_weights()
    path = store.checkpoint_path(run_dir, step)
    if rank == 0:
        if training_state:
            extra = {name: tensor.detach().cpu().clone() for name, tensor in engine.objective.extra_state().items()}
            save_file(extra, state_dir / EXTRA_STATE)
        save_backbone(staged / BACKBONE, weights, engine.objective.exported.spec)
        (staged / RECIPE).write_text(to_yaml(recipe))
    dist.barrier()  # all ranks have written: digests may be taken
    if rank == 0:
        state = stream.state_at(step)
        manifest = {
            "run_id": run_dir.name,
            "samples_seen": step * recipe.train.global_batch_size,
            "stream": {"epoch": state.epoch, "position": state.position, "order": stream.order_signature},
            "world_size": dist.get_world_size(),
            "zero_stage": recipe.train.zero_stage,
            "precision": recipe.train.precision,
            "objective": recipe.objective.name,
            "backbone": engine.objective.exported.spec,
        }
        store.publish(run_dir, step, manifest)
    dist.barrier()  # all ranks: a restart from here on finds this checkpoint
    return path


def newest(run_dir: Path) -> tuple[store.Published, dict[str, Any]] | None:
    """The newest resumable checkpoint and its manifest, verified on rank 0. A collective: all ranks agree.

    Raises:
        CheckpointError: On every rank when the files do not match their digests.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = store.latest(run_dir)
            answer = [found and (found, store.verify(found.path))]
        except store.CheckpointError as error:
            answer = [error]
    dist.broadcast_object_list(answer, src=0)  # all ranks: resume from the same step or fail alike
    if isinstance(answer[0], store.CheckpointError):
        raise answer[0]
    return answer[0]


def restore(found: store.Published, manifest: dict[str, Any], engine: Engine, stream: Stream) -> Resumed:
    """Bring engine and RNG back to where the checkpoint was taken. A collective.

    With another number of ranks the training state is resharded and each rank begins a new RNG (which only stochastic
    layers draw from); the samples still to come are the same.

    Returns:
        What was restored, for people.

    Raises:
        DataError: The checkpoint was taken on another sample order.
        CheckpointError: It was taken with another ZeRO stage, or the weights that came back are not the ones that were
            saved.
    """
    stream.require_order(manifest["stream"]["order"])
    if manifest["zero_stage"] != engine.stage:
        stages = f"zero_stage={manifest['zero_stage']}, this run has {engine.stage}"
        raise store.CheckpointError(f"{found.path}: taken with {stages}")
    state_dir = found.path / store.TRAINING_STATE
    is_same_world = manifest["world_size"] == dist.get_world_size()
    if is_same_world:
        engine.load(state_dir)
        _set_rng_states(load_file(state_dir / f"rng-{dist.get_rank():05d}.safetensors"), engine.device)
    else:
        engine.load_resharded(state_dir, found.path.with_name(f".{found.path.name}.universal"))
        torch.manual_seed(torch.initial_seed() + found.step)
    engine.objective.load_extra_state(load_file(state_dir / EXTRA_STATE))
    saved, loaded = load_file(found.path / BACKBONE), engine.backbone_weights()
    equal = [name for name, tensor in saved.items() if name in loaded and torch.equal(tensor, loaded[name])]
    if len(equal) != len(saved) or engine.optimizer_steps != found.step:
        raise store.CheckpointError(
            f"{found.path}: {len(equal)} of {len(saved)} backbone tensors came back equal, "
            f"optimizer at step {engine.optimizer_steps}"
        )
    return Resumed(
        step=found.step,
        tensors=len(equal),
        tensors_total=len(saved),
        optimizer_step=engine.optimizer_steps,
        rng_states=dist.get_world_size() if is_same_world else 0,
        saved_world_size=manifest["world_size"],
        samples_seen=manifest["samples_seen"],
        epoch=manifest["stream"]["epoch"],
        position=manifest["stream"]["position"],
    )


def stream_state(manifest: dict[str, Any]) -> StreamState:
    """Where the stream continues after this checkpoint."""
    return StreamState(manifest["stream"]["epoch"], manifest["stream"]["position"])


def _rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
