"""What a stage takes, as it is foreseen, beside what autograd keeps and engines write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones.images.config import ImageConfig
from data_pipelines.views.specs import views_from
from objectives import registry
from objectives.base import Objective, Progress
from objectives.distributed import foreseen_ranks, gather_rows, gather_rows_with_gradient, num_ranks
from objectives.errors import ObjectiveError
from pretrain.config.load import load_plan
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.memory import memory_of
from pretrain.training.model import build_objective
from pretrain.training.outlook import Outlook, look_at
from tests.small_objectives import SMALL, backbone_of, kind_of, with_frozen_teacher

RANKS, MICRO = 2, 4
SETTINGS = [("fp32", 0), ("bf16", 1), ("fp32", 2), ("bf16", 3)]


def recipe_of(name: str, precision: str = "fp32", stage: int = 0, **settings: Any) -> Recipe:
    depth = {"depth": 4} | ({"class_token": False, "final_norm": False} if name == "selfpatch" else {})
    is_of_images = kind_of(name) == "image"
    sizes = {"steps": 4, "global_batch_size": RANKS * MICRO, "micro_batch_size": MICRO, "workers": RANKS}
    return Recipe(
        name="foreseen",
        objective=registry.config_class(name)(**SMALL[name] | settings),
        backbone=ImageConfig("vit_tiny_patch16_224", 32, 8, options=depth) if is_of_images else backbone_of(name),
        data=DataConfig(train="shards"),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(**sizes, accumulation=1, zero_stage=stage, precision=precision, checkpoint_every=4),  # type: ignore[arg-type]
    )


def outlook_of(recipe: Recipe) -> Outlook:
    with torch.device("meta"):
        objective = with_frozen_teacher(build_objective(recipe))
    return look_at(recipe, objective)


def batch_of(objective: Objective) -> dict[str, Tensor]:
    """As a stream gives it."""
    torch.manual_seed(0)
    batch = {"seed": torch.arange(MICRO), "sample_id": torch.arange(MICRO)}
    for view in views_from(objective.views()):
        shapes = view.shapes(objective.backbone.channels_of(view.kind))
        assert shapes is not None
        for name, (shape, dtype) in shapes.items():
            whole = (*([] if view.times is None else [view.times]), MICRO, *shape)
            values = torch.rand(whole)
            batch[name] = values if dtype.is_floating_point else (values * 255).to(dtype)
    return batch


@pytest.mark.parametrize("name", SMALL)
def test_activations__are_what_autograd_keeps_of_a_real_step(name: str) -> None:
    recipe = recipe_of(name)
    torch.manual_seed(0)
    objective = with_frozen_teacher(build_objective(recipe))
    batch = batch_of(objective)
    weights = {tensor.data_ptr() for tensor in [*objective.parameters(), *objective.buffers()]}
    kept = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in batch.values()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            held.append(tensor)  # so that no other takes its place
        return tensor

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = objective(batch, Progress(3, 4, is_logged=False))
    assert output.loss.isfinite()
    # SiT compares with what it gathers of the other rank, too.
    assert outlook_of(recipe).activations == pytest.approx(sum(kept.values()), rel=1e-3 if name == "sit" else 0)


def test_activations__of_blocks_that_are_computed_again_are_their_inputs_and_one_block() -> None:
    recipe = recipe_of("gmml")
    tokens = 4 * 2 * MICRO * 17 * 192  # bytes between two blocks, of two views

    def kept(depth: int, checkpoint_blocks: bool) -> int:
        train = replace(recipe.train, checkpoint_blocks=checkpoint_blocks)
        deep = replace(recipe, train=train, backbone=replace(recipe.backbone, options={"depth": depth}))
        return outlook_of(deep).activations or 0

    block = (kept(6, False) - kept(3, False)) // 3
    assert block > 15 * tokens
    assert kept(6, True) == kept(6, False) - 5 * (block - tokens)


def test_activations__of_the_largest_views_count() -> None:
    plain, large = (
        outlook_of(recipe_of("dinov3")),
        outlook_of(recipe_of("dinov3", mix_share=[1.0], mix_global=[64], mix_local=[24])),
    )
    mixed = outlook_of(recipe_of("dinov3", mix_share=[0.25, 0.25], mix_global=[64, 16], mix_local=[24, 24]))
    assert [shown.share for shown in mixed.shown] == [0.5, 0.25, 0.25]
    assert [shown.tokens for shown in mixed.shown] == [2 * 17 + 2 * 10, 2 * 65 + 2 * 10, 2 * 5 + 2 * 10]
    assert mixed.tokens_per_step == 8 * (0.5 * 54 + 0.25 * 150 + 0.25 * 30)
    assert plain.activations is not None and mixed.activations == large.activations is not None
    assert 2.5 < mixed.activations / plain.activations < 3  # tokens: 150 / 54


def test_activations__of_views_that_are_larger_in_one_thing_only() -> None:
    """More local crops, or larger global ones: neither covers the other, so both are looked at."""
    wide = outlook_of(recipe_of("dinov3", mix_share=[0.5], mix_global=[40], mix_local=[16]))
    alone = [
        outlook_of(recipe_of("dinov3", mix_share=[1.0], mix_global=[40], mix_local=[16])),
        outlook_of(recipe_of("dinov3")),
    ]
    assert wide.activations == max(look.activations or 0 for look in alone)


def test_in_all__is_the_fullest_moment_of_a_step() -> None:
    """Activations are gone when the optimizer steps, which needs more where they are few."""
    look = outlook_of(recipe_of("dino", "bf16", 1))
    memory, lasting = look.chosen, look.chosen.weights + look.chosen.optimizer + look.chosen.companions
    assert memory is look.memory[1] and look.activations is not None
    assert look.in_all(1) == lasting + memory.backward + look.activations
    few = replace(look, memory=(replace(memory, update=10**12),) * 4)
    assert few.in_all(1) == lasting + 10**12
    assert replace(look, activations=None).in_all(1) == memory.total


def test_memory__of_a_7b_model_on_256_gpus() -> None:
    """In bf16 and ZeRO 3: masters and moments are shared by all, and so are teacher and anchor in float32."""
    _, second, _ = load_plan("dinov3_vit7b", ["data.root=unused"], check_files=False).stages
    with torch.device("meta"):
        objective = build_objective(second.recipe)
    numbers = sum(parameter.numel() for parameter in objective.parameters())
    assert 7.0e9 < numbers < 7.2e9
    memory = memory_of(second.recipe, objective, torch.device("cuda"))
    assert memory.companions == pytest.approx(4 * (2 * numbers - 0.31e9) / 256, rel=0.01)  # the anchor has no heads
    assert memory.optimizer == pytest.approx(12 * numbers / 256, rel=0.01)
    assert memory.total - memory.companions < 4e9


def _save(folder: Path) -> dict[str, int]:
    """Bytes that engines save after a step."""
    found = {}
    for precision, stage in SETTINGS:
        recipe = recipe_of("dino", precision, stage)
        torch.manual_seed(0)
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        engine.set_schedule(1e-4, 0.05, 0)
        batch = batch_of(engine.objective)
        assert engine.step([batch], Progress(0, 4, is_logged=False)).applied
        saved = folder / f"{precision}-{stage}"
        engine.save(saved)
        dist.barrier()
        found[saved.name] = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
        engine.close()
    return found


@pytest.mark.integration
def test_state_bytes__are_what_engines_save(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """But for buffers and companions, which others write; each file tells beside its numbers what they are."""
    saved = run_on_ranks(RANKS, _save, tmp_path)
    for precision, stage in SETTINGS:
        look = outlook_of(recipe_of("dino", precision, stage))
        foreseen = look.state_bytes - 4 * look.counted.saved
        assert saved[f"{precision}-{stage}"] == pytest.approx(foreseen, rel=0.03, abs=2e5), (precision, stage)


def test_foreseen_ranks__give_the_shapes_of_what_is_gathered() -> None:
    rows = torch.ones(3, 2, requires_grad=True)
    with foreseen_ranks(4):
        assert num_ranks() == 4
        assert gather_rows(rows).shape == gather_rows_with_gradient(rows).shape == (12, 2)
    assert num_ranks() == 1 and gather_rows_with_gradient(rows) is rows


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"koleo_group": 12},
            "objective.koleo_group=12: it has to be a multiple of the 4 images of a micro-batch that",
        ),
        ({"koleo_group": 16}, "that divides the 8 of all ranks"),
        ({"koleo_neighbors": 4}, "objective.koleo_weight: 4 images have no 4 others"),
    ],
)
def test_look_at__a_first_step_that_would_fail_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ObjectiveError) as refused:
        outlook_of(recipe_of("dinov3", **settings))
    assert said in str(refused.value)
    assert outlook_of(recipe_of("dinov3", koleo_group=8)).activations


def test_look_at__views_that_patches_do_not_tile_are_refused_also_mixed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of("mae")
    kind = registry.load("mae")
    monkeypatch.setattr(kind, "mixed_views", lambda _: [(0.5, [{"name": "image", "size": 36}])])
    with pytest.raises(ObjectiveError, match=r"view 'image' is of 36 px: .*not a multiple of patch_size 8"):
        outlook_of(recipe)


def test_look_at__an_objective_that_looks_at_numbers_has_no_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = registry.load("mae")
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, batch, progress: batch["seed"][0].item() or forward)
    look = outlook_of(recipe_of("mae"))
    assert look.activations is None and look.shown[0].tokens == 17
    assert {field.name for field in fields(look.counted)} >= {"parts", "frozen"} and look.counted.trained > 1e6
