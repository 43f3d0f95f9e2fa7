"""What a running training puts into a checkpoint and takes out of it again: the collective half of checkpointing.

Every rank has its share (of the engine's state, its RNG states); rank 0's has the backbone as safetensors and the
recipe besides. Restoring verifies digests first and then counts what really came back.

Not here: how shares are written and published (`pretrain.training.publication`, `pretrain.checkpoints.store`), when to
do either (`pretrain.worker`).
"""

from __future__ import annotations

import json
import os
import pickle
import socket
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file

from backbones.errors import BackboneError
from backbones.io import backbone_metadata, heads_metadata, initialize_from, open_weights
from data_pipelines.files import sha256
from data_pipelines.parsing import parse_json
from data_pipelines.streaming.stream import Stream, StreamState
from objectives.base import Objective
from objectives.errors import ObjectiveError
from pretrain.checkpoints import copies, store
from pretrain.checkpoints.initialization import Start, about, find_training_state, find_weights, starting_point
from pretrain.config.load import to_yaml
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, Stage
from pretrain.errors import RequestError, RunFailed
from pretrain.record.events import CheckpointPublished, Initialized, Resumed
from pretrain.record.journal import read_events
from pretrain.record.run_dir import BACKBONE, HEADS, MANIFEST, RECIPE, RunDir
from pretrain.training import flat_shards
from pretrain.training.engine import Engine
from pretrain.training.handover import Handover
from pretrain.training.spread_weights import Sent
from pretrain.training.tensor_files import TensorFile

__all__ = [
    "Contents",
    "Snapshot",
    "begin_with",
    "carry_moments",
    "checkpoint_at",
    "contents",
    "find_start",
    "manifest",
    "origin",
    "restore",
    "stage_start",
]

RNG_STATES = "rng-{:05d}.safetensors"  # of each rank
EXTRA_STATE = "objective-{:05d}.safetensors"  # of each rank with a share: buffers and companions of the objective


class Contents(NamedTuple):
    """What one rank writes of a checkpoint: names in it, and what they are to hold.

    Attributes:
        files: Safetensors; their tensors share memory with the engine's.
        texts: Other files.
        heads: What heads among them can be built from; None: there are none.
    """

    files: dict[str, TensorFile]
    texts: dict[str, bytes]
    heads: dict[str, Any] | None


def contents(engine: Engine, recipe: Recipe, *, training_state: bool) -> Contents:
    """This rank's share of a checkpoint, but for what DeepSpeed writes in stage 3. A collective.

    Args:
        engine: What to save.
        recipe: Of the stage.
        training_state: False for the backbone alone.
    """
    rank, objective = dist.get_rank(), engine.objective
    files: dict[str, TensorFile] = {}
    texts: dict[str, bytes] = {}
    if training_state:
        if engine.stage < 3:
            files[_in_state(flat_shards.FILES.format(rank))] = TensorFile(*engine.flat_state())
        files[_in_state(RNG_STATES.format(rank))] = TensorFile(_rng_states(engine.device))
        share = objective.share_of_state(rank, dist.get_world_size())
        if share or rank == 0:
            files[_in_state(EXTRA_STATE.format(rank))] = TensorFile(share)
        if rank == 0 and (references := objective.references()):
            texts[_in_state(store.REFERENCES)] = json.dumps(references, indent=1).encode()
    weights = engine.together(engine.exported_weights(), is_wanted=rank == 0)
    heads = engine.heads(is_wanted=rank == 0)
    if heads is not None and not training_state and not heads.from_start:
        heads = None
    if rank == 0:
        files[BACKBONE] = TensorFile(weights, backbone_metadata(objective.exported.spec))
        texts[RECIPE] = to_yaml(recipe).encode()
        if heads is not None:
            files[HEADS] = TensorFile(heads.tensors, heads_metadata(heads.spec))
    return Contents(files, texts, None if heads is None else heads.spec)


