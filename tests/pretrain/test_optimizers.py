"""timm's optimizers under DeepSpeed, with two gloo ranks, against one plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from timm.optim import list_optimizers

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.config.load import load_recipe
from pretrain.config.optimizer_facts import NAMES, WHOLE_PARAMETER
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.errors import RequestError
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.optimizers import create_optimizer
from tests.engine_weights import exported_now

STEPS, MICRO, RANKS, RATE, DECAY = 3, 4, 2, 2e-3, 0.05
# AdamW's are in test_engine.
SETTINGS = [
    *(("lion", stage) for stage in (0, 1, 2, 3)),
    *((name, stage) for name in ("nadamw", "adoptw", "sgdw") for stage in (1, 3)),
    *((name, 0) for name in WHOLE_PARAMETER),
]
RESHARDED = [("muon", 0), ("nadamw", 3), ("adoptw", 1), ("lion", 2)]
NOT_RESHARDED = [("sgdw", 3)]


def _recipe(name: str, stage: int, workers: int = RANKS) -> Recipe:
    return Recipe(
        name="optimizers",
        objective=MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2),
        backbone=ImageConfig("vit_tiny_patch16_224", 16, 4, options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(name=name, lr=RATE, weight_decay=DECAY, betas=[0.8, 0.9]),
        train=TrainConfig(
            steps=STEPS,
            global_batch_size=MICRO * RANKS,
            micro_batch_size=MICRO,
            accumulation=RANKS // workers,
            workers=workers,
            zero_stage=stage,
            checkpoint_every=STEPS,
        ),
    )


def _batch(step: int, rank: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    images = torch.randint(0, 256, (MICRO, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return {"image": images, "seed": torch.arange(MICRO) + 100 * step + 10 * rank}


def _steps(engine: Engine, first: int, last: int) -> list[float]:
    """Loss of each step over all ranks, whose number decides how many micro-batches each takes."""
    rank, world = dist.get_rank(), dist.get_world_size()
    losses = []
    for step in range(first, last):
        engine.set_schedule(RATE, DECAY)
        batches = [_batch(step, rank * RANKS // world + part) for part in range(RANKS // world)]
        loss = engine.step(batches, Progress(step, STEPS, is_logged=False)).loss
        dist.all_reduce(loss)
        losses.append(float(loss) / world)
    return losses


def _every_setting(directory: Path) -> dict[str, Any]:
    world_size = dist.get_world_size()
    found = {}
    for name, stage in SETTINGS if world_size == RANKS else RESHARDED + NOT_RESHARDED:
        torch.manual_seed(0)
        recipe = _recipe(name, stage, world_size)
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        saved = directory / f"{name}-{stage}"
        if world_size < RANKS and (name, stage) in NOT_RESHARDED:
            with pytest.raises(RuntimeError, match=f"optimizer.name={name}.*resume with as many") as caught:
                engine.load_resharded(saved, directory / "scratch")
            found[f"{name}-{stage}"] = str(caught.value)
            continue
        if world_size == RANKS:
            losses = _steps(engine, 0, STEPS - 1)
            if (name, stage) in RESHARDED:
                engine.save(saved)
            losses += _steps(engine, STEPS - 1, STEPS)
        else:
            engine.load_resharded(saved, directory / "scratch")
            losses = _steps(engine, STEPS - 1, STEPS)
        weights = exported_now(engine)
        found[f"{name}-{stage}"] = [*losses, float(sum(tensor.square().sum() for tensor in weights.values()))]
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any], directory: Path) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting, directory)


@pytest.fixture(scope="module")
def alone(run_on_ranks: Callable[..., Any], directory: Path, found: dict[str, Any]) -> dict[str, Any]:
    return run_on_ranks(1, _every_setting, directory)


def _plain(name: str) -> list[float]:
    recipe = _recipe(name, 0)
    torch.manual_seed(0)
    objective = build_objective(recipe)
    optimizer = create_optimizer(objective.param_groups(DECAY), recipe.optimizer, RATE)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.stack([objective(_batch(step, rank), Progress(step, STEPS)).loss for rank in range(RANKS)]).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    weights = objective.backbone.timm_state_dict()
    return [*losses, float(sum(tensor.square().sum() for tensor in weights.values()))]


@pytest.mark.long
@pytest.mark.parametrize("name", sorted({name for name, _ in SETTINGS}))
def test_optimizer__every_allowed_stage_equals_a_plain_loop(name: str, found: dict[str, Any]) -> None:
    expected = _plain(name)
    stages = [stage for allowed, stage in SETTINGS if allowed == name]
    for stage in stages:
        assert found[f"{name}-{stage}"] == pytest.approx(expected, rel=2e-5), f"ZeRO {stage}"


@pytest.mark.long
@pytest.mark.parametrize(("name", "stage"), RESHARDED)
def test_optimizer__state_goes_on_with_another_number_of_ranks(
    name: str, stage: int, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    assert alone[f"{name}-{stage}"] == pytest.approx(found[f"{name}-{stage}"][-2:], rel=2e-5)


@pytest.mark.long
@pytest.mark.parametrize(("name", "stage"), NOT_RESHARDED)
def test_optimizer__state_that_cannot_be_resharded_is_refused_in_one_line(
    name: str, stage: int, alone: dict[str, Any]
) -> None:
    assert "\n" not in alone[f"{name}-{stage}"]


def test_names__are_timms() -> None:
    assert set(NAMES) <= set(list_optimizers())


def test_create_optimizer__settings_reach_those_that_have_them() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    made = {
        name: create_optimizer(
            [{"params": [weight], "weight_decay": 0.1}], OptimizerConfig(name=name, betas=[0.8, 0.9], eps=1e-3), 0.1
        )
        for name in NAMES
    }
    for name, optimizer in made.items():
        (group,) = optimizer.param_groups
        assert group["lr"] == 0.1 and group["weight_decay"] == 0.1
        assert tuple(group.get("betas", (0.8, 0.9))) == (0.8, 0.9)
        assert group.get("momentum", 0.8) == 0.8
        assert "betas" in group or "momentum" in group, name
        assert group.get("eps", 1e-3) == 1e-3
    assert made["lamb"].param_groups[0]["max_grad_norm"] is None
    assert "eps" not in made["lion"].param_groups[0]


def test_muon__matrices_are_orthogonalised_and_other_shapes_are_not() -> None:
    torch.manual_seed(0)
    objective = build_objective(_recipe("muon", 0))
    optimizer = create_optimizer(objective.param_groups(0.0), OptimizerConfig(name="muon"), 1e-2)
    objective(_batch(0, 0), Progress(0, 1)).loss.backward()
    before = {name: parameter.clone() for name, parameter in objective.named_parameters()}
    optimizer.step()
    parameters = dict(objective.named_parameters())
    uses_matrix = {name for name, p in parameters.items() if optimizer.state[p]["use_muon"]}
    assert "backbone.vit.blocks.0.attn.qkv.weight" in uses_matrix
    assert not {name for name in uses_matrix if name.endswith((".bias", "_token")) or "norm" in name}
    name = "backbone.vit.blocks.0.mlp.fc1.weight"
    gradient, update = (
        torch.linalg.svdvals(matrix.detach()) for matrix in (parameters[name].grad, parameters[name] - before[name])
    )
    # One direction rules the gradient, and in the update all weigh alike, but for what five Newton-Schulz steps leave.
    assert (gradient > gradient.max() / 2).float().mean() < 0.1
    assert (update > update.max() / 2).float().mean() > 0.7


@pytest.mark.parametrize("name", WHOLE_PARAMETER)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_recipe__optimizers_of_whole_parameters_need_stage_0(name: str, stage: int) -> None:
    with pytest.raises(RequestError) as caught:
        load_recipe("demo", [f"optimizer.name={name}", f"train.zero_stage={stage}"])
    (line,) = str(caught.value).splitlines()
    assert f"optimizer.name={name}" in line and WHOLE_PARAMETER[name] in line and "train.zero_stage=0" in line


@pytest.mark.parametrize(("name", "stage"), [("muon", 0), ("lamb", 0), ("lion", 3)])
def test_recipe__allowed_pairs_pass(name: str, stage: int) -> None:
    recipe = load_recipe("demo", [f"optimizer.name={name}", f"train.zero_stage={stage}"])
    assert recipe.optimizer.name == name


def test_recipe__unknown_optimizer_is_one_line() -> None:
    with pytest.raises(RequestError, match=r"optimizer.name=adam: .*adamw"):
        load_recipe("demo", ["optimizer.name=adam"])
