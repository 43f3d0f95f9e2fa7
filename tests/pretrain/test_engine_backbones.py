"""Backbones other than plain ViTs under DeepSpeed, with two gloo ranks: sharded weights, batch norms, skipped steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.running_statistics import RunningStatistics
from tests.engine_weights import exported_now

RANKS, MICRO, STEPS = 2, 4, 2
SWIN = ImageConfig("swin_tiny_patch4_window7_224", 64, options={"depths": [1, 1, 2, 1], "embed_dim": 24})
FASTVIT = ImageConfig("fastvit_t8", 64)  # has batch norms
SETTINGS = {
    "swin-0": (SWIN, 0, "fp32"),
    "swin-3": (SWIN, 3, "fp32"),
    "fastvit-0": (FASTVIT, 0, "fp32"),
    "fastvit-2": (FASTVIT, 2, "fp32"),
    "fastvit-3": (FASTVIT, 3, "bf16"),
}

pytestmark = pytest.mark.long


def _recipe(backbone: ImageConfig, stage: int, precision: str) -> Recipe:
    train = TrainConfig(
        steps=STEPS,
        global_batch_size=MICRO * RANKS,
        micro_batch_size=MICRO,
        accumulation=1,
        workers=RANKS,
        zero_stage=stage,
        precision=precision,
        checkpoint_every=STEPS,
    )
    return Recipe(
        name="backbones",
        objective=MAEConfig(),
        backbone=backbone,
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-4),
        train=train,
    )


def _batch(step: int, poisoned: bool = False) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    images = torch.rand(MICRO, 3, 64, 64, generator=generator)
    return {"image": images * torch.nan if poisoned else images, "seed": torch.arange(MICRO) + step}


def _trained(recipe: Recipe) -> dict[str, Any]:
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    losses = []
    for step in range(STEPS):
        engine.set_schedule(1e-4, 0.05)
        loss = engine.step([_batch(step)], Progress(step, STEPS)).loss
        dist.all_reduce(loss)
        losses.append(float(loss) / RANKS)
    before = exported_now(engine)
    skipped = engine.step([_batch(9, poisoned=True)], Progress(STEPS, STEPS, is_logged=False))
    after = exported_now(engine)
    gathered = [torch.empty(0)] * RANKS
    dist.all_gather_object(gathered, {name: tensor for name, tensor in after.items() if ".running_" in f".{name}"})
    return {
        "losses": losses,
        "skipped": not skipped.applied,
        "unmoved": all(torch.equal(before[name], after[name]) for name in before),
        "statistics": sum("running_mean" in name for name in after),
        "alike": all(torch.equal(tensor, gathered[1][name]) for name, tensor in gathered[0].items()),
        "moved": any(tensor.abs().sum() > 0 for name, tensor in after.items() if "running_mean" in name),
    }


def _every_setting() -> dict[str, Any]:
    return {name: _trained(_recipe(*setting)) for name, setting in SETTINGS.items()}


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting)


def test_engine__sharding_does_not_change_the_losses(found: dict[str, Any]) -> None:
    assert found["swin-3"]["losses"] == pytest.approx(found["swin-0"]["losses"], rel=2e-5)
    assert found["fastvit-2"]["losses"] == pytest.approx(found["fastvit-0"]["losses"], rel=2e-5)
    assert found["fastvit-3"]["losses"] == pytest.approx(found["fastvit-0"]["losses"], rel=3e-2)


@pytest.mark.parametrize("name", SETTINGS)
def test_engine__a_skipped_step_leaves_statistics_as_they_were(name: str, found: dict[str, Any]) -> None:
    assert found[name]["skipped"] and found[name]["unmoved"]


@pytest.mark.parametrize("name", SETTINGS)
def test_engine__ranks_agree_on_running_statistics(name: str, found: dict[str, Any]) -> None:
    assert found[name]["alike"]
    assert (found[name]["statistics"] > 0) is name.startswith("fastvit")
    assert found[name]["moved"] is name.startswith("fastvit")


def test_running_statistics__restore_undoes_a_forward_pass() -> None:
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    statistics, before = RunningStatistics([module]), {n: b.clone() for n, b in module.named_buffers()}
    statistics.remember()
    module(torch.full((2, 3, 4, 4), torch.nan))
    statistics.restore()
    assert all(torch.equal(buffer, before[name]) for name, buffer in module.named_buffers())
