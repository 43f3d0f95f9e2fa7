"""Every name of DeepSpeed that this package uses and DeepSpeed does not document, so that an upgrade fails here.

`tests/pretrain/test_deepspeed_internals.py` touches all of them, `test_companions.py` the last:

* `deepspeed.ops.__compatible_ops__`: which compiled operations may be loaded.
* `engine.optimizer.persistent_parameters` and `Parameter.all_gather`: what ZeRO-3 keeps whole between steps.
* `engine.optimizer.optimizer`: the torch optimizer under a ZeRO optimizer, whose state is this rank's shards.
* Of a ZeRO optimizer of stages 1 and 2 `single_partition_of_fp32_groups`, `round_robin_bit16_groups` with `_offsets`,
  `partition_size`, `bit16_groups_flat` and `parallel_partitioned_bit16_groups`: the flat vectors and their pieces.
* `engine.global_steps`, `global_samples`, `skipped_steps`: what an engine counts.
* `engine._config.load_universal_checkpoint`. Its public form, the key `checkpoint.load_universal`, is read once when an
  engine is built, before it is known whether the shards of a checkpoint fit.
* `deepspeed.checkpoint.ds_to_universal.main`: a command line without a function behind it.
* `ZeroStageEnum`, `fragment_address`, `LossScaler` and `DynamicLossScaler`: what a training state holds beside tensors,
  numbers and texts.
* `engine.destroy`, `Parameter.ds_tensor` and whatever tensors a ZeRO optimizer has: what is freed with an engine.
* `Parameter.ds_shape`: the shape before ZeRO-3 partitioned it.
* `zero.Init._convert_to_zero_parameters`: cuts parameters one by one.
* `Parameter._hp_mapping`, `Parameter._index_in_param_group`: which slice of a parameter's float32 master, and of its
  gradient, is this rank's, below ZeRO-3.
* `engine.enable_backward_allreduce`: whether DeepSpeed averages gradients when a backward pass is done.
* What DeepSpeed imports and compiles before anybody asks for it: MLflow for its autotuner, and Muon's functions, for
  which torch loads its whole compiler.

Not here: what DeepSpeed documents, such as `safe_get_full_fp32_param` (`pretrain.training.engine`).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

__all__ = [
    "FlatGroup",
    "compiling_at_first_call",
    "counts",
    "flat_groups",
    "full_shape",
    "gather_persistent_parameters",
    "gradient_share",
    "importing_without_mlflow",
    "leave_averaging_to_us",
    "leave_out_shared_memory_op",
    "master_share",
    "master_slice",
    "partition",
    "reading_tensors_only",
    "reading_universal",
    "release",
    "scale_gradient",
    "set_counts",
    "shard_states",
    "spread_masters",
    "torch_optimizer",
    "write_universal",
]


@contextmanager
def importing_without_mlflow() -> Iterator[None]:
    """In this context DeepSpeed is imported as where MLflow is not installed, unless it is imported already.

    Only DeepSpeed's autotuner, which nobody runs here, would use it; with it come pandas, pyarrow and FastAPI.
    """
    if "mlflow" in sys.modules:
        yield
        return
    sys.modules["mlflow"] = None  # type: ignore[assignment]  # how Python writes down that a module cannot be imported
    try:
        yield
    finally:
        del sys.modules["mlflow"]


@contextmanager
def compiling_at_first_call() -> Iterator[None]:
    """In this context functions that are decorated by `torch.compile` are compiled when they are first called.

    DeepSpeed asks every optimizer whether it is its Muon, and so imports that, compiled, for any other one, too.
    """
    compile_now = torch.compile

    def compile_later(function: Any = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **options)
        if isinstance(function, torch.nn.Module):
            return compile_now(function, **options)
        compiled: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not compiled:
                compiled.append(compile_now(function, **options))
            return compiled[0](*arguments, **named)

        return call

    torch.compile = compile_later  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


def leave_out_shared_memory_op() -> None:
    """Do without the shared-memory all-reduce on CPUs: it serves inference, and is compiled by C++ at first use."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def gather_persistent_parameters(engine: Any) -> None:
    """Make small parameters whole again after ZeRO-3 dropped a step, which leaves them sharded. A collective.

    The next forward pass could not trace them.
    """
    kept_whole = engine.optimizer.persistent_parameters
    if kept_whole:
        kept_whole[0].all_gather(kept_whole)


