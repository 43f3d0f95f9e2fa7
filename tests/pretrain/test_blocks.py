"""Blocks that are computed twice or compiled: the same numbers, for every objective, alone and under DeepSpeed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.images.config import ImageConfig
from data_pipelines.views.specs import views_from
from objectives import registry
from objectives.base import Objective, Progress
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training import blocks as blocks_module
from pretrain.training.blocks import compile_blocks, recompute_blocks
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from tests.small_objectives import SMALL as SIZES
from tests.small_objectives import backbone_of, kind_of, with_frozen_teacher

RANKS, MICRO, STEPS = 2, 4, 2
# DINOv3 has a stochastic depth of its own and refuses that of these backbones (tests/objectives/test_dinov3.py).
SMALL = {name: sizes for name, sizes in SIZES.items() if name != "dinov3"} | {
    "mae": SIZES["mae"] | {"decoder_depth": 2}
}
VIT = ImageConfig(
    "vit_tiny_patch16_224", 32, 8, options={"depth": 3, "embed_dim": 48, "num_heads": 3, "drop_path_rate": 0.3}
)
FASTVIT = ImageConfig("fastvit_t8", 64)  # has batch norms in its blocks


def _recipe(name: str, backbone: Any = VIT, **train: Any) -> Recipe:
    sizes = {"steps": STEPS, "global_batch_size": MICRO * RANKS, "micro_batch_size": MICRO, "accumulation": 1}
    settings: dict[str, Any] = {"zero_stage": 1, **sizes, **train}
    return Recipe(
        name="blocks",
        objective=registry.config_class(name)(**SMALL.get(name, {})),
        backbone=backbone if kind_of(name) == "image" else backbone_of(name),
        data=DataConfig(train="unused"),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0),
        train=TrainConfig(**settings, workers=RANKS, checkpoint_every=STEPS),
    )


def _objective(name: str, backbone: ImageConfig = VIT) -> Objective:
    torch.manual_seed(0)
    return with_frozen_teacher(build_objective(_recipe(name, backbone)))


def _batch(objective: Objective, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batch: dict[str, Tensor] = {"seed": torch.arange(MICRO) + seed}
    for view in views_from(objective.views()):
        shapes = view.shapes(objective.backbone.channels_of(view.kind))
        assert shapes is not None
        for entry, (shape, dtype) in shapes.items():
            whole = (*([] if view.times is None else [view.times]), MICRO, *shape)
            values = torch.rand(whole, generator=generator)
            batch[entry] = values if dtype.is_floating_point else (values * 256).to(dtype)
    return batch


def _differentiated(objective: Objective) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients, and bytes that the forward pass kept for the backward pass."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(7)  # stochastic depth
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = objective(_batch(objective), Progress(1, STEPS)).loss
    held = sum(kept.values())
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in objective.named_parameters() if p.grad is not None}
    return loss.item(), gradients, held


@pytest.mark.parametrize("name", sorted(SMALL))
def test_recompute_blocks__gives_the_same_bits_and_keeps_less(name: str) -> None:
    plain, again = _objective(name), _objective(name)
    assert len(again.repeated_blocks()) >= 3
    recompute_blocks(again.repeated_blocks())
    names = again.state_dict().keys()
    assert names == plain.state_dict().keys()
    (loss, gradients, kept), (loss_again, gradients_again, kept_again) = _differentiated(plain), _differentiated(again)
    assert loss_again == loss
    assert gradients_again.keys() == gradients.keys()
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())
    assert kept_again < 0.75 * kept


def test_recompute_blocks__running_statistics_move_once() -> None:
    plain, again = _objective("mae", FASTVIT), _objective("mae", FASTVIT)
    blocks = again.repeated_blocks()
    assert any(isinstance(module, nn.BatchNorm2d) for block in blocks for module in block.modules())
    recompute_blocks(blocks)
    (loss, gradients, _), (loss_again, gradients_again, _) = _differentiated(plain), _differentiated(again)
    assert loss_again == loss
    assert all(torch.equal(gradient, gradients_again[name]) for name, gradient in gradients.items())
    buffers = dict(again.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in plain.named_buffers())
    assert all(norm.track_running_stats for norm in again.modules() if isinstance(norm, nn.BatchNorm2d))


def test_blocks__are_the_outermost_ones_of_everything_that_is_trained() -> None:
    mae = _objective("mae")
    assert len(mae.repeated_blocks()) == 3 + 2  # encoder and decoder
    swin = ImageConfig("swin_tiny_patch4_window7_224", 64, options={"depths": [1, 1, 2, 1], "embed_dim": 24})
    blocks = _objective("mae", swin).repeated_blocks()
    assert len(blocks) == 5
    inner = {id(module) for block in blocks for module in list(block.modules())[1:]}
    assert not any(id(block) in inner for block in blocks)


@pytest.mark.parametrize("name", ["mae", "dino"])
def test_compile_blocks__losses_and_gradients_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced and differentiated by the compiler, run by torch's own kernels: no C++ compiler is needed."""
    monkeypatch.setattr(blocks_module, "COMPILER", "aot_eager")
    torch._dynamo.reset()
    still = replace(VIT, options={**VIT.options, "drop_path_rate": 0.0})  # compiled code draws other random numbers
    plain, compiled = _objective(name, still), _objective(name, still)
    compile_blocks(compiled.repeated_blocks())
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    torch._dynamo.utils.counters.clear()
    (loss, gradients, _), (loss_compiled, gradients_compiled, _) = _differentiated(plain), _differentiated(compiled)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert not torch._dynamo.utils.counters["graph_break"]
    assert loss_compiled == pytest.approx(loss, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradients_compiled[name], gradient, rtol=1e-3, atol=1e-6)