def manifest(
    run_dir: Path,
    stage: Stage,
    engine: Engine,
    stream: Stream,
    step: int,
    heads: Mapping[str, Any] | None,
    origin: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """What `checkpoint.json` says of a checkpoint, beside what `store.publish` adds.

    Args:
        run_dir: Directory of the run.
        stage: At work.
        engine: That is saved.
        stream: Whose position after `step` is saved.
        step: Steps of the run that are done.
        heads: What those that are saved can be built from; None: there are none.
        origin: What the run started from; None: from scratch.
    """
    recipe, position = stage.recipe, stream.state_at(step - stage.first_step)
    return {
        "run_id": run_dir.name,
        "stage": stage.name,
        "first_step": stage.first_step,
        "samples_seen": stage.samples_seen(step),
        "stream": {"epoch": position.epoch, "position": position.position, "order": stream.order_signature},
        "world_size": dist.get_world_size(),
        "zero_stage": recipe.train.zero_stage,
        "precision": recipe.train.precision,
        "objective": recipe.objective.name,
        "backbone": engine.objective.exported.spec,
        "exported": "encoder" if engine.objective.teacher is None else "teacher",
        **({} if heads is None else {"heads": dict(heads)}),
        "origin": None if origin is None else dict(origin),
    }


@dataclass(frozen=True)
class Snapshot:
    """A verified checkpoint with its training state, on this machine.

    Attributes:
        path: Its directory.
        location: Where it was published.
        manifest: Its `checkpoint.json`.
        is_shared: All ranks see the same directory.
        is_own: Of this run, not of the one that `resume_from` names.
    """

    path: Path
    location: str
    manifest: dict[str, Any]
    is_shared: bool
    is_own: bool

    @property
    def step(self) -> int:
        """Optimizer steps done when it was taken."""
        return int(self.manifest["step"])

    @property
    def stream_state(self) -> StreamState:
        """Where the stream continues after it."""
        return StreamState(self.manifest["stream"]["epoch"], self.manifest["stream"]["position"])


def bring(found: store.Published, *, is_own: bool) -> Snapshot:
    """Verify a checkpoint with its training state, after copying it here from a remote storage. A collective.

    In a directory that all ranks share, each verifies its share of the files. Of a remote storage one process per
    machine makes a verified copy for all.

    Raises:
        CheckpointError: On every rank, when it is damaged.
    """
    here = socket.gethostname()
    path, problem = found.storage.directory(found.name), None
    is_copied = path is None
    try:
        if path is not None:
            store.verify(path, share=(dist.get_rank(), dist.get_world_size()))
        elif int(os.environ["LOCAL_RANK"]) == 0:
            path = copies.local(found, training_state=True)
    except (store.CheckpointError, OSError) as error:
        problem = str(error)
    answers: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(answers, (here, path, problem))  # all ranks: the copies are made; go on or fail alike
    if problems := [problem for _, _, problem in answers if problem]:
        raise store.CheckpointError(problems[0])
    path = next(path for host, path, _ in answers if path is not None and host == here)
    hosts = {host for host, _, _ in answers}
    is_shared = not is_copied or len(hosts) == 1
    return Snapshot(path, found.location, store.read_manifest(path), is_shared, is_own)


def find_start(run_dir: Path, recipe: Recipe) -> tuple[Start, Snapshot | None]:
    """How the run begins now, and the training state that it goes on from, verified. A collective: all ranks agree.

    Raises:
        CheckpointError: On every rank, when a checkpoint is damaged, or what `resume_from` names is not there.
    """
    answer: list[Any] = [None]
    if dist.get_rank() == 0:
        found = store.latest(run_dir)
        own = None if found is None else found.location
        lost = _lost(run_dir) if found is None else None
        start = starting_point(own=own, resume_from=recipe.resume_from, init_from=recipe.init_from)
        try:
            if start.how == "resume_from":
                found = find_training_state(start.reference, Path(recipe.storage))
            answer = [(start, found)]
        except (RequestError, RunFailed, store.CheckpointError) as error:
            answer = [store.CheckpointError(about("resume_from", start.reference, str(error)))]
        if lost is not None:
            answer = [store.CheckpointError(lost)]
    dist.broadcast_object_list(answer, src=0)  # all ranks: begin at the same step or fail alike
    if isinstance(answer[0], Exception):
        raise answer[0]
    start, found = answer[0]
    return start, None if found is None else bring(found, is_own=start.how == "resume")


def _lost(run_dir: Path) -> str | None:
    """Of a run with nothing to go on from: why it is not to begin at its first step again."""
    there = store.published(run_dir)
    if there and there[-1].step > 0:
        text = f"{there[-1].location} and those before it have no training state any more, so that the run cannot go on"
        return f"{text}; a new run may take its weights by init_from"
    events = read_events(RunDir(run_dir).journal)[0]
    told = max((event.step for event in events if isinstance(event, CheckpointPublished)), default=0)
    if not there and told > 0:
        gone = store.published_by_event(run_dir, told).location
        return f"{gone}, which this run published, is not there, nor one before it; bring them back, or begin a new run"
    return None


def origin(start: Start, found: Snapshot | None, initialized: Initialized | None) -> dict[str, Any] | None:
    """What `checkpoint.json` says about where the run started from; a resumed run keeps what its checkpoint says."""
    if found is not None and found.is_own:
        kept: dict[str, Any] | None = found.manifest.get("origin")
        return kept
    if found is not None:
        digest = sha256(found.path / MANIFEST)
        return {"how": "resume_from", "reference": found.location, "sha256": digest, "step": found.step}
    if initialized is not None:
        return {"how": "init_from", "reference": initialized.reference, "sha256": initialized.sha256}
    if start.how == "stage":
        return {"how": "stage", "reference": start.reference}
    return None


def begin_with(objective: Objective, start: Start, stage: Stage, device: torch.device) -> Initialized:
    """Give a new objective's backbone, and a teacher that copied it, the weights that `init_from` means. A collective.

    Only rank 0 reads them, and sends them one by one. Call it before an engine shards the parameters; draws no random
    numbers.

    Args:
        objective: Built alike on every rank.
        start: Whose reference `pretrain.checkpoints.initialization.find_weights` takes.
        stage: That begins.
        device: Of this process.

    Raises:
        CheckpointError: On every rank, when they are not there or damaged.
        BackboneError: They are not of this architecture.
    """
    reference = start.reference
    answer: list[Any] = [None]
    read: Mapping[str, torch.Tensor] = {}  # on rank 0
    if dist.get_rank() == 0:
        try:
            found = find_weights(reference, Path(stage.recipe.storage))
            read = open_weights(found.file)
            answer = [(found.sha256, {name: _shell(name, tensor) for name, tensor in sorted(read.items())})]
        except (BackboneError, RequestError, RunFailed, store.CheckpointError) as error:
            answer = [store.CheckpointError(about("init_from", reference, str(error)))]
    dist.broadcast_object_list(answer, src=0)  # all ranks: begin with the same weights or fail alike
    if isinstance(answer[0], Exception):
        raise answer[0]
    digest, shells = answer[0]
    weights, shapes = Sent(shells, read, device), {name: shell.shape for name, shell in shells.items()}
    used = initialize_from(objective.exported, weights, shapes)
    if objective.exported is not objective.backbone:
        initialize_from(objective.backbone, weights, shapes)
    loaded = len(used.loaded) + len(used.resampled)
    return Initialized(
        step=stage.first_step,
        reference=reference,
        sha256=digest,
        loaded=loaded,
        total=loaded + len(used.missing),
        resampled=used.resampled,
        missing=used.missing,
        unexpected=used.unexpected,
    )


def _shell(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Shape and type of a weight, without its numbers, which are looked at."""
    if not tensor.isfinite().all():
        raise store.CheckpointError(f"{name} holds numbers that are not finite")
    return tensor.to("meta")


def restore(found: Snapshot, engine: Engine, stream: Stream, optimizer_steps: int) -> Resumed:
    """Bring engine and RNG back to where the checkpoint was taken. A collective.

    With another number of ranks the training state is resharded and each rank begins a new RNG (which only stochastic
    layers draw from); the samples still to come are the same.

    Args:
        found: A checkpoint of this run, or of the one that `resume_from` names.
        engine: Built from the recipe.
        stream: Begun at `found.stream_state`.
        optimizer_steps: Updates that the optimizer has to count.

    Returns:
        What was restored, for people.

    Raises:
        DataError: The checkpoint was taken on another sample order.
        CheckpointError: It was taken with another ZeRO stage or precision, or in stage 3 with another number of ranks
            and each machine has a copy of its own, or the weights that came back are not the ones that were saved.
    """
    manifest = found.manifest
    stream.require_order(manifest["stream"]["order"])
    for key, here in (("zero_stage", engine.stage), ("precision", engine.precision)):
        if manifest[key] != here:
            raise store.CheckpointError(f"{found.path}: taken with train.{key}={manifest[key]}, and it is {here} here")
    state_dir = found.path / store.TRAINING_STATE
    is_same_world = manifest["world_size"] == dist.get_world_size()
    _load_engine(found, engine)
    if is_same_world:
        _set_rng_states(load_file(state_dir / RNG_STATES.format(dist.get_rank())), engine.device)
    else:
        torch.manual_seed(torch.initial_seed() + found.step)
    _load_objective(engine.objective, state_dir)
    saved, num_equal = open_weights(found.path / BACKBONE), 0
    for name, tensor in engine.exported_weights():
        num_equal += name in saved and torch.equal(saved[name], tensor.cpu())
    if num_equal != len(saved) or engine.optimizer_steps != optimizer_steps:
        raise store.CheckpointError(
            f"{found.path}: {num_equal} of {len(saved)} backbone tensors came back equal, "
            f"optimizer at step {engine.optimizer_steps}"
        )
    return Resumed(
        step=found.step,
        tensors=num_equal,
        tensors_total=len(saved),
        optimizer_step=engine.optimizer_steps,
        rng_states=dist.get_world_size() if is_same_world else 0,
        saved_world_size=manifest["world_size"],
        samples_seen=manifest["samples_seen"],
        epoch=manifest["stream"]["epoch"],
        position=manifest["stream"]["position"],
        reference="" if found.is_own else found.location,
    )


def stage_start(run_dir: Path, plan: Plan, index: int) -> Start:
    """How a later stage begins that has no checkpoint of its own yet. A collective: all ranks agree."""
    stage = plan.stages[index]
    if stage.init_from == index - 1:
        return Start("stage", plan.stages[index - 1].name)
    source = stage.recipe.init_from
    if stage.init_from is not None:
        source = _last_checkpoint(run_dir, plan.stages[stage.init_from]).location
    return starting_point(own=None, resume_from=None, init_from=source)


def carry_moments(run_dir: Path, stage: Stage, engine: Engine, taken: Handover) -> None:
    """Give the optimizer of a stage the moments of the stage before, from its last checkpoint. A collective.

    Raises:
        ValueError: A parameter has another shape than before, or is new.
    """
    trained = {name for name, parameter in engine.objective.named_parameters() if parameter.requires_grad}
    changed = sorted(trained & {*taken.resampled, *taken.fresh})
    if changed:
        raise ValueError(
            f"stage {stage.name!r} keeps the optimizer, but {changed[0]} is new or has another shape than in the stage "
            "before; set reset_optimizer: true"
        )
    _load_engine(bring(checkpoint_at(run_dir, stage.first_step), is_own=True), engine)


def _last_checkpoint(run_dir: Path, stage: Stage) -> store.Published:
    return checkpoint_at(run_dir, stage.last_step)


def checkpoint_at(run_dir: Path, step: int) -> store.Published:
    """The run's own checkpoint of a step. A collective."""
    answer: list[store.Published | None] = [None]
    if dist.get_rank() == 0:
        answer = [store.find_published(run_dir, step)]
    dist.broadcast_object_list(answer, src=0)  # all ranks: the same checkpoint
    if answer[0] is None:
        raise store.CheckpointError(f"{run_dir}: the checkpoint of step {step} is gone, with which a stage begins")
    return answer[0]


def _load_engine(found: Snapshot, engine: Engine) -> None:
    """Model and optimizer of a checkpoint, cut anew where another number of ranks saved it. A collective.

    Raises:
        CheckpointError: DeepSpeed's shards have to be cut anew, and each machine has a copy of its own; or a file
            holds something that could run code.
    """
    state_dir, saved_world_size = found.path / store.TRAINING_STATE, found.manifest["world_size"]
    is_same_world = saved_world_size == dist.get_world_size()
    if not is_same_world and not found.is_shared and not flat_shards.are_in(state_dir):
        raise store.CheckpointError(
            f"{found.path}: taken by {saved_world_size} workers; resharding takes a directory that all machines "
            f"share; resume with train.workers={saved_world_size}"
        )
    try:
        if is_same_world:
            engine.load(state_dir)
        else:
            engine.load_resharded(state_dir, found.path.with_name(f".{found.path.name}.universal"))
    except pickle.UnpicklingError:
        raise store.CheckpointError(
            f"{state_dir}: holds something else than tensors, numbers and texts, which could run code; refused"
        ) from None


def _load_objective(objective: Objective, state_dir: Path) -> None:
    """The state that any number of ranks saved.

    Raises:
        CheckpointError: A companion's file is gone or has changed.
    """
    files = sorted(state_dir.glob(EXTRA_STATE.replace("{:05d}", "*")))
    objective.load_extra_state(ChainMap(*map(open_weights, files)))  # type: ignore[arg-type]  # nobody writes to it
    file = state_dir / store.REFERENCES
    try:
        objective.load_references(parse_json(file.read_text()) if file.is_file() else {})
    except ObjectiveError as error:
        raise store.CheckpointError(f"{state_dir}: {error}") from error


def _in_state(name: str) -> str:
    return f"{store.TRAINING_STATE}/{name}"


def _rng_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_rng_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
