"""The DeepSpeed seam: everything the training loop asks of DeepSpeed, and the settings we give it.

ZeRO stages 0 to 3, fp32 and bf16, CPU with gloo and CUDA with NCCL behind one small class. `optimizer.*` and
`train.*` of a recipe are the short form; `deepspeed:` passes raw keys on.

Not here: the loop (`pretrain.worker`), schedules, the layout of checkpoints (`pretrain.checkpoints.store`), names of
DeepSpeed that are not public (`pretrain.training.deepspeed_internals`).
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from objectives.base import Heads, Objective, Output, Progress
from pretrain.config.optimizer_facts import RESHARDABLE
from pretrain.config.schema import Recipe
from pretrain.training import deepspeed_internals, flat_shards
from pretrain.training.blocks import compile_blocks, recompute_blocks
from pretrain.training.gradients import Gradients
from pretrain.training.master_weights import read_shares, read_weights
from pretrain.training.optimizers import create_optimizer
from pretrain.training.running_statistics import RunningStatistics
from pretrain.training.torch_internals import loopback_store

__all__ = ["Engine", "init_distributed", "pick_device"]

TAG = "deepspeed"  # sub-directory of the training state that DeepSpeed writes
REDUCE_BUCKET_ELEMENTS = 50_000_000  # 200 MB in fp32; DeepSpeed's default of 5e8 reserves 2 GB per worker


def pick_device(wanted: str) -> torch.device:
    """`auto`, `cpu` or `cuda` -> the device of this process (LOCAL_RANK picks the GPU).

    Raises:
        ValueError: `cuda` is asked for and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if wanted == "cuda" and not has_cuda:
        raise ValueError("train.device=cuda, but torch sees no GPU; use train.device=cpu or auto")
    if wanted == "cpu" or not has_cuda:
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def init_distributed(device: torch.device, timeout_s: float = 1800.0) -> tuple[int, int]:
    """Join the process group that the environment describes (as torchrun sets it); returns (rank, world size).

    Args:
        device: Of this rank; picks NCCL or gloo.
        timeout_s: Seconds that this rank waits for the others in a collective.
    """
    # DeepSpeed probes for accelerators at import; saying which one keeps it from warning and from choosing another.
    os.environ["DS_ACCELERATOR"] = device.type
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        backend,
        store=loopback_store(rank, world_size),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    with deepspeed_internals.importing_without_mlflow():
        import deepspeed

    deepspeed_internals.leave_out_shared_memory_op()
    deepspeed.init_distributed(backend)
    return rank, world_size


class StepResult(NamedTuple):
    """What one step gave on this rank.

    Attributes:
        loss: Mean over the rank's micro-batches; a scalar on the device.
        metrics: The objective's, and of a logged step the gradient norms; likewise.
        applied: Whether weights have moved; the same on all ranks.
        bad_ranks: Of a step that was not applied, the ranks with a loss that is not finite; none when all losses are
            finite and only the gradient is not.
        stops: Whether any rank was asked to stop; the same on all ranks.
    """

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]
    applied: bool
    bad_ranks: tuple[int, ...] = ()
    stops: bool = False

    def mean_over_ranks(self) -> dict[str, float]:
        """Loss and metrics, each the mean over all ranks. A collective, and a host sync."""
        values = torch.stack([self.loss, *self.metrics.values()])
        dist.all_reduce(values)
        return dict(zip(["loss", *self.metrics], (values / dist.get_world_size()).tolist(), strict=True))


class _Verdict(NamedTuple):
    """What the host knows of a step before its update.

    Attributes:
        bad_ranks: Ranks with a loss that is not finite.
        stops: Whether any rank was asked to stop.
        norm: Of the gradient; 0 where nobody but DeepSpeed looks.
    """

    bad_ranks: tuple[int, ...]
    stops: bool
    norm: float

    @property
    def drops(self) -> bool:
        """Whether the step does nothing."""
        return bool(self.bad_ranks) or not math.isfinite(self.norm)


