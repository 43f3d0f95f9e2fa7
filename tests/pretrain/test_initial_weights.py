"""Initial weights that are dropped, but for a share, and brought back: the same numbers, in less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from backbones.images.config import ImageConfig
from objectives.base import Objective
from objectives.dinov3.config import DINOv3Config
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.initial_weights import InitialWeights, initial_weights
from pretrain.training.model import build_objective

CPU = torch.device("cpu")
RANKS = 2
LITTLE = 300_000  # bytes; the model has 5 million
OPTIONS = {"depth": 2, "embed_dim": 192, "num_heads": 3}


def recipe_of(stage: int = 0, **backbone: Any) -> Recipe:
    sizes = {"num_prototypes": 512, "patch_num_prototypes": 512, "head_hidden_dim": 128, "patch_head_hidden_dim": 128}
    return Recipe(
        name="built",
        objective=DINOv3Config(local_size=16, num_local=2, gram_weight=1.0, gram_from="teacher", **sizes),  # type: ignore[arg-type]
        backbone=ImageConfig("vit_small_patch16_dinov3", 32, options=OPTIONS, **backbone),
        data=DataConfig(train="shards"),
        optimizer=OptimizerConfig(lr=1e-3),
        train=TrainConfig(
            steps=2, global_batch_size=2 * RANKS, micro_batch_size=2, accumulation=1, workers=RANKS,
            checkpoint_every=2, zero_stage=stage,
        ),
    )  # fmt: skip


def parameters_of(objective: Objective) -> Iterator[Tensor]:
    yield from objective.parameters()
    for companion in objective.companions().values():
        yield from companion.module.parameters()


def is_here(tensor: Tensor) -> bool:
    return tensor.untyped_storage().nbytes() > 0


@pytest.mark.parametrize("init", ["timm", "mae"])
def test_a_model__has_the_numbers_that_it_has_without(init: str) -> None:
    """Student, teacher and anchor, and whatever is drawn afterwards."""
    torch.manual_seed(0)
    plain = build_objective(recipe_of(init=init))
    after = torch.rand(5)
    torch.manual_seed(0)
    with InitialWeights(CPU, budget=LITTLE):
        built = build_objective(recipe_of(init=init))
        parameters = list(parameters_of(built))
        in_memory = sum(tensor.numel() * 4 for tensor in parameters if is_here(tensor))
        total = sum(tensor.numel() * 4 for tensor in parameters)
        drawn = torch.rand(5)
    assert torch.equal(drawn, after)
    assert in_memory < total / 6 and total > 10 * LITTLE
    found, expected = list(parameters_of(built)), list(parameters_of(plain))
    assert len(found) == len(expected)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def _drawn(parameter: nn.Parameter) -> None:
    nn.init.trunc_normal_(parameter, std=0.02)


CHANGES: dict[str, Callable[[nn.Parameter], Any]] = {
    "scaled": lambda p: p.data.div_(3.0).add_(0.5),
    "a view": lambda p: nn.init.xavier_uniform_(p.data.view(128, -1)),
    "a row": lambda p: p.data[3].normal_(),
    "a row that is set": lambda p: p.data[3].copy_(torch.arange(160.0)),
    "by a tensor": lambda p: p.data.mul_(torch.arange(160.0)),
    "a small number": lambda p: p.data.bernoulli_(0.25),
    "nothing": lambda p: p,
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_parameter__comes_back_after_any_change(change: str) -> None:
    def made() -> tuple[nn.Parameter, nn.Parameter, Tensor, Tensor]:
        torch.manual_seed(7)
        first = nn.Parameter(torch.empty(128, 160), requires_grad=False)
        _drawn(first)
        CHANGES[change](first)
        twin = copy.deepcopy(first)
        twin.data[0].zero_()  # of the twin alone
        others = nn.Parameter(torch.empty(128, 160))
        _drawn(others)
        return first, twin, others.detach() + first, first.sum()

    expected = made()
    with InitialWeights(CPU, budget=0):
        found = made()
        twin = found[1].detach().clone()  # of one that is dropped, which is read first when the context is over
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(twin, expected[1])


def test_a_parameter__that_is_overwritten_comes_back() -> None:
    with InitialWeights(CPU, budget=0):
        parameter = nn.Parameter(torch.empty(300, 300))
        nn.init.normal_(parameter)
        nn.init.zeros_(nn.Parameter(torch.empty(300, 300)))  # touched later
        assert not is_here(parameter)
        parameter.data.copy_(torch.ones(300, 300))
    assert parameter.eq(1).all()


def test_initial_weights__where_they_stay_nothing_is_dropped() -> None:
    assert isinstance(initial_weights(0, CPU), nullcontext)
    assert isinstance(initial_weights(3, CPU), nullcontext)  # one rank has all of them
    assert isinstance(initial_weights(0, torch.device("cuda")), InitialWeights)  # they leave the host


def _built_in_both_ways(weights: Path) -> dict[str, Any]:
    """Whether student, teacher and anchor are the same under ZeRO-3, and how much of them was whole at a time."""
    held: list[list[Tensor]] = []
    for budget in (None, LITTLE):
        torch.manual_seed(0)
        with InitialWeights(CPU, budget=budget) if budget else nullcontext():
            objective = build_objective(recipe_of(3))
            anchor = objective.companions()["gram"]
            anchor.load(weights)
            if budget:
                is_dropped = not all(is_here(parameter) for parameter in anchor.module.parameters())
            engine = Engine(objective, recipe_of(3), CPU)
        shares = [parameter.ds_tensor.clone() for parameter in objective.parameters()]  # type: ignore[attr-defined]
        for companion in objective.companions().values():
            shares += [companion.share_of(parameter).clone() for parameter in companion.module.parameters()]
        held.append([*shares, torch.rand(3), *engine.read_weights(list(objective.parameters()))])
        engine.close()
    same = [torch.equal(a, b) for a, b in zip(*held, strict=True)]
    dist.barrier()
    return {"same": all(same), "number": len(same), "dropped": is_dropped}


@pytest.mark.integration
def test_engine__cuts_what_is_not_in_memory(run_on_ranks: Callable[..., Any], tmp_path: Path) -> None:
    """In ZeRO stage 3, weights from a checkpoint included."""
    torch.manual_seed(3)
    weights = build_objective(recipe_of()).backbone.weights()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, tmp_path / "anchor.safetensors")
    found = run_on_ranks(RANKS, _built_in_both_ways, tmp_path / "anchor.safetensors")
    assert found["same"] and found["dropped"] and found["number"] > 100
