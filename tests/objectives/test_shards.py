"""Companions under ZeRO stage 3: each rank holds a share, and every number is what it is with whole ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor, nn

from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.companions import Companion
from objectives.shards import Shards, units_of
from pretrain.checkpoints.store import TRAINING_STATE, checkpoint_path
from pretrain.config.schema import Recipe
from pretrain.config.stages import Stage
from pretrain.record.run_dir import RunDir
from pretrain.training import state
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.publication import Publisher
from tests.engine_weights import exported_now
from tests.objectives.test_dinov3_ranks import IMAGES, RECIPE, STEPS, batch_of

RANKS, HALF = 2, STEPS // 2
POSITION = SimpleNamespace(epoch=0, position=0)
STREAM: Any = SimpleNamespace(state_at=lambda _: POSITION, order_signature={}, require_order=lambda _: None)


# --- on ranks ---------------------------------------------------------------------------------------------------------


def recipe_of(precision: str) -> Recipe:
    world_size = dist.get_world_size()
    sizes = {"micro_batch_size": IMAGES // world_size, "workers": world_size, "zero_stage": 3}
    return replace(RECIPE, train=replace(RECIPE.train, precision=precision, **sizes))  # type: ignore[arg-type]


@contextmanager
def whole_companions() -> Iterator[None]:
    """In this context an engine leaves companions whole on every rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Companion, "shard", lambda *_: None)
        yield


def built(precision: str, seed: int = 0) -> Engine:
    torch.manual_seed(seed)
    return Engine(build_objective(recipe_of(precision)), recipe_of(precision), torch.device("cpu"))


def step(engine: Engine, number: int) -> dict[str, float]:
    engine.set_schedule(1e-3, 0.05, number)
    result = engine.step([batch_of(number)], Progress(number, STEPS))
    assert result.applied
    return result.mean_over_ranks()


def all_of(engine: Engine) -> dict[str, Tensor]:
    """Student, teacher and anchor, and what is exported, heads included."""
    names, parameters = zip(*engine.objective.named_parameters(), strict=True)
    student = dict(zip(names, engine.read_weights(list(parameters)), strict=True))
    exported = {f"exported.{name}": tensor for name, tensor in exported_now(engine).items()}
    heads = engine.heads()
    assert heads is not None
    exported |= {f"heads.{name}": tensor for name, tensor in heads.tensors.items()}
    return {name: tensor.clone() for name, tensor in {**student, **engine.objective.extra_state(), **exported}.items()}


def ended(engine: Engine, values: list[dict[str, float]]) -> dict[str, Any]:
    tensors = all_of(engine) | engine.pictures(batch_of(0))
    return {"values": values, "tensors": tensors, "held": held_bytes(engine)}


def trained(run_dir: Path | None, precision: str) -> dict[str, Any]:
    """Values of all steps, and what there is in the end; a training state is taken half-way."""
    engine = built(precision)
    engine.objective.begin(engine.read_weights)
    values = [step(engine, number) for number in range(HALF)]
    if run_dir:
        Publisher(RunDir(run_dir), Stage("", recipe_of(precision)), engine, STREAM).take(HALF, is_last=True)
    return ended(engine, values + [step(engine, number) for number in range(HALF, STEPS)])


def resumed(run_dir: Path) -> dict[str, Any]:
    """The second half again, from the training state."""
    engine = built("fp32", seed=1)
    _, found = state.find_start(run_dir, recipe_of("fp32"))
    assert found is not None
    state.restore(found, engine, STREAM, HALF)
    return ended(engine, [step(engine, number) for number in range(HALF, STEPS)])


