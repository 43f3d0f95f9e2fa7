"""DeepSpeed under the loop: ZeRO stages and bf16 against one plain PyTorch loop, with two gloo ranks."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine, deepspeed_config, init_distributed, set_matmul_precision
from pretrain.training.model import build_objective
from pretrain.training.schedules import learning_rate, weight_decay
from tests.engine_weights import exported_now

STEPS, MICRO, ACCUMULATION, RANKS = 4, 4, 2, 2
RECIPE = Recipe(
    name="engine",
    objective=MAEConfig(decoder_dim=48, decoder_depth=1, decoder_heads=3),
    backbone=ImageConfig("vit_tiny_patch16_224", 32, 8, options={"depth": 2, "embed_dim": 48, "num_heads": 3}),
    data=DataConfig(train="unused"),
    optimizer=OptimizerConfig(lr=1e-3, warmup_steps=1, layer_decay=0.9, clip_grad=0.5, weight_decay_end=0.2),
    train=TrainConfig(
        steps=STEPS,
        global_batch_size=MICRO * ACCUMULATION * RANKS,
        micro_batch_size=MICRO,
        accumulation=ACCUMULATION,
        zero_stage=1,
        checkpoint_every=STEPS,
    ),
)


def _batches(step: int, rank: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    images = torch.randint(0, 256, (ACCUMULATION, MICRO, 3, 32, 32), dtype=torch.uint8, generator=generator)
    seeds = torch.randint(0, 2**62, (ACCUMULATION, MICRO), generator=generator)
    return [{"image": image, "seed": seed} for image, seed in zip(images, seeds, strict=True)]


def _train(engine: Engine, recipe: Recipe, first: int, last: int) -> list[list[float]]:
    seen = []
    for step in range(first, last):
        engine.set_schedule(learning_rate(recipe).at(step), weight_decay(recipe).at(step))
        output = engine.step(_batches(step, dist.get_rank()), Progress(step, STEPS))
        loss = output.loss.clone()
        dist.all_reduce(loss)
        seen.append([float(loss) / RANKS, float(output.metrics["grad_norm"])])
        parts = torch.stack([output.metrics[f"grad_norm/{part}"] for part in ("backbone", "decoder")])
        assert output.applied
        torch.testing.assert_close(parts.norm(), output.metrics["grad_norm"])
    return seen


def _is_skipped_whole(engine: Engine, recipe: Recipe) -> bool:
    """One rank has one micro-batch with a loss that is not a number: nobody's weights move, the next step works."""
    poisoned = _batches(9, dist.get_rank())
    if dist.get_rank() == dist.get_world_size() - 1:
        poisoned[0]["image"] = torch.full((MICRO, 3, 32, 32), torch.nan)
    before = exported_now(engine)
    skipped = engine.step(poisoned, Progress(STEPS, STEPS, is_logged=False))
    unmoved = exported_now(engine)
    applied = engine.step(_batches(9, dist.get_rank()), Progress(STEPS, STEPS, is_logged=False))
    after = exported_now(engine)
    return (
        not skipped.applied
        and skipped.bad_ranks == (dist.get_world_size() - 1,)
        and applied.applied
        and applied.bad_ranks == ()
        and all(torch.equal(before[name], unmoved[name]) for name in before)
        and any(not torch.equal(before[name], after[name]) for name in before)
        and all(tensor.isfinite().all() for tensor in after.values())
    )


SETTINGS = {
    f"{precision}-{stage}": replace(RECIPE, train=replace(RECIPE.train, zero_stage=stage, precision=precision))
    for precision, stages in (("fp32", (0, 1, 2, 3)), ("bf16", (1, 3)))
    for stage in stages
}


def _every_setting(directory: Path) -> dict[str, Any]:
    work = _one_setting if dist.get_world_size() == RANKS else _continued_alone
    return {name: work(recipe, directory / name) for name, recipe in SETTINGS.items()}


