"""What the weights of a training take of memory: computed, and counted in processes that train."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from objectives.base import Progress
from pretrain.config.load import load_plan
from pretrain.config.schema import Recipe
from pretrain.training.engine import Engine
from pretrain.training.memory import memory_of
from pretrain.training.model import build_objective
from pretrain.training.preflight import outline
from tests.objectives.test_dinov3_ranks import IMAGES, RECIPE, STEPS, batch_of

RANKS = 2
SETTINGS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]
BUCKET = {"reduce_bucket_size": 200_000, "stage3_param_persistence_threshold": 1000}
GPU, CPU = torch.device("cuda"), torch.device("cpu")


def recipe_of(precision: str, stage: int) -> Recipe:
    sizes = {"micro_batch_size": IMAGES // RANKS, "workers": RANKS, "zero_stage": stage, "precision": precision}
    return replace(
        RECIPE,
        objective=replace(RECIPE.objective, num_prototypes=5000, patch_num_prototypes=3000),  # type: ignore[type-var]
        backbone=replace(RECIPE.backbone, options=RECIPE.backbone.options | {"embed_dim": 64}),  # type: ignore[type-var]
        train=replace(RECIPE.train, **sizes),  # type: ignore[arg-type]
        deepspeed={"zero_optimization": BUCKET},
    )


def tensors() -> dict[int, int]:
    """Bytes of all that live in this process, by the address of their storage."""
    storages = [thing.untyped_storage() for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return {storage.data_ptr(): storage.nbytes() for storage in storages if storage.device.type == "cpu"}


def counted(recipe: Recipe) -> int:
    """Bytes that have come with a model and its engine while the optimizer steps; the most over its groups."""
    gc.collect()
    before = tensors().keys()
    engine = Engine(build_objective(recipe), recipe, CPU)
    engine.objective.begin(engine.read_weights)
    update, seen = engine._guard._step, []

    def counting(*arguments: Any, **options: Any) -> Any:
        gradients = [parameter.grad for parameter in engine.objective.parameters()]  # noqa: F841  # else only torch knows
        seen.append(sum(size for address, size in tensors().items() if address not in before))
        return update(*arguments, **options)

    engine._guard._step = counting
    for step in range(2):
        assert engine.step([batch_of(step)], Progress(step, STEPS, is_logged=False)).applied
    engine.close()
    return max(seen)


def counted_in_every_setting() -> dict[str, int]:
    found = {}
    for precision, stage in SETTINGS:
        own = torch.tensor(counted(recipe_of(precision, stage)))
        dist.all_reduce(own, op=dist.ReduceOp.MAX)
        found[f"{precision}-{stage}"] = int(own)
    return found


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any]) -> dict[str, int]:
    counts: dict[str, int] = run_on_ranks(RANKS, counted_in_every_setting)
    return counts


@pytest.mark.integration
@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
def test_memory_of__is_what_two_ranks_hold_while_the_optimizer_steps(
    precision: str, stage: int, found: dict[str, int]
) -> None:
    recipe = recipe_of(precision, stage)
    objective = outline(recipe)
    assert objective is not None
    memory = memory_of(recipe, objective, CPU)
    computed = memory.weights + memory.optimizer + memory.companions + memory.update
    assert computed == pytest.approx(found[f"{precision}-{stage}"], rel=0.06)


def test_memory_of__a_7b_model_fits_many_gpus_because_companions_are_shared() -> None:
    _, second, _ = load_plan("dinov3_vit7b", ["data.root=unused"], check_files=False).stages
    objective = outline(second.recipe)
    assert objective is not None
    numbers = sum(parameter.numel() for parameter in objective.parameters())
    assert 7.0e9 < numbers < 7.2e9
    memory = memory_of(second.recipe, objective, GPU)
    assert memory.companions == pytest.approx(4 * (2 * numbers - 0.36e9) / 256, rel=0.01)  # the anchor has no heads
    assert memory.optimizer == pytest.approx(12 * numbers / 256, rel=0.01)
    assert memory.total < 4e9
    whole = replace(second.recipe, train=replace(second.recipe.train, zero_stage=2))
    assert memory_of(whole, objective, GPU).companions > 54e9