def held_bytes(engine: Engine) -> int:
    """Of the companions' weights on this rank."""
    held = []
    for companion in engine.objective.companions().values():
        for parameter in companion.module.parameters():
            held += [parameter.data, companion.share_of(parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    return sum(storages.values())


def most_held_bytes(engine: Engine) -> int:
    """The same at the fullest moment of a step."""
    seen: list[int] = []
    for companion in engine.objective.companions().values():
        for module in companion.module.modules():
            module.register_forward_hook(lambda *_: seen.append(held_bytes(engine)))
    step(engine, 0)
    return max(seen)


def unlike(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    return sorted(name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name]))


def on_two_ranks(directory: Path) -> dict[str, Any]:
    runs: dict[str, Any] = {"sharded": trained(directory / "sharded", "fp32"), "sharded bf16": trained(None, "bf16")}
    runs["sharded from sharded"] = resumed(directory / "sharded")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("objectives.shards._LARGE", 1)  # every parameter travels by itself
        runs["one by one from sharded"] = resumed(directory / "sharded")
    most = most_held_bytes(built("fp32"))
    with whole_companions():
        runs |= {"whole": trained(directory / "whole", "fp32"), "whole bf16": trained(None, "bf16")}
        runs["whole from sharded"] = resumed(directory / "sharded")
    folders = [checkpoint_path(directory / way, HALF) / TRAINING_STATE for way in ("sharded", "whole")]
    first, second, all_at_once = (load_file(file) for path in folders for file in sorted(path.glob("objective-*")))
    equal = {
        "sharded": "whole",
        "sharded bf16": "whole bf16",
        "sharded from sharded": "sharded",
        "one by one from sharded": "sharded",
        "whole from sharded": "sharded",
    }
    return {
        "values": {name: run["values"] for name, run in runs.items()},
        "unlike": {name: unlike(runs[name]["tensors"], runs[other]["tensors"]) for name, other in equal.items()},
        "held": {"sharded": runs["sharded"]["held"], "whole": runs["whole"]["held"], "most": most},
        "written_twice": sorted(first.keys() & second.keys()),
        "unlike_files": unlike(first | second, all_at_once),
        "written": [sum(tensor.numel() for tensor in file.values()) for file in (first, second)],
    }


def on_one_rank(directory: Path) -> dict[str, Any]:
    return {"values": resumed(directory / "sharded")["values"]}


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def two(run_on_ranks: Callable[..., Any], directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = run_on_ranks(RANKS, on_two_ranks, directory)
    return found


@pytest.mark.integration
@pytest.mark.parametrize("precision", ["", " bf16"])
def test_shards__a_run_is_bit_for_bit_that_of_whole_companions(precision: str, two: dict[str, Any]) -> None:
    """Losses, gradient norms and health; student, teacher, anchor, export and pictures."""
    sharded, whole = (two["values"][f"{way}{precision}"] for way in ("sharded", "whole"))
    assert sharded == whole and {"loss", "gram", "grad_norm/backbone"} <= sharded[0].keys()
    assert sharded[0]["loss"] != sharded[-1]["loss"]
    assert two["unlike"][f"sharded{precision}"] == []


@pytest.mark.integration
def test_shards__a_training_state_is_the_same_and_goes_on(two: dict[str, Any]) -> None:
    """Each tensor is whole in one rank's file, so either way of holding companions reads it."""
    assert two["written_twice"] == [] and two["unlike_files"] == []
    assert min(two["written"]) > 0.3 * sum(two["written"])
    for again in ("sharded from sharded", "one by one from sharded", "whole from sharded"):
        assert two["values"][again] == two["values"]["sharded"][HALF:]
        assert two["unlike"][again] == []


@pytest.mark.integration
def test_shards__a_training_state_of_two_ranks_goes_on_with_one(
    run_on_ranks: Callable[..., Any], two: dict[str, Any], directory: Path
) -> None:
    values = run_on_ranks(1, on_one_rank, directory)["values"]
    for ours, wanted in zip(values, two["values"]["sharded"][HALF:], strict=True):
        assert ours["loss"] == pytest.approx(wanted["loss"], rel=3e-4)
        assert ours["gram_drift"] == pytest.approx(wanted["gram_drift"], rel=3e-4, abs=1e-6)


@pytest.mark.integration
def test_shards__a_rank_holds_its_share_and_one_unit(two: dict[str, Any]) -> None:
    held = two["held"]
    assert held["sharded"] < 0.55 * held["whole"]  # half, and tokens
    assert held["sharded"] < held["most"] < 0.75 * held["whole"]  # of blocks, heads and an anchor one at a time


def test_units_of__blocks_and_what_a_forward_reads() -> None:
    """What an encoder reads without a `forward` (class token, positions) is in none."""
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options={"depth": 2})
    head = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.MultiheadAttention(4, 1))
    owner = nn.ModuleDict({"backbone": backbone, "head": head})
    names = {module: name for name, module in owner.named_modules()}
    units = [names[unit] for unit in units_of(owner)]
    vit = ("patch_embed.proj", "blocks.0", "blocks.1", "norm")
    assert units == [*(f"backbone.vit.{name}" for name in vit), "head.0", "head.2"]
    covered = {parameter for unit in units_of(owner) for parameter in unit.parameters()}
    left = {name for name, parameter in owner.named_parameters() if parameter not in covered}
    assert left == {"backbone.vit.cls_token", "backbone.vit.pos_embed"}


def test_shards__what_is_not_gathered_reads_as_nan_in_its_shape() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(3, 2).requires_grad_(False)
    x, weight = torch.randn(4, 3), linear.weight.clone()
    expected = linear(x)
    shards = Shards([linear])
    assert linear.weight.shape == (2, 3) and linear.weight.isnan().all()
    assert torch.equal(linear(x), expected) and linear.weight.isnan().all()
    with shards.whole():
        assert torch.equal(linear(x), expected) and torch.equal(linear.weight, weight)
    assert linear.weight.isnan().all() and torch.equal(shards.read([linear.weight])[0], weight)
    with pytest.raises(RuntimeError):
        linear(torch.randn(4, 5))
    assert linear.weight.isnan().all()  # also after a forward that failed