class FlatGroup(NamedTuple):
    """A parameter group of stages 1 and 2: one flat vector, its parameters one after another.

    Attributes:
        master: This rank's piece of it in float32; the last ranks' end in padding.
        start: Where the piece starts.
        parameters: With the offset of each.
    """

    master: torch.Tensor
    start: int
    parameters: list[tuple[torch.nn.Parameter, int]]


def flat_groups(engine: Any) -> list[FlatGroup]:
    """The vectors of stages 1 and 2, in the order of the optimizer's groups, whose one parameter is a piece."""
    optimizer = engine.optimizer
    rank = dist.get_rank()
    return [
        FlatGroup(master.data, rank * size, list(zip(parameters, offsets, strict=True)))
        for master, size, parameters, offsets in zip(
            optimizer.single_partition_of_fp32_groups,
            optimizer.partition_size,
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        )
    ]


@torch.no_grad()
def spread_masters(engine: Any) -> None:
    """Stages 1 and 2: make the model's weights what the pieces of all ranks say. A collective."""
    optimizer = engine.optimizer
    for master, pieces, flat in zip(
        optimizer.single_partition_of_fp32_groups,
        optimizer.parallel_partitioned_bit16_groups,
        optimizer.bit16_groups_flat,
        strict=True,
    ):
        own = master.to(device=flat.device, dtype=pieces[dist.get_rank()].dtype, copy=True)
        dist.all_gather_into_tensor(flat, own)  # all ranks: each computes with the whole


def torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The optimizer that was given to DeepSpeed; under ZeRO it steps this rank's shards."""
    inner: torch.optim.Optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return inner


_COUNTS = ("global_steps", "global_samples", "skipped_steps")


def counts(engine: Any) -> dict[str, int]:
    """What an engine counts, JSON-able."""
    return {name: int(getattr(engine, name)) for name in _COUNTS}


def set_counts(engine: Any, counted: dict[str, int]) -> None:
    """Let an engine count on from where another one was."""
    for name in _COUNTS:
        setattr(engine, name, counted[name])


def shard_states(engine: Any) -> Iterable[dict[str, Any]]:
    """The optimizer's state of each shard of this rank under ZeRO."""
    states: dict[Any, dict[str, Any]] = engine.optimizer.optimizer.state
    return states.values()


@contextmanager
def reading_tensors_only() -> Iterator[None]:
    """In this context DeepSpeed's files are read by torch's unpickler for weights, which runs no code of a file.

    DeepSpeed asks torch for the other one in each of its calls; torch's variable for that overrides what is asked.

    Raises:
        pickle.UnpicklingError: In the context: a file holds something else than tensors, numbers, texts and the few
            classes of DeepSpeed that consist of such.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    variables = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")  # torch refuses both together
    before = {name: os.environ.pop(name) for name in variables if name in os.environ}
    os.environ[variables[0]] = "1"
    try:
        with torch.serialization.safe_globals([ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]):
            yield
    finally:
        del os.environ[variables[0]]
        os.environ.update(before)


@contextmanager
def reading_universal(engine: Any) -> Iterator[None]:
    """In this context `engine.load_checkpoint` reads the universal form."""
    engine._config.load_universal_checkpoint = True
    try:
        yield
    finally:
        engine._config.load_universal_checkpoint = False


def write_universal(sharded: Path, universal: Path) -> None:
    """Join the shards of all ranks into one file per parameter and optimizer moment.

    Args:
        sharded: A directory that `engine.save_checkpoint` wrote; not changed.
        universal: Made anew.
    """
    from deepspeed.checkpoint import ds_to_universal

    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(sharded),
            output_folder=str(universal),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,
        )
    )


def partition(module: nn.Module, config: dict[str, Any], device: torch.device) -> None:
    """ZeRO-3: cut the parameters of a module one by one, each in the type in which it is trained. A collective.

    DeepSpeed does the same when it is given the module, after it has cast all of it, and moved it to the device.
    """
    from deepspeed.runtime.zero import Init

    dtype = torch.bfloat16 if config["bf16"]["enabled"] else torch.float32
    conversion = Init(module=nn.Module(), dtype=dtype, config_dict_or_path=config)
    for parameter in module.parameters():
        parameter.data = parameter.data.to(device, dtype)
        conversion._convert_to_zero_parameters([parameter])


def full_shape(parameter: torch.nn.Parameter) -> torch.Size:
    """Shape of a parameter before ZeRO-3 partitioned it; its own shape otherwise."""
    return getattr(parameter, "ds_shape", parameter.shape)


def master_slice(parameter: torch.nn.Parameter) -> tuple[int, torch.Tensor] | None:
    """Where in the flat parameter this rank's slice of its float32 master starts, and the slice; None: it has none."""
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    return None if mapping is None else (mapping.lp_fragment_address.start, mapping.get_hp_fragment())


