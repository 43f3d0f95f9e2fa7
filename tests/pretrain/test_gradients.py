"""Gradients between backward pass and update: their mean over two gloo ranks, and their norms in every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from backbones.images.config import ImageConfig
from objectives.base import Progress
from objectives.mae.config import MAEConfig
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine, deepspeed_config
from pretrain.training.gradients import Gradients
from pretrain.training.model import build_objective

RANKS, MICRO = 2, 2
SETTINGS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 3)]
RECIPE = Recipe(
    name="gradients",
    objective=MAEConfig(decoder_dim=24, decoder_depth=1, decoder_heads=2),
    # 5 x 5 pixels of 3 channels: the last layer has an odd number of outputs, which no two ranks share evenly.
    backbone=ImageConfig("vit_tiny_patch16_224", 20, 5, options={"depth": 1, "embed_dim": 24, "num_heads": 2}),
    data=DataConfig(train="unused"),
    optimizer=OptimizerConfig(lr=1e-3),
    train=TrainConfig(
        steps=1,
        global_batch_size=MICRO * RANKS,
        micro_batch_size=MICRO,
        accumulation=1,
        workers=RANKS,
        zero_stage=1,
        checkpoint_every=1,
    ),
)


class _Model(nn.Module):
    """Three parameters in two parts; one of them is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 2), nn.Linear(2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        used: torch.Tensor = self.second(x @ self.first.weight.T)
        return used.sum()


def _part_of(name: str) -> str:
    return name.partition(".")[0]


def _averaged(bucket_elements: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = _Model()
    model(torch.full((4, 3), 1.0 + dist.get_rank())).backward()
    own = [None if parameter.grad is None else parameter.grad.clone() for parameter in model.parameters()]
    gradients = Gradients(model, _part_of, 0, bucket_elements)
    gradients.average()
    found = [parameter.grad for parameter in model.parameters()]
    # Gradients are proportional to the input, which is 1 on the first rank and 2 on the second.
    expected = [
        torch.zeros_like(parameter) if gradient is None else gradient * 1.5 / (1 + dist.get_rank())
        for parameter, gradient in zip(model.parameters(), own, strict=True)
    ]
    norms = gradients.norms()
    return {
        "unused": [gradient is None for gradient in own],
        "equal": [torch.allclose(mean, right) for mean, right in zip(found, expected, strict=True)],
        "norms": {name: float(norm) for name, norm in norms.items()},
        "expected": {
            "grad_norm": float(torch.cat([right.flatten() for right in expected]).norm()),
            "grad_norm/first": float(expected[0].norm()),
            "grad_norm/second": float(expected[2].norm()),
        },
    }


def _one_by_one(engine: Engine) -> dict[str, float]:
    """The norms from the whole gradient of each parameter, as DeepSpeed documents it."""
    from deepspeed.utils import safe_get_full_grad

    squares: dict[str, float] = {"backbone": 0.0, "decoder": 0.0}
    for name, parameter in engine.objective.named_parameters():
        if parameter.requires_grad:
            gradient = parameter.grad if engine.stage == 0 else safe_get_full_grad(parameter)
            squares[name.partition(".")[0]] += float(gradient.double().square().sum())
    parts = {f"grad_norm/{part}": square**0.5 for part, square in squares.items()}
    return {"grad_norm": sum(squares.values()) ** 0.5} | parts


def _every_stage() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for precision, stage in SETTINGS:
        recipe = replace(RECIPE, train=replace(RECIPE.train, zero_stage=stage, precision=precision))
        torch.manual_seed(0)
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        expected: dict[str, float] = {}
        norms_of_step = engine._gradients.norms

        def watched(engine: Engine = engine, norms: Any = norms_of_step, seen: dict[str, float] = expected) -> Any:
            seen.update(_one_by_one(engine))
            return norms()

        engine._gradients.norms = watched  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(dist.get_rank())
        images = torch.randint(0, 256, (MICRO, 3, 20, 20), dtype=torch.uint8, generator=generator)
        metrics = engine.step([{"image": images, "seed": torch.arange(MICRO)}], Progress(0, 1)).metrics
        norms = {name: float(value) for name, value in metrics.items() if name.startswith("grad_norm")}
        found[f"{precision}-{stage}"] = [norms, expected]
    return found


def _clipped_in_every_stage() -> dict[str, Any]:
    """Norms of the parts before and after each is clipped to half of the smaller one."""
    found: dict[str, Any] = {}
    for precision, stage in SETTINGS:
        optimizer = replace(RECIPE.optimizer, clip_grad=1e-3, clip_mode="part")
        train = replace(RECIPE.train, zero_stage=stage, precision=precision)
        recipe = replace(RECIPE, optimizer=optimizer, train=train)
        torch.manual_seed(0)
        engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
        seen: list[dict[str, float]] = []
        clip = engine._gradients.clip_parts

        def watched(norms: Any, bound: float, engine: Engine = engine, seen: Any = seen, clip: Any = clip) -> None:
            clip(norms, bound)
            seen += [{name: float(norm) for name, norm in each.items()} for each in (norms, engine._gradients.norms())]

        engine._gradients.clip_parts = watched  # type: ignore[method-assign]
        images = torch.randint(
            0, 256, (MICRO, 3, 20, 20), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        )
        engine.step([{"image": images, "seed": torch.arange(MICRO)}], Progress(0, 1))
        found[f"{precision}-{stage}"] = seen
    return found


def _everything() -> dict[str, Any]:
    return {
        "averaged": [_averaged(elements) for elements in (1000, 3)],
        "norms": _every_stage(),
        "clipped": _clipped_in_every_stage(),
    }


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any]) -> dict[str, Any]:
    return run_on_ranks(RANKS, _everything)


