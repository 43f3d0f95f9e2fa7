"""How often a step waits for its device, and how many messages it sends: counted for every objective that ships.

On a GPU each wait empties the queue of kernels, and each message costs latency, so both are held to the numbers below.
They are counted where torch dispatches its operations, so DeepSpeed's and those inside other operations are among them.
What `stream.finish` does to a batch comes before and is not counted.
"""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data_pipelines.shards.dataset import open_dataset
from data_pipelines.streaming.stream import Stream
from data_pipelines.views.specs import views_from
from objectives import registry
from objectives.base import Progress
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine, init_distributed
from pretrain.training.model import build_objective
from tests.small_objectives import SMALL as SIZES
from tests.small_objectives import backbone_of, data_of, with_frozen_teacher

RANKS, MICRO = 2, 4
# Drawing the blocks of masks waits, on a CPU only (tests/objectives/test_block_masks.py).
ANCHORED = {"gram_weight": 1.0, "gram_from": "teacher", "drop_path": 0.5, "mask_share": 0.0}
SMALL = SIZES | {"dinov3": SIZES["dinov3"] | ANCHORED}

# In stage 1 the engine sends most: a message more for each group of parameters. What an objective does itself is the
# same in stage 0, for which one with groups of its own stands, and one without.
COUNTED = [*((name, 1) for name in sorted(SMALL)), ("dinov3", 0), ("mae", 0)]

# Of the engine: one wait, for the verdict on the step. Messages: losses that are not finite; gradients; in stage 1 the
# squares of their norms, and the new weights of the two parameter groups.
OF_ENGINE = {0: {"tolist": 1, "allreduce": 2}, 1: {"tolist": 1, "allreduce": 3, "allgather_base": 2}}
# Of the objective, in all stages. DINO and SelfPatch send what centers move towards, GMML the number of hidden pixels,
# DINOv3 two per iteration of Sinkhorn-Knopp, of which there are three for class tokens and three for patches; it asks
# once whether there are blocks to draw, on a CPU only.
# NeRF-MAE the numbers of voxels, Point-MAE the statistics of its batch norms, forward and backward.
# SiT the statistics of the batch norms in its heads, forward and backward and for the teacher, and projections.
OF_OBJECTIVE: dict[str, dict[str, int]] = {
    "mae": {},
    "dino": {"allreduce": 1},
    "sit": {"allreduce": 19, "allgather": 2},
    "gmml": {"allreduce": 1},
    "selfpatch": {"allreduce": 2},
    "dinov3": {"allreduce": 12, "local_scalar_dense": 1},
    "distillation": {},
    "nerf_mae": {"allreduce": 1},
    "point_mae": {"allreduce": 9},
    "uni4eye": {},
    "volume_mae": {},
}
# In stage 1 its groups of parameters, which are those of parts that are clipped and scaled apart.
MORE_GROUPS = {"dinov3": 8}
# Operations whose result the host has to know before it goes on. "lift_fresh" makes a tensor of numbers of Python, and
# that reaches a GPU by a copy which waits.
WAITS = {
    "lift_fresh",
    "_local_scalar_dense",
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
}


