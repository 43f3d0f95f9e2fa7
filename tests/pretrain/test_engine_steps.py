"""What a step of the engine may change and what it holds: dropped steps, schedules, micro-batches; two gloo ranks."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones.images.config import ImageConfig
from objectives import registry
from objectives.base import Progress
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training import deepspeed_internals
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.schedules import weight_decay

RANKS, MICRO, ACCUMULATION, STEPS = 2, 4, 2, 4
RECIPE = Recipe(
    name="steps",
    objective=registry.config_class("sit")(projector_hidden_dim=32, projector_dim=16),  # a teacher, and batch norms
    backbone=ImageConfig("vit_tiny_patch16_224", 16, 4, options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
    data=DataConfig(train="unused"),
    optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, weight_decay_end=0.2),
    train=TrainConfig(
        steps=STEPS,
        global_batch_size=MICRO * ACCUMULATION * RANKS,
        micro_batch_size=MICRO,
        accumulation=ACCUMULATION,
        workers=RANKS,
        zero_stage=1,
        checkpoint_every=STEPS,
    ),
)
SETTINGS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]


def _batches(step: int) -> Iterator[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
    for number in range(ACCUMULATION):
        views = {
            name: torch.randint(0, 256, (MICRO, 3, 16, 16), dtype=torch.uint8, generator=generator)
            for name in ("view_1", "view_2")
        }
        yield views | {"seed": torch.arange(MICRO) + 10 * step + number}


def _state(engine: Engine) -> dict[str, Tensor]:
    """Everything that a step may change, on this rank."""
    objective = engine.objective
    inner = engine._engine.optimizer
    states = inner.state.values() if engine.stage == 0 else deepspeed_internals.shard_states(engine._engine)
    moments = {
        f"moment.{number}.{name}": torch.as_tensor(value)
        for number, state in enumerate(states)
        for name, value in state.items()
    }
    names, parameters = zip(*objective.named_parameters(), strict=True)
    values = engine.read_weights(parameters)
    weights = {f"weight.{name}": value for name, value in zip(names, values, strict=True)}
    return {name: tensor.detach().clone() for name, tensor in {**weights, **moments, **objective.extra_state()}.items()}


class _PoisonedGradient:
    """In this context gradients behind the encoder are not a number on the last rank; losses stay as they are."""

    def __init__(self, engine: Engine) -> None:
        self._module = engine.objective.backbone.vit.norm

    def __enter__(self) -> None:
        self._hook = self._module.register_forward_hook(self._poison)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _poison(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad and dist.get_rank() == dist.get_world_size() - 1:
            output.register_hook(lambda gradient: gradient * torch.nan)


def _every_setting() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision, stage in SETTINGS:
        recipe = replace(RECIPE, train=replace(RECIPE.train, zero_stage=stage, precision=precision))
        torch.manual_seed(0)
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        found[f"{precision}-{stage}"] = {
            "gradient": _poisoned(engine),
            "decays": _weight_decays(engine, recipe),
            "alive": _most_alive(engine),
            "count": _wrong_count(engine),
        }
    return found


def _poisoned(engine: Engine) -> dict[str, Any]:
    """A sound step, one with a gradient that is not a number, and a sound one again."""
    engine.set_schedule(1e-3, 0.05)
    start = _state(engine)
    assert engine.step(_batches(0), Progress(0, STEPS, is_logged=False)).applied
    before = _state(engine)
    with _PoisonedGradient(engine):
        skipped = engine.step(_batches(1), Progress(1, STEPS, is_logged=False))
    after = _state(engine)
    again = engine.step(_batches(2), Progress(2, STEPS, is_logged=False))
    last = _state(engine)
    return {
        "applied": [skipped.applied, again.applied],
        "bad_ranks": list(skipped.bad_ranks),
        "loss_is_finite": bool(skipped.loss.isfinite()),
        "changed": [name for name, tensor in before.items() if not torch.equal(tensor, after[name])],
        "moved": [len(start), sum(not torch.equal(tensor, before[name]) for name, tensor in start.items())],
        "finite": all(tensor.isfinite().all() for tensor in last.values()),
        "goes_on": sum(not torch.equal(tensor, last[name]) for name, tensor in after.items()),
    }


def _weight_decays(engine: Engine, recipe: Recipe) -> list[list[float]]:
    """Weight decays of the groups that decay, and of the others, over the steps of a ramp that begins at 0."""
    schedule, seen = weight_decay(recipe), []
    for step in range(STEPS):
        engine.set_schedule(1e-3, schedule.at(step))
        seen.append([group["weight_decay"] for group in engine._engine.optimizer.param_groups])
    return seen


def _most_alive(engine: Engine) -> int:
    """Most micro-batches that were in memory when another one was asked for."""
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched() -> Iterator[dict[str, Tensor]]:
        nonlocal most
        for batch in _batches(3):
            gc.collect()
            most = max(most, sum(reference() is not None for reference in alive))
            alive.append(weakref.ref(batch["view_1"]))
            yield batch
            del batch

    engine.step(watched(), Progress(3, STEPS, is_logged=False))
    return most


def _wrong_count(engine: Engine) -> str:
    with pytest.raises(ValueError, match="micro-batches in a step") as caught:
        engine.step(list(_batches(3))[:1], Progress(3, STEPS, is_logged=False))
    return str(caught.value)


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting)


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_step__a_gradient_that_is_not_finite_changes_nothing(setting: str, found: dict[str, Any]) -> None:
    result = found[setting]["gradient"]
    assert result["loss_is_finite"] and result["bad_ranks"] == []
    assert result["applied"] == [False, True]
    assert result["changed"] == []
    assert result["finite"] and result["goes_on"] > 20
    total, moved = result["moved"]
    assert moved > 0.8 * total, "the state that is compared is what a step changes"


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_set_schedule__a_weight_decay_that_begins_at_zero_ramps(setting: str, found: dict[str, Any]) -> None:
    wanted = [weight_decay(RECIPE).at(step) for step in range(STEPS)]
    assert wanted[0] == 0.0 and wanted[-1] > 0.1
    for step, (decayed, plain) in enumerate(found[setting]["decays"]):
        assert (decayed, plain) == (wanted[step], 0.0)


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_step__holds_one_micro_batch_at_a_time(setting: str, found: dict[str, Any]) -> None:
    assert found[setting]["alive"] == 0


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_step__refuses_another_number_of_micro_batches(setting: str, found: dict[str, Any]) -> None:
    assert found[setting]["count"] == "1 micro-batches in a step, but train.accumulation=2"
