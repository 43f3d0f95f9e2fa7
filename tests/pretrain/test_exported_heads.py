"""A decoder that is trained is exported whole, whatever ZeRO has made of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from backbones.voxels.config import VoxelSwinConfig
from objectives.base import Progress
from objectives.nerf_mae.config import NeRFMAEConfig
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective

RANKS, MICRO, SIDE = 2, 2, 8
SETTINGS = {"0": (0, "fp32"), "3": (3, "fp32"), "2-bf16": (2, "bf16")}


def _recipe(stage: int, precision: str) -> Recipe:
    train = TrainConfig(
        steps=2,
        global_batch_size=MICRO * RANKS,
        micro_batch_size=MICRO,
        accumulation=1,
        workers=RANKS,
        zero_stage=stage,
        precision=precision,
        checkpoint_every=2,
    )
    return Recipe(
        name="heads",
        objective=NeRFMAEConfig(mask_block=1),
        backbone=VoxelSwinConfig(size=[SIDE] * 3, embed_dim=12, depths=[1, 1], num_heads=[1, 2], drop_path=0.0),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-2),
        train=train,
    )


def _exported(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Tensors of the heads that are float32, before the first step and after it, on rank 0."""
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    found = {"before": _numbers(engine)}
    engine.set_schedule(1e-2, 0.05)
    generator = torch.Generator().manual_seed(dist.get_rank())
    grid = torch.rand(MICRO, 4, SIDE, SIDE, SIDE, generator=generator)
    size = torch.full((MICRO, 3), SIDE)
    engine.step([{"grid": grid, "grid.size": size, "seed": torch.arange(MICRO)}], Progress(0, 2))
    found["after"] = _numbers(engine)
    return found


def _numbers(engine: Engine) -> dict[str, Any]:
    """Of the heads now: what they hold in memory may change with the next step."""
    heads = engine.heads(is_wanted=dist.get_rank() == 0)
    assert heads is not None
    return {name: tensor.double().tolist() for name, tensor in heads.tensors.items() if tensor.dtype == torch.float32}


def _every_setting() -> dict[str, Any]:
    return {name: _exported(_recipe(*setting)) for name, setting in SETTINGS.items()}


def test_heads__are_whole_float32_and_what_was_trained(run_on_ranks: Callable[..., Any]) -> None:
    found = run_on_ranks(RANKS, _every_setting)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        fresh = build_objective(_recipe(0, "fp32")).state_dict()
    names = {name for name in fresh if name.startswith(("mask_token", "decoder."))}
    for setting, tolerance in (("0", 0.0), ("3", 0.0), ("2-bf16", 1e-2)):
        assert found[setting]["before"].keys() == found[setting]["after"].keys() == names
        for name, values in found[setting]["before"].items():
            torch.testing.assert_close(torch.tensor(values), fresh[name], rtol=tolerance, atol=0.0)
        token = [found[setting][when]["mask_token"] for when in ("before", "after")]
        assert token[0] != token[1]
    for name, values in found["3"]["after"].items():
        expected = torch.tensor(found["0"]["after"][name])
        torch.testing.assert_close(torch.tensor(values), expected, rtol=1e-3, atol=1e-3)
