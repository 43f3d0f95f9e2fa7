"""DINOv3 on two ranks: what compares images compares those of all ranks, and ZeRO 0 to 3 give what one process does."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.dinov3.config import DINOv3Config
from objectives.parts.koleo import koleo
from objectives.parts.sinkhorn import sinkhorn_knopp
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from tests.objectives.test_dinov3 import LATE, golden_step, wave

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dinov3.json").read_text())
IMAGES, STEPS = 8, 4
SPLITS = [(3, 3), (4, 9), (0, 5)]  # rows of the two ranks
RECIPE = Recipe(
    name="ranks",
    objective=DINOv3Config(
        num_prototypes=32, head_hidden_dim=24, head_bottleneck_dim=8, patch_num_prototypes=24, patch_head_hidden_dim=24,
        patch_head_bottleneck_dim=8, num_local=2, local_size=8, last_layer="weight_norm", local_norm=True,
        # The same for an image whichever rank it is on; what is drawn per rank stays out.
        mask_share=1.0, mask_ratio=[0.3, 0.3], drop_path=0.0, koleo_group=IMAGES, freeze_prototypes=0.5,
        gram_weight=1.0, gram_from="teacher", gram_every=2, teacher_momentum=0.9, teacher_momentum_end=0.9,
    ),
    backbone=ImageConfig(
        "vit_small_patch16_dinov3_qkvb", 16, 4,
        options={"embed_dim": 32, "depth": 2, "num_heads": 2, "num_reg_tokens": 1, "init_values": 0.5},
    ),
    data=DataConfig(train="unused"),
    optimizer=OptimizerConfig(lr=1e-3, clip_grad=0.5, clip_mode="part", layer_decay=0.9),
    train=TrainConfig(
        steps=STEPS, global_batch_size=IMAGES, micro_batch_size=IMAGES, accumulation=1, workers=1, zero_stage=0,
        checkpoint_every=STEPS,
    ),
)  # fmt: skip


def batch_of(step: int) -> dict[str, Tensor]:
    """This rank's part of the step's images."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"global_1": (IMAGES, 3, 16, 16), "global_2": (IMAGES, 3, 16, 16), "local": (2, IMAGES, 3, 8, 8)}
    batch = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    rank, world_size = dist.get_rank(), dist.get_world_size()
    own = slice(rank * IMAGES // world_size, (rank + 1) * IMAGES // world_size)
    batch = {name: views[:, own] if name == "local" else views[own] for name, views in batch.items()}
    return batch | {"seed": torch.arange(IMAGES)[own] + 100 * step}


def trained(stage: int, **config: Any) -> dict[str, Any]:
    """Losses and gradient norms of some steps, and what student, teacher and anchor have become."""
    world_size = dist.get_world_size()
    sizes = {"micro_batch_size": IMAGES // world_size, "workers": world_size, "zero_stage": stage}
    recipe = replace(RECIPE, objective=replace(RECIPE.objective, **config), train=replace(RECIPE.train, **sizes))
    torch.manual_seed(0)
    objective = build_objective(recipe)
    engine = Engine(objective, recipe, torch.device("cpu"))
    objective.begin(engine.read_weights)
    found: dict[str, Any] = {"steps": []}
    for step in range(STEPS):
        engine.set_schedule(1e-3, 0.05, step)
        result = engine.step([batch_of(step)], Progress(step, STEPS))
        values = result.mean_over_ranks()
        assert result.applied
        wanted = {"loss", "koleo", "ibot", "dino_local", "gram", "gram_drift"}
        found["steps"].append({key: values[key] for key in values if key in wanted or key.startswith("grad_norm")})
    names, parameters = zip(*objective.named_parameters(), strict=True)
    weights = dict(zip(names, engine.read_weights(list(parameters)), strict=True)) | objective.extra_state()
    return found | {"weights": {name: float(value.double().norm()) for name, value in weights.items()}}


def golden_step_of_an_engine() -> dict[str, float]:
    """The authors' step through DeepSpeed: loss and gradient norms of the parts."""
    objective, batch = golden_step()
    recipe = replace(
        RECIPE, objective=objective.config, train=replace(RECIPE.train, global_batch_size=2, micro_batch_size=2)
    )
    result = Engine(objective, recipe, torch.device("cpu")).step([batch], LATE)
    return result.mean_over_ranks()


def one_rank() -> dict[str, Any]:
    return {"golden": golden_step_of_an_engine(), "stage_0": trained(0)}


def both_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {"sinkhorn": []}
    for split in SPLITS:
        logits = wave([sum(split), 24], 0.53, 0.0117, 1)
        own = sinkhorn_knopp(logits.split(split)[dist.get_rank()], 0.07)
        parts: list[Any] = [None, None]
        dist.all_gather_object(parts, own.tolist())
        found["sinkhorn"].append([*parts[0], *parts[1]])
    features = wave([6, 16], 0.61, 0.0191, 1)
    for group in (6, 3):
        own = features.chunk(2)[dist.get_rank()].clone().requires_grad_()
        loss = koleo(own, group_size=group).loss
        loss.backward()
        parts = [None, None]
        dist.all_gather_object(parts, (loss.item(), own.grad.tolist()))  # type: ignore[union-attr]
        found[f"koleo_{group}"] = parts
    found["without_masks"] = [trained(stage, mask_share=0.0)["steps"] for stage in (0, 3)]
    return found | {f"stage_{stage}": trained(stage) for stage in range(4)}


@pytest.fixture(scope="module")
def two(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = run_on_ranks(2, both_ranks)
    return found


@pytest.fixture(scope="module")
def one(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    found: dict[str, Any] = run_on_ranks(1, one_rank)
    return found


@pytest.mark.parametrize("case", range(len(SPLITS)), ids=map(str, SPLITS))
def test_sinkhorn__rows_of_two_ranks_are_those_of_one(case: int, two: dict[str, Any]) -> None:
    whole = sinkhorn_knopp(wave([sum(SPLITS[case]), 24], 0.53, 0.0117, 1), 0.07)
    torch.testing.assert_close(torch.tensor(two["sinkhorn"][case]), whole, rtol=1e-5, atol=1e-7)


def test_koleo__golden_of_two_ranks(two: dict[str, Any]) -> None:
    """Losses of the ranks, and the mean of their gradients, which is that of one process."""
    golden = GOLDEN["koleo_two_ranks"]
    losses, gradients = zip(*two["koleo_6"], strict=True)
    assert losses == pytest.approx(golden["rank_losses_global"], rel=1e-5)
    norms = [torch.tensor(gradient).norm().item() for gradient in gradients]
    assert norms == pytest.approx(golden["rank_grad_norms_global"], rel=1e-4)
    features = wave([6, 16], 0.61, 0.0191, 1).requires_grad_()
    koleo(features).loss.backward()
    assert features.grad is not None
    mean = torch.tensor([row for gradient in gradients for row in gradient]) / 2
    torch.testing.assert_close(mean, features.grad, rtol=1e-4, atol=1e-6)
    losses, _ = zip(*two["koleo_3"], strict=True)
    assert losses == pytest.approx(golden["group_size_3_rank_losses"], rel=1e-5)


@pytest.mark.integration
def test_step__golden_through_an_engine(one: dict[str, Any]) -> None:
    found, golden = one["golden"], GOLDEN["end_to_end_step"]
    assert found["loss"] == pytest.approx(golden["total_loss"], rel=1e-5)
    names = {"backbone": "backbone", "head": "dino_head", "patch_head": "ibot_head"}
    norms = {part: found[f"grad_norm/{part}"] for part in names}
    assert norms == pytest.approx({part: golden["grad_norm"][name] for part, name in names.items()}, rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize("stage", range(4))
def test_training__two_ranks_give_what_one_process_gives(stage: int, two: dict[str, Any], one: dict[str, Any]) -> None:
    """Every loss, KoLeo over both ranks, clipping by part, frozen prototypes, the teacher, and an anchor that moves."""
    found, one = two[f"stage_{stage}"], one["stage_0"]
    for ours, wanted in zip(found["steps"], one["steps"], strict=True):
        assert {"grad_norm/backbone", "grad_norm/head", "grad_norm/patch_head"} <= wanted.keys()
        assert ours == pytest.approx(wanted, rel=3e-4, abs=1e-6)
    assert found["weights"] == pytest.approx(one["weights"], rel=2e-5, abs=1e-6)
    assert one["steps"][0]["gram_drift"] == 0 < one["steps"][1]["gram_drift"]  # the anchor is the teacher at the start


@pytest.mark.integration
def test_training__without_a_masked_patch_every_part_takes_its_step(two: dict[str, Any]) -> None:
    """Also in stage 3, where a head that nobody calls would leave ranks waiting for one another."""
    whole, cut = two["without_masks"]
    assert len(cut) == STEPS and all(step["ibot"] == 0 == step["grad_norm/patch_head"] for step in cut)
    for ours, wanted in zip(cut, whole, strict=True):
        assert ours == pytest.approx(wanted, rel=3e-4, abs=1e-6)