class _StepGuard:
    """Makes a step of a torch optimizer do nothing when something of that step is not finite.

    Whatever is around the optimizer (gradient reduction, master weights, shards) goes through its usual motions and
    drops the gradients; weights and moments stay as they are, in every ZeRO stage.

    All checks stay on the device until the optimizer is about to step: the one wait of a step is then, at the end of
    its backward pass. Where DeepSpeed looks at the norm as well (see `Engine`), it has waited by then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._step = optimizer.step
        optimizer.step = self._guarded  # type: ignore[method-assign]
        self._on_device: torch.Tensor | None = None
        self._verdict: _Verdict | None = None

    def expect(self, counts: torch.Tensor, norm: torch.Tensor) -> None:
        """The next step depends on the `counts` of `_tell_all_ranks` and the gradient's norm, a scalar.

        Both are on the device, and the same on all ranks.
        """
        self._on_device, self._verdict = torch.cat([counts, norm.reshape(1)]), None

    @property
    def verdict(self) -> _Verdict:
        """A host sync, once per step."""
        if self._verdict is None:
            assert self._on_device is not None
            *bad_losses, stops, norm = self._on_device.tolist()
            bad_ranks = tuple(rank for rank, count in enumerate(bad_losses) if count)
            self._verdict = _Verdict(bad_ranks, stops > 0, norm)
        return self._verdict

    def _guarded(self, *arguments: Any, **options: Any) -> Any:
        return None if self.verdict.drops else self._step(*arguments, **options)


class Engine:
    """An objective under DeepSpeed.

    Args:
        objective: Built alike on every rank; DeepSpeed broadcasts rank 0's weights.
        recipe: Resolved recipe.
        device: Device of this process.

    Raises:
        ValueError: Blocks are to be compiled or recomputed, and the objective has none.
    """

    def __init__(self, objective: Objective, recipe: Recipe, device: torch.device) -> None:
        import deepspeed

        optimizer = recipe.optimizer
        set_matmul_precision(recipe, device)
        groups = objective.param_groups(optimizer.weight_decay, optimizer.layer_decay)
        torch_optimizer = create_optimizer(groups, optimizer, recipe.peak_lr)
        self._guard = _StepGuard(torch_optimizer)
        _prepare_blocks(objective, recipe)
        companions = objective.companions().values()
        stage = recipe.train.zero_stage or 0
        config = deepspeed_config(recipe, device)
        for companion in companions:
            if stage == 3 and dist.get_world_size() > 1:
                companion.shard(device)
            companion.to(device)
        if stage == 3:
            deepspeed_internals.partition(objective, config, device)
        with warnings.catch_warnings(), deepspeed_internals.compiling_at_first_call():
            warnings.simplefilter("ignore")  # deprecations inside DeepSpeed that a user can do nothing about
            self._engine, *_ = deepspeed.initialize(
                model=objective.to(device),
                optimizer=torch_optimizer,
                config=config,
                dist_init_required=False,
            )
        moving = [companion.module for companion in companions if companion.moves == "ema"]
        self._statistics = RunningStatistics([objective, *moving])
        self.objective = objective
        self.device = device
        self.stage = stage
        self.precision = recipe.train.precision
        self._gradients = Gradients(objective, objective.part_of, self.stage, REDUCE_BUCKET_ELEMENTS)
        if self.stage == 0:
            deepspeed_internals.leave_averaging_to_us(self._engine)
        self._clips_parts = optimizer.clip_mode == "part"
        # In stages 1 to 3 DeepSpeed clips, but for what it cannot.
        self._clip_grad = optimizer.clip_grad if self.stage == 0 or self._clips_parts else None
        self._looks_itself = self.stage > 0 and self._engine.zero_compute_grad_norm()  # DeepSpeed, at the norm
        self._accumulation = self._engine.gradient_accumulation_steps()
        # Read once: a checkpoint brings its own groups, which may be older than their scales.
        groups = self._engine.optimizer.param_groups
        self._scales = [(group["lr_scale"], group["wd_scale"], group.get("frozen_share", 0.0)) for group in groups]
        self._num_steps = recipe.train.steps
        self._optimizer_name = optimizer.name

    def set_schedule(self, learning_rate: float, weight_decay: float, step: int = 0) -> None:
        """Set the values for the next update, each times the scale that the parameter group carries for it.

        Args:
            learning_rate, weight_decay: Of step `step`, counted from 0. A group whose "frozen_share" of the run's steps
                is not over has rate 0; its moments gather meanwhile.
        """
        groups = zip(self._engine.optimizer.param_groups, self._scales, strict=True)
        for group, (lr_scale, wd_scale, frozen_share) in groups:
            is_frozen = step < frozen_share * self._num_steps
            group["lr"] = 0.0 if is_frozen else learning_rate * lr_scale
            group["weight_decay"] = weight_decay * wd_scale

    def step(
        self, micro_batches: Iterable[dict[str, torch.Tensor]], progress: Progress, *, stop: bool = False
    ) -> StepResult:
        """One optimizer step over the rank's micro-batches, with what the objective does after it.

        When a loss of any rank, or the gradient, is not finite, no rank changes weights, optimizer state, running
        statistics or objective. The host waits for the device once per step, for that decision, when the backward
        passes are done (see `_StepGuard`).

        Args:
            micro_batches: As many as `train.accumulation` says. Each is taken when the one before it is through and
                kept no longer than its backward pass, so an iterator that makes them on the device holds one at a time.
            progress: Where the run is. In a logged step, gradient norms (before clipping), of all and of each part,
                are among the metrics; they cost a pass over the gradients.
            stop: This rank was asked to stop; all ranks learn of it with the step's result, at no cost.

        Raises:
            ValueError: There are more or fewer micro-batches than `train.accumulation`.
        """
        self._statistics.remember()
        outputs: list[Output] = []
        norms: dict[str, torch.Tensor] = {}
        for batch in micro_batches:
            output = self._engine(batch, progress)
            outputs.append(Output(output.loss.detach(), output.metrics))
            is_last = len(outputs) == self._accumulation
            if is_last:  # before the backward pass, which hides the collective
                counts = self._tell_all_ranks(outputs, stop)
            self._engine.backward(output.loss)  # divides by the number of micro-batches
            del batch, output
            if is_last:
                norms = self._judge_gradient(counts, is_logged=progress.is_logged)
            self._engine.step()  # updates at the last micro-batch only
        if len(outputs) != self._accumulation:
            raise ValueError(f"{len(outputs)} micro-batches in a step, but train.accumulation={self._accumulation}")
        verdict = self._guard.verdict
        applied = self._engine.was_step_applied() and not verdict.drops
        if applied:
            self._statistics.average()
            self.objective.after_step(progress, self.read_weights)
        else:
            self._statistics.restore()
            if self.stage == 3:
                deepspeed_internals.gather_persistent_parameters(self._engine)
        metrics = {name: _mean([output.metrics[name] for output in outputs]) for name in outputs[0].metrics}
        loss = _mean([output.loss for output in outputs])
        return StepResult(loss, metrics | norms, applied, verdict.bad_ranks, verdict.stops)

    @torch.no_grad()
    def _tell_all_ranks(self, outputs: Sequence[Output], stop: bool) -> torch.Tensor:
        """What all ranks have to know of a step, in one small collective.

        Returns:
            (ranks + 1,) on the device: of each rank how many of its losses are not finite, then how many are to stop.
        """
        counts = torch.zeros(dist.get_world_size() + 1, device=self.device)
        counts[dist.get_rank()] = (~torch.stack([output.loss for output in outputs]).isfinite()).sum()
        if stop:
            counts[-1] = 1
        dist.all_reduce(counts)
        return counts

    def _judge_gradient(self, counts: torch.Tensor, *, is_logged: bool) -> dict[str, torch.Tensor]:
        """Tell the guard what the step is worth, and make its gradient ready for the update.

        Returns:
            The gradient norms of a logged step.
        """
        if self.stage == 0:
            self._gradients.average()
        norms = self._gradients.norms() if is_logged or self._clips_parts or not self._looks_itself else {}
        self._guard.expect(counts, norms["grad_norm"] if norms else counts.new_zeros(()))
        if self._clip_grad is not None and self._clips_parts:
            self._gradients.clip_parts(norms, self._clip_grad)
        elif self._clip_grad is not None and self._guard.verdict.norm > self._clip_grad:
            torch.nn.utils.clip_grads_with_norm_(self.objective.parameters(), self._clip_grad, norms["grad_norm"])
        return norms if is_logged else {}

    def read_weights(self, parameters: Sequence[torch.nn.Parameter], *, shares: bool = False) -> list[torch.Tensor]:
        """The float32 values of parameters, see `objectives.teacher.ReadWeights` and `master_weights`.

        Args:
            parameters: Of the objective.
            shares: Only this rank's; for ZeRO stage 3. Whole ones are a collective under ZeRO.
        """
        return read_shares(parameters) if shares else read_weights(parameters, self.stage)

    def state_bytes(self) -> int:
        """About what `save` writes on this rank: float32 weights and two moments of each; in stage 3 weights again."""
        numbers = sum(deepspeed_internals.full_shape(parameter).numel() for parameter in self.objective.parameters())
        return 4 * (4 if self.stage == 3 else 3) * numbers // dist.get_world_size()

    @torch.no_grad()
    def named_weights(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Parameters of the objective in fp32 and those of its companions, each whole when its turn comes.

        A collective under ZeRO: all ranks go through all of them.

        Args:
            tensors: By name; what is no parameter of these comes as it is.

        Yields:
            Names and tensors, which may share memory with the model: read them before the next step.
        """
        trained = set(self.objective.parameters())
        companions = self.objective.companions().values()
        for name, tensor in tensors.items():
            if tensor in trained:
                (whole,) = self.read_weights([tensor])  # type: ignore[list-item]
            else:
                whole = tensor
                for companion in companions:
                    whole = companion.whole_of(whole)
            yield name, whole.detach()

    def exported_weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The exported backbone in fp32 under its own names, see `named_weights`: the teacher's, if there is one."""
        return self.named_weights(self.objective.exported.network.state_dict(keep_vars=True))

    def together(
        self, weights: Iterable[tuple[str, torch.Tensor]], *, is_wanted: bool = True
    ) -> dict[str, torch.Tensor]:
        """All of what `named_weights` gives. A collective under ZeRO.

        Args:
            weights: Not yet begun.
            is_wanted: False: this rank takes part in the collective only, and gets nothing.

        Returns:
            Tensors on the device, which may share memory with the model; in stage 3 whole copies on the host.
        """
        on_host = self.stage == 3
        return {name: tensor.cpu() if on_host else tensor for name, tensor in weights if is_wanted}

    def heads(self, *, is_wanted: bool = True) -> Heads | None:
        """What is exported beside the backbone, in fp32, as `together` gives it. A collective under ZeRO."""
        heads = self.objective.exported_heads()
        if heads is None:
            return None
        return heads._replace(tensors=self.together(self.named_weights(heads.tensors), is_wanted=is_wanted))

    def pictures(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the objective has to show for a batch. A collective under ZeRO-3, which must gather the parameters."""
        import deepspeed

        parameters = list(self.objective.parameters()) if self.stage == 3 else []
        with ExitStack() as gathered:
            gathered.enter_context(deepspeed.zero.GatheredParameters(parameters, enabled=self.stage == 3))
            for companion in self.objective.companions().values():
                gathered.enter_context(companion.whole())
            return self.objective.pictures(batch)

    def save(self, directory: Path) -> None:
        """Write this rank's share of the training state. A collective in stage 3, whose files DeepSpeed writes."""
        if self.stage == 3:
            self._engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
            return
        directory.mkdir(parents=True, exist_ok=True)
        tensors, header = self.flat_state()
        save_file(tensors, directory / flat_shards.FILES.format(dist.get_rank()), header)

    def flat_state(self) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors and header of this rank's file of the training state, in stages 0 to 2; see `flat_shards`."""
        return flat_shards.collect(self._engine, self.stage)

    def load(self, directory: Path) -> None:
        """Restore model and optimizer from `save`; flat shards of any number of ranks. A collective.

        Raises:
            RuntimeError: The state does not fit this model, optimizer or ZeRO stage.
            pickle.UnpicklingError: It holds something that could run code.
        """
        if self.stage == 3 or not flat_shards.are_in(directory):
            self._load_deepspeed(directory)
        else:
            flat_shards.restore(self._engine, self.stage, directory)

    def _load_deepspeed(self, directory: Path) -> None:
        """Restore what DeepSpeed wrote: in stage 3, and in all stages before flat shards."""
        with deepspeed_internals.reading_tensors_only():
            loaded, _ = self._engine.load_checkpoint(str(directory), tag=TAG, load_lr_scheduler_states=False)
        if loaded is None:
            raise RuntimeError(f"{directory}: DeepSpeed found no training state to restore")

    def load_resharded(self, directory: Path, scratch: Path) -> None:
        """Restore what another number of ranks saved. A collective.

        Flat shards are read as they are, DeepSpeed's go through its universal form (arXiv:2406.18820).

        Args:
            directory: Where `save` wrote; not changed.
            scratch: Takes the universal form while it is read; on storage that all ranks see.

        Raises:
            RuntimeError, pickle.UnpicklingError: As for `load`, or the optimizer is not one that DeepSpeed reshards.
        """
        if self.stage == 0 or flat_shards.are_in(directory):
            self.load(directory)
            return
        if self._optimizer_name not in RESHARDABLE:
            raise RuntimeError(
                f"the shards of optimizer.name={self._optimizer_name} fit the number of workers that saved them only; "
                f"resume with as many (DeepSpeed reshards {', '.join(RESHARDABLE)})"
            )
        rank = dist.get_rank()
        if rank == 0:
            shutil.rmtree(scratch, ignore_errors=True)  # of a restart that was interrupted
            with deepspeed_internals.reading_tensors_only():
                deepspeed_internals.write_universal(directory / TAG, scratch / TAG)
        dist.barrier()  # all ranks: the universal form is complete
        groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in self._engine.optimizer.param_groups
        ]
        with deepspeed_internals.reading_universal(self._engine):
            self._load_deepspeed(scratch)
        # Stage 3 gives every group the settings of the first one, and all shards one step counter to increment. A fused
        # optimizer wants counters where its moments are.
        for group, own in zip(self._engine.optimizer.param_groups, groups, strict=True):
            group.update(own)
        is_fused = any(group.get("fused") for group in groups)
        for state in deepspeed_internals.shard_states(self._engine):
            if "step" in state:
                own_step = state["step"].clone()
                state["step"] = own_step.to(state["exp_avg"].device) if is_fused else own_step
        dist.barrier()  # all ranks have read it
        if rank == 0:
            shutil.rmtree(scratch)

    def close(self) -> None:
        """Free the memory of model, companions and optimizer: hooks of DeepSpeed hold them beyond the engine's life."""
        for companion in self.objective.companions().values():
            companion.release()
        deepspeed_internals.release(self._engine)

    @property
    def optimizer_steps(self) -> int:
        """Updates that the optimizer's own state counts."""
        return int(self._engine.global_steps)