def master_share(parameter: torch.nn.Parameter) -> torch.Tensor:
    """ZeRO-3: this rank's part of a parameter in float32, flat. A frozen one is as precise as the engine's type."""
    from deepspeed.utils import safe_get_local_fp32_param

    if not parameter.requires_grad:
        frozen: torch.Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
        return frozen.detach().float()
    share: torch.Tensor = safe_get_local_fp32_param(parameter)
    return share.flatten()


def gradient_share(parameter: nn.Parameter) -> torch.Tensor | None:
    """This rank's share of a parameter's mean gradient under ZeRO 1 to 3, when the step's backward passes are done.

    Shares do not overlap and hold no padding. None: it has none.
    """
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad

        share: torch.Tensor = safe_get_local_grad(parameter).flatten()  # of one length on all ranks
        return share[: max(0, full_shape(parameter).numel() - dist.get_rank() * len(share))]
    mapping = parameter._hp_mapping  # type: ignore[attr-defined]
    if mapping is None:
        return None
    own: torch.Tensor = mapping.get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
    return own


def scale_gradient(parameter: nn.Parameter, factor: torch.Tensor) -> None:
    """Multiply this rank's share of a parameter's mean gradient under ZeRO 1 to 3; see `gradient_share`."""
    if hasattr(parameter, "ds_id"):
        from deepspeed.utils import safe_get_local_grad, safe_set_local_grad

        safe_set_local_grad(parameter, safe_get_local_grad(parameter) * factor)  # what it gives may be a copy
    elif (share := gradient_share(parameter)) is not None:
        share.mul_(factor)


def leave_averaging_to_us(engine: Any) -> None:
    """Stage 0: gradients stay each rank's own, where DeepSpeed would copy them to a buffer, average and copy back."""
    engine.enable_backward_allreduce = False


def release(engine: Any) -> None:
    """Take down an engine and free its memory.

    `destroy` removes hooks; ZeRO-3 still keeps the engine alive, so what its tensors hold is given back one by one.
    """
    optimizer = torch_optimizer(engine)
    held = list(_tensors_in([optimizer.param_groups, list(optimizer.state.values()), *vars(engine.optimizer).values()]))
    for parameter in engine.module.parameters():
        held += [parameter, *([parameter.ds_tensor] if hasattr(parameter, "ds_tensor") else [])]
    engine.destroy()
    for tensor in held:
        tensor.grad = None
        tensor.data = tensor.data.new_empty(0)
    optimizer.state.clear()


def _tensors_in(values: Iterable[Any], depth: int = 4) -> Iterator[torch.Tensor]:
    """All tensors in nested lists and mappings."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        elif depth and isinstance(value, list | tuple | dict):
            yield from _tensors_in(value.values() if isinstance(value, dict) else value, depth - 1)
