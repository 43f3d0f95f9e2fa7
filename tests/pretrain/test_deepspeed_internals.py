"""Names of DeepSpeed that it does not document: an upgrade that changes one fails here, and says which."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain.training import deepspeed_internals

RANKS = 2


def _touched(directory: Path) -> dict[str, Any]:
    """A few numbers under ZeRO-3, stepped and saved once, and what each name gives of it."""
    import deepspeed
    import deepspeed.ops

    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 4)
    config = {
        "train_batch_size": 2 * RANKS,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
    }
    optimizer = torch.optim.AdamW(linear.parameters())
    engine, *_ = deepspeed.initialize(model=linear, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(torch.ones(2, 6)).sum())
    engine.step()
    engine.save_checkpoint(str(directory / "sharded"), tag="tag", save_latest=False)
    found: dict[str, Any] = {
        "shm": deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"],  # set when the process group was made
        "persistent": [list(parameter.ds_shape) for parameter in engine.optimizer.persistent_parameters],
        "shapes": [list(deepspeed_internals.full_shape(parameter)) for parameter in linear.parameters()],
        "states": [sorted(state) for state in deepspeed_internals.shard_states(engine)],
    }
    for parameter in linear.parameters():
        parameter.partition()
    found["partitioned"] = [parameter.numel() for parameter in linear.parameters()]
    deepspeed_internals.gather_persistent_parameters(engine)
    found["gathered"] = [parameter.numel() for parameter in linear.parameters()]
    with deepspeed_internals.reading_universal(engine):
        found["universal"] = engine.load_universal_checkpoint()
    found["universal_after"] = engine.load_universal_checkpoint()
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        deepspeed_internals.write_universal(directory / "sharded" / "tag", directory / "universal" / "tag")
    torch.distributed.barrier()
    with deepspeed_internals.reading_tensors_only():
        found["read"] = engine.load_checkpoint(str(directory / "sharded"), tag="tag")[0] is not None
        found["forced"] = os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        rank = torch.distributed.get_rank()
        (file,) = (directory / "sharded" / "tag").glob(f"zero_pp_rank_{rank}_*_model_states.pt")
        torch.save({"module": {}, "more": slice(1)}, file)
        try:
            engine.load_checkpoint(str(directory / "sharded"), tag="tag")
        except pickle.UnpicklingError as error:
            found["refused"] = str(error)
    found["forced_after"] = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    found["written"] = sorted(path.name for path in (directory / "universal" / "tag" / "zero").iterdir())
    return found


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_ranks(RANKS, _touched, tmp_path_factory.mktemp("internals"))


def test_reading_tensors_only__takes_what_deepspeed_writes_and_no_other_class(found: dict[str, Any]) -> None:
    assert found["read"] and found["forced"] == "1" and found["forced_after"] is None
    assert "slice" in found["refused"]


def test_compatible_ops__leave_out_the_shared_memory_op(found: dict[str, Any]) -> None:
    assert found["shm"] is False


def test_persistent_parameters__are_small_ones_and_can_be_gathered(found: dict[str, Any]) -> None:
    assert found["persistent"] == [[4, 6], [4]]
    assert found["partitioned"] == [0, 0]
    assert found["gathered"] == [24, 4]


def test_full_shape__is_known_of_sharded_and_of_plain_parameters(found: dict[str, Any]) -> None:
    assert found["shapes"] == [[4, 6], [4]]
    assert deepspeed_internals.full_shape(torch.nn.Parameter(torch.zeros(3, 2))) == (3, 2)


def test_shard_states__are_those_of_the_torch_optimizer(found: dict[str, Any]) -> None:
    assert found["states"] == [["exp_avg", "exp_avg_sq", "step"]]


def test_universal_form__is_written_and_its_reading_is_switched(found: dict[str, Any]) -> None:
    assert found["universal"] is True and found["universal_after"] is False
    assert found["written"] == ["bias", "optimizer_state.pt", "weight"]


_WORKER = """
import sys
import torch
from pretrain.config.load import load_recipe
from pretrain.training.engine import Engine, init_distributed
from pretrain.training.model import build_objective

device = torch.device("cpu")
init_distributed(device)
recipe = load_recipe("demo", ["train.workers=1"], check_files=False)
Engine(build_objective(recipe), recipe, device)
print(*sorted({"mlflow", "pandas", "pyarrow", "fastapi", "torch._inductor.compile_fx"} & sys.modules.keys()))
import mlflow
"""


@pytest.mark.long
def test_engine__starts_without_what_deepspeed_loads_for_others() -> None:
    """MLflow with pandas and torch's compiler took 3 CPU-seconds and 170 MiB of every worker."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment = os.environ | place
    command = [sys.executable, "-c", _WORKER]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1:] == [""]


def test_compiling_at_first_call__compiles_as_asked_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, dict[str, Any]]] = []

    def compile_now(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        compiled.append((function.__name__, options))
        return lambda *arguments: ("compiled", function(*arguments))

    monkeypatch.setattr(torch, "compile", compile_now)
    with deepspeed_internals.compiling_at_first_call():

        @torch.compile
        def double(number: int) -> int:
            return 2 * number

        @torch.compile(dynamic=False)
        def triple(number: int) -> int:
            return 3 * number

    assert torch.compile is compile_now
    assert not compiled and double.__name__ == "double"
    assert [triple(1), triple(2), double(3)] == [("compiled", 3), ("compiled", 6), ("compiled", 6)]
    assert compiled == [("triple", {"dynamic": False}), ("double", {})]