@pytest.mark.parametrize("case", [0, 1], ids=["one bucket", "several buckets"])
def test_average__is_the_mean_of_all_ranks_and_0_for_what_was_not_used(case: int, found: dict[str, Any]) -> None:
    result = found["averaged"][case]
    assert result["unused"] == [False, True, False]
    assert result["equal"] == [True, True, True]
    assert result["norms"] == pytest.approx(result["expected"], rel=1e-6)


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_norms__of_shares_are_those_of_whole_gradients(setting: str, found: dict[str, Any]) -> None:
    norms, expected = found["norms"][setting]
    assert norms.keys() == expected.keys() == {"grad_norm", "grad_norm/backbone", "grad_norm/decoder"}
    assert norms == pytest.approx(expected, rel=1e-5)
    assert norms["grad_norm"] > 0


@pytest.mark.parametrize(
    ("stage", "clip_grad", "raw", "computes"),
    [
        (1, None, {}, False),
        (2, None, {}, False),
        (1, 1.0, {}, None),
        (3, None, {}, None),
        (0, 1.0, {}, None),
        (1, None, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, None),
    ],
)
def test_deepspeed_config__a_norm_is_taken_twice_only_where_deepspeed_needs_it(
    stage: int, clip_grad: float | None, raw: dict[str, Any], computes: bool | None
) -> None:
    recipe = replace(
        RECIPE,
        optimizer=replace(RECIPE.optimizer, clip_grad=clip_grad),
        train=replace(RECIPE.train, zero_stage=stage),
        deepspeed=raw,
    )
    config = deepspeed_config(recipe, torch.device("cpu"))
    assert config["zero_optimization"].get("compute_grad_norm") is computes
    assert config["gradient_clipping"] == (clip_grad if clip_grad and stage else 0.0)
    by_part = replace(recipe, optimizer=replace(recipe.optimizer, clip_mode="part"))
    assert deepspeed_config(by_part, torch.device("cpu"))["gradient_clipping"] == 0  # or it would clip once more


@pytest.mark.parametrize("setting", [f"{precision}-{stage}" for precision, stage in SETTINGS])
def test_clip_parts__each_part_for_itself(setting: str, found: dict[str, Any]) -> None:
    before, after = found["clipped"][setting]
    parts = {"grad_norm/backbone", "grad_norm/decoder"}
    assert all(before[part] > 1e-3 for part in parts)
    assert {part: after[part] for part in parts} == pytest.approx(dict.fromkeys(parts, 1e-3), rel=5e-3)