def _prepare_blocks(objective: Objective, recipe: Recipe) -> None:
    """What `train.compile` and `train.checkpoint_blocks` ask for; both together recompute compiled blocks."""
    wanted = {"train.compile": recipe.train.compile, "train.checkpoint_blocks": recipe.train.checkpoint_blocks}
    if not any(wanted.values()):
        return
    blocks = objective.repeated_blocks()
    if not blocks:
        keys = " and ".join(key for key, is_wanted in wanted.items() if is_wanted)
        name = recipe.backbone.name
        raise ValueError(f"{keys}: {recipe.objective.name} with backbone {name!r} names no blocks; use false")
    if recipe.train.compile:
        compile_blocks(blocks)
    if recipe.train.checkpoint_blocks:
        recompute_blocks(blocks)


def set_matmul_precision(recipe: Recipe, device: torch.device) -> None:
    """On CUDA, multiply float32 matrices as `train.tf32` says, in this process. Nothing changes on CPUs."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if recipe.train.tf32 else "highest")


def deepspeed_config(recipe: Recipe, device: torch.device) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe on a device; raw keys of `deepspeed:` are merged in last."""
    train = recipe.train
    clip_grad = recipe.optimizer.clip_grad if recipe.optimizer.clip_mode == "global" else None
    stage = train.zero_stage or 0
    config: dict[str, Any] = {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": train.micro_batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "gradient_clipping": clip_grad or 0.0
        if stage > 0
        else 0.0,  # in stage 0 the engine clips, with the norm it has
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": REDUCE_BUCKET_ELEMENTS,
            "allgather_bucket_size": REDUCE_BUCKET_ELEMENTS,
        },
        "zero_allow_untested_optimizer": True,  # built by us, with our parameter groups
        "bf16": {"enabled": train.precision == "bf16"},
        "steps_per_print": None,
    }
    if stage in (1, 2) and clip_grad is None and not recipe.deepspeed.keys() & {"zero_optimization", "data_types"}:
        # DeepSpeed would take the norm a second time, in float64. With offloading and the like it insists.
        config["zero_optimization"]["compute_grad_norm"] = False
    if stage in (1, 2) and device.type == "cuda":  # gradients travel during the backward pass; stage 3 does so anyway
        config["zero_optimization"]["overlap_comm"] = True
    return _merged(config, recipe.deepspeed)


def _merged(base: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in extra.items():
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if is_nested else value
    return merged


def _mean(values: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack([value.detach().float() for value in values]).mean()