# --- under an engine -------------------------------------------------------------------------------------------------

SETTINGS: dict[str, dict[str, Any]] = {
    "plain-0": {"zero_stage": 0},
    "plain-3": {"zero_stage": 3},
    "checkpoint_blocks-0": {"zero_stage": 0, "checkpoint_blocks": True},
    "checkpoint_blocks-3": {"zero_stage": 3, "checkpoint_blocks": True},
    "both-1": {"zero_stage": 1, "compile": True, "checkpoint_blocks": True},
}


def _every_setting(directory: Path) -> dict[str, Any]:
    blocks_module.COMPILER = "aot_eager"
    return {name: _trained(_recipe("dino", **train), directory / name) for name, train in SETTINGS.items()}


def _trained(recipe: Recipe, directory: Path) -> dict[str, Any]:
    """Losses of the steps, and of the last one again after a restart."""
    torch.manual_seed(0)
    engine = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    losses = [_step(engine, step) for step in range(STEPS - 1)]
    engine.save(directory)
    extra = {name: tensor.clone() for name, tensor in engine.objective.extra_state().items()}
    losses.append(_step(engine, STEPS - 1))
    torch.manual_seed(1)
    again = Engine(build_objective(recipe), recipe, torch.device("cpu"))
    again.load(directory)
    again.objective.load_extra_state(extra)
    return {"losses": losses, "repeated": _step(again, STEPS - 1)}


def _step(engine: Engine, step: int) -> float:
    torch.manual_seed(100 * step + dist.get_rank())
    engine.set_schedule(1e-3, 0.05)
    result = engine.step(
        [_batch(engine.objective, 10 * step + dist.get_rank())], Progress(step, STEPS, is_logged=False)
    )
    loss = result.loss.clone()
    dist.all_reduce(loss)
    return float(loss) / RANKS


@pytest.fixture(scope="module")
def found(run_on_ranks: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting, tmp_path_factory.mktemp("blocks"))


@pytest.mark.integration
@pytest.mark.parametrize("setting", SETTINGS)
def test_engine__trains_and_resumes_with_blocks_recomputed_or_compiled(setting: str, found: dict[str, Any]) -> None:
    stage = "3" if setting.endswith("3") else "0"
    # Sharding rounds, and compiled code draws other random numbers for stochastic depth.
    tolerance = 1e-2 if SETTINGS[setting].get("compile") else 0.0
    assert found[setting]["losses"] == pytest.approx(found[f"plain-{stage}"]["losses"], rel=tolerance, abs=0.0)
    assert found[setting]["repeated"] == found[setting]["losses"][-1]


def test_engine__refuses_what_has_no_blocks_in_one_line() -> None:
    class Blockless(nn.Module):
        def repeated_blocks(self) -> list[nn.Module]:
            return []

    from pretrain.training.engine import _prepare_blocks

    recipe = _recipe("mae", compile=True, checkpoint_blocks=True)
    with pytest.raises(
        ValueError, match=r"^train\.compile and train\.checkpoint_blocks: mae with backbone .* no blocks"
    ):
        _prepare_blocks(Blockless(), recipe)  # type: ignore[arg-type]
