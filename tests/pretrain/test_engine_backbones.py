"""Backbones other than plain ViTs under DeepSpeed, with two gloo ranks: sharded weights, batch norms, skipped steps."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from objectives.base import Progress
from objectives.configs import MAEConfig
from pretrain.engine import Engine, init_distributed
from pretrain.running_statistics import RunningStatistics
from pretrain.schema import BackboneConfig, DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.worker import build_objective

RANKS, MICRO, STEPS = 2, 4, 2
SWIN = BackboneConfig("swin_tiny_patch4_window7_224", 64, options={"depths": [1, 1, 2, 1], "embed_dim": 24})
FASTVIT = BackboneConfig("fastvit_t8", 64)  # has batch norms
SETTINGS = {
    "swin-0": (SWIN, 0, "fp32"),
    "swin-3": (SWIN, 3, "fp32"),
    "fastvit-0": (FASTVIT, 0, "fp32"),
    "fastvit-2": (FASTVIT, 2, "fp32"),
    "fastvit-3": (FASTVIT, 3, "bf16"),
}

pytestmark = pytest.mark.long


def _recipe(backbone: BackboneConfig, stage: int, precision: str) -> Recipe:
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
        loss = engine.step([_batch(step)], Progress(step, STEPS), grad_norm=True).loss
        dist.all_reduce(loss)
        losses.append(float(loss) / RANKS)
    before = engine.backbone_weights()
    skipped = engine.step([_batch(9, poisoned=True)], Progress(STEPS, STEPS), grad_norm=False)
    after = engine.backbone_weights()
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


def _rank(rank: int, port: int, directory: Path) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    with (directory / f"log-{rank}").open("w") as log:
        os.dup2(log.fileno(), sys.stdout.fileno())
        os.dup2(log.fileno(), sys.stderr.fileno())
        init_distributed(torch.device("cpu"))
        found = {name: _trained(_recipe(*setting)) for name, setting in SETTINGS.items()}
        if rank == 0:
            (directory / "found.json").write_text(json.dumps(found))
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("backbones")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, directory), nprocs=RANKS)
    return json.loads((directory / "found.json").read_text())


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