class _Counted(TorchDispatchMode):
    """Counts waits and collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        name = name.partition(".")[0]
        if namespace == "c10d" or name in WAITS or (name in ("index", "index_put_") and _has_mask(args[1])):
            self.seen[name.strip("_")] += 1
        return func(*args, **(kwargs or {}))


def _has_mask(indices: Any) -> bool:
    """Whether it depends on values how many elements are picked."""
    return any(index is not None and index.dtype == torch.bool for index in indices)


@contextmanager
def _counting() -> Iterator[Counter[str]]:
    """What happens in this context; `tolist` and `cpu` dispatch no operation of a name of their own."""
    counted = _Counted()
    with pytest.MonkeyPatch.context() as patch, counted:
        for method in ("tolist", "cpu"):
            original = getattr(torch.Tensor, method)

            def watched(tensor: Any, *args: Any, _call: Any = original, _name: str = method, **options: Any) -> Any:
                counted.seen[_name] += 1
                return _call(tensor, *args, **options)

            patch.setattr(torch.Tensor, method, watched)
        yield counted.seen


def _recipe(name: str, stage: int, workers: int = RANKS) -> Recipe:
    return Recipe(
        name="waits",
        objective=registry.config_class(name)(**SMALL[name]),
        backbone=backbone_of(name),
        data=DataConfig(train=str(data_of(name) / "train-*.tar")),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(
            steps=1000,
            global_batch_size=MICRO * workers,
            micro_batch_size=MICRO,
            accumulation=1,
            workers=workers,
            zero_stage=stage,
            checkpoint_every=1000,
        ),
    )


def _engine_and_batch(recipe: Recipe, device: torch.device) -> tuple[Engine, dict[str, torch.Tensor]]:
    engine = Engine(with_frozen_teacher(build_objective(recipe)), recipe, device)
    engine.set_schedule(1e-3, 0.05)
    stream = Stream(
        open_dataset(recipe.data.train or ""),
        views_from(engine.objective.views()),
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=MICRO,
        rank=0,
        world_size=recipe.train.workers,
        seed=0,
        num_streams=2,
    )
    (batch,) = itertools.islice(stream, 1)
    return engine, {name: tensor.to(device) for name, tensor in stream.finish(batch).items()}


def _every_objective() -> dict[str, dict[str, int]]:
    found = {}
    for name, stage in COUNTED:
        engine, batch = _engine_and_batch(_recipe(name, stage), torch.device("cpu"))
        engine.step([batch], Progress(500, 1000))  # what is made once
        for kind, is_logged in (("logged", True), ("unlogged", False)):
            with _counting() as seen:
                assert engine.step([batch], Progress(501, 1000, is_logged)).applied
            found[f"{name}-{stage}-{kind}"] = dict(sorted(seen.items()))
    return found


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_objective)


@pytest.mark.parametrize("kind", ["logged", "unlogged"])
@pytest.mark.parametrize(("name", "stage"), COUNTED)
def test_step__waits_once_and_sends_few_messages(name: str, stage: int, kind: str, found: dict[str, Any]) -> None:
    groups = Counter(allgather_base=MORE_GROUPS.get(name, 0) * stage)
    assert found[f"{name}-{stage}-{kind}"] == Counter(OF_ENGINE[stage]) + Counter(OF_OBJECTIVE[name]) + groups


def test_counting__sees_whatever_makes_the_host_wait() -> None:
    x = torch.arange(3.0)
    ways: dict[str, Callable[[], object]] = {
        "item": lambda: x[1].item(),
        "float": lambda: float(x[1]),
        "bool": lambda: bool(x[1] > 0),
        "tolist": lambda: x.tolist(),
        "cpu": lambda: x.cpu(),
        "new tensor": lambda: x.new_tensor([1.0]),
        "mask": lambda: x[x > 0],
        "nonzero": lambda: x.nonzero(),
        "equal": lambda: torch.equal(x, x),
    }
    for name, way in ways.items():
        with _counting() as seen:
            way()
        assert sum(seen.values()) == 1, name
    picked = torch.tensor([1, 2])
    with _counting() as seen:
        x[picked].add_(1).sum()
    assert not seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: only CUDA says which operation waits for it")
@pytest.mark.parametrize("name", sorted(SMALL))
def test_step__waits_once_on_cuda(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29613"}
    for variable, value in place.items():
        monkeypatch.setenv(variable, value)
    device = torch.device("cuda", 0)
    init_distributed(device)
    try:
        engine, batch = _engine_and_batch(_recipe(name, 0, workers=1), device)
        engine.step([batch], Progress(500, 1000))
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            engine.step([batch], Progress(501, 1000, is_logged=False))
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.distributed.destroy_process_group()
    assert len([warning for warning in caught if "synchroniz" in str(warning.message)]) == 1