def _one_setting(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Half the steps, save, the other half; then load into a fresh engine and do the other half again."""
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    before = exported_now(engine)
    seen = _train(engine, recipe, 0, STEPS // 2)
    engine.save(directory)
    half = exported_now(engine)
    seen += _train(engine, recipe, STEPS // 2, STEPS)
    after = exported_now(engine)
    captions = sorted(engine.pictures(_batches(0, 0)[0]))

    torch.manual_seed(1)  # other initial weights: all must come from the file
    again = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    again.load(directory)
    restored, optimizer_steps = exported_now(again), again.optimizer_steps
    repeated = _train(again, recipe, STEPS // 2, STEPS)
    repeated_weights = exported_now(again)
    return {
        "seen": seen,
        "repeated": repeated,
        "optimizer_steps": optimizer_steps,
        "restored": all(torch.equal(half[name], restored[name]) for name in half),
        "moved": sum(not torch.equal(before[name], after[name]) for name in before),
        "dtypes": sorted({str(tensor.dtype) for tensor in after.values()}),
        "repeated_weights": all(torch.equal(tensor, repeated_weights[name]) for name, tensor in after.items()),
        "skipped": _is_skipped_whole(again, recipe),
        "captions": captions,
        "norm": float(sum(tensor.square().sum() for tensor in after.values())),
    }


def _continued_alone(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """The second half again in one process, which takes the micro-batches of both ranks."""
    recipe = replace(recipe, train=replace(recipe.train, workers=1, accumulation=ACCUMULATION * RANKS))
    torch.manual_seed(2)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    engine.load_resharded(directory, directory.with_name(f"{directory.name}-scratch"))
    seen = []
    for step in range(STEPS // 2, STEPS):
        engine.set_schedule(learning_rate(recipe).at(step), weight_decay(recipe).at(step))
        batches = [batch for rank in range(RANKS) for batch in _batches(step, rank)]
        output = engine.step(batches, Progress(step, STEPS))
        seen.append([float(output.loss), float(output.metrics["grad_norm"])])
    weights = exported_now(engine)
    return {
        "seen": seen,
        "optimizer_steps": engine.optimizer_steps,
        "norm": float(sum(tensor.square().sum() for tensor in weights.values())),
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any], directory: Path) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting, directory)


@pytest.fixture(scope="module")
def alone(run_on_ranks: Callable[..., Any], directory: Path, found: dict[str, Any]) -> dict[str, Any]:
    return run_on_ranks(1, _every_setting, directory)


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    """The same four steps in one process: AdamW, global-norm clipping, the mean over all micro-batches."""
    torch.manual_seed(0)
    objective = build_objective(RECIPE)
    optimizer = torch.optim.AdamW(objective.param_groups(0.05, 0.9), lr=1.0, betas=(0.9, 0.95))
    decays = [group["weight_decay"] > 0 for group in optimizer.param_groups]
    seen = []
    for step in range(STEPS):
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["lr"] = learning_rate(RECIPE).at(step) * group["lr_scale"]
            group["weight_decay"] = weight_decay(RECIPE).at(step) if decay else 0.0
        batches = [batch for rank in range(RANKS) for batch in _batches(step, rank)]
        loss = torch.stack([objective(batch, Progress(step, STEPS)).loss for batch in batches]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), 0.5)
        optimizer.step()
        seen.append([loss.item(), norm.item()])
    weights = objective.backbone.timm_state_dict()
    return {"seen": seen, "norm": float(sum(tensor.square().sum() for tensor in weights.values()))}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engine__zero_stages_equal_a_plain_loop(stage: int, found: dict[str, Any], plain: dict[str, Any]) -> None:
    result = found[f"fp32-{stage}"]
    torch.testing.assert_close(torch.tensor(result["seen"]), torch.tensor(plain["seen"]), rtol=2e-5, atol=0)
    assert result["norm"] == pytest.approx(plain["norm"], rel=1e-6)


@pytest.mark.parametrize("setting", SETTINGS)
def test_engine__saved_state_continues_bit_exactly(setting: str, found: dict[str, Any]) -> None:
    result = found[setting]
    assert result["restored"] and result["repeated_weights"]
    assert result["repeated"] == result["seen"][STEPS // 2 :]
    assert result["optimizer_steps"] == STEPS // 2
    assert result["moved"] > 20


@pytest.mark.parametrize("setting", SETTINGS)
def test_engine__skips_a_step_with_a_non_finite_loss_on_all_ranks(setting: str, found: dict[str, Any]) -> None:
    assert found[setting]["skipped"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_engine__goes_on_with_another_number_of_ranks(
    setting: str, found: dict[str, Any], alone: dict[str, Any]
) -> None:
    before, after = found[setting], alone[setting]
    tolerance = 3e-2 if setting.startswith("bf16") else 2e-5
    both = torch.tensor(after["seen"]), torch.tensor(before["seen"][STEPS // 2 :])
    torch.testing.assert_close(*both, rtol=tolerance, atol=0)
    assert after["norm"] == pytest.approx(before["norm"], rel=1e-3 if setting.startswith("bf16") else 1e-6)
    assert after["optimizer_steps"] == STEPS


@pytest.mark.parametrize("stage", [1, 3])
def test_engine__bf16_stays_close_and_exports_fp32_master(
    stage: int, found: dict[str, Any], plain: dict[str, Any]
) -> None:
    result = found[f"bf16-{stage}"]
    torch.testing.assert_close(torch.tensor(result["seen"]), torch.tensor(plain["seen"]), rtol=3e-2, atol=0)
    assert result["dtypes"] == ["torch.float32"]
    assert result["norm"] == pytest.approx(plain["norm"], rel=1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_engine__pictures_under_every_partitioning(stage: int, found: dict[str, Any]) -> None:
    assert found[f"fp32-{stage}"]["captions"] == ["masked", "original", "reconstruction"]


def test_deepspeed_config__raw_keys_are_merged_last() -> None:
    recipe = replace(RECIPE, deepspeed={"zero_optimization": {"overlap_comm": False}, "wall_clock_breakdown": True})
    config = deepspeed_config(recipe, torch.device("cuda"))
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["zero_optimization"]["stage"] == RECIPE.train.zero_stage
    assert config["wall_clock_breakdown"] is True
    assert copy.deepcopy(recipe.deepspeed)["zero_optimization"] == {"overlap_comm": False}  # the recipe is not changed


def test_deepspeed_config__gradients_travel_during_the_backward_pass_on_gpus() -> None:
    on = {device: deepspeed_config(RECIPE, torch.device(device))["zero_optimization"] for device in ("cpu", "cuda")}
    assert on["cuda"]["overlap_comm"] is True and "overlap_comm" not in on["cpu"]


def test_set_matmul_precision__is_of_gpus_only() -> None:
    before, found = torch.get_float32_matmul_precision(), []
    try:
        for device, tf32 in (("cpu", True), ("cuda", True), ("cuda", False)):
            recipe = replace(RECIPE, train=replace(RECIPE.train, tf32=tf32))
            set_matmul_precision(recipe, torch.device(device))
            found.append(torch.get_float32_matmul_precision())
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == [before, "high", "highest"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: NCCL and CUDA tensors")
def test_engine__runs_on_cuda() -> None:
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611"}
    os.environ.update(place)
    device = torch.device("cuda", 0)
    init_distributed(device)
    recipe = replace(
        RECIPE, train=replace(RECIPE.train, workers=1, global_batch_size=MICRO * ACCUMULATION, precision="bf16")
    )
    engine = Engine(build_objective(recipe), recipe, device)
    engine.set_schedule(1e-3, 0.05)
    batches = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in _batches(0, 0)]
    assert torch.isfinite(engine.step(batches, Progress(0, STEPS)).loss)
    dist.destroy_process_group()
