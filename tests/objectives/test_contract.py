"""What every registered objective keeps to, whatever it learns: `objectives/base.py`, checked by running it.

One process and plain PyTorch for what concerns the objective alone; two gloo ranks under DeepSpeed, ZeRO 0 to 3 and
bf16, for what an engine does to it. Real photos throughout.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from backbones.registry import create_backbone, from_config
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.streaming.stream import Stream
from data_pipelines.views.specs import views_from
from objectives import contract, registry
from objectives.base import Objective, Progress
from objectives.teacher import Teacher
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from tests.small_objectives import SMALL as SIZES
from tests.small_objectives import backbone_of, data_of, kind_of, with_frozen_teacher

# Without what depends on which images a rank has: another image of the micro-batch in the place of blocks; stochastic
# depth, how many patches of which crop are masked, KoLeo.
ALIKE = {"mask_share": 1.0, "mask_ratio": [0.3, 0.3], "drop_path": 0.0, "koleo_weight": 0.0}
SMALL = SIZES | {
    "sit": SIZES["sit"] | {"alien_p": 0.0},
    "gmml": SIZES["gmml"] | {"alien_p": 0.0},
    "dinov3": SIZES["dinov3"] | ALIKE | {"gram_weight": 1.0, "gram_from": "teacher", "last_layer": "weight_norm"},
}
OBJECTIVES = list(registry.built_in_names())
RANKS, MICRO, STEPS = 2, 8, 4


def recipe_of(name: str, *, workers: int = 1, stage: int = 1, precision: str = "fp32") -> Recipe:
    batch = RANKS * MICRO
    train = TrainConfig(
        steps=STEPS,
        global_batch_size=batch,
        micro_batch_size=batch // workers,
        accumulation=1,
        workers=workers,
        zero_stage=stage,
        precision=precision,
        checkpoint_every=STEPS,
    )
    return Recipe(
        name="contract",
        objective=registry.config_class(name)(**SMALL[name]),
        backbone=backbone_of(name),
        data=DataConfig(train=str(data_of(name) / "train-*.tar")),
        optimizer=OptimizerConfig(lr=1e-3, clip_grad=1.0),
        train=train,
    )


def objective_of(name: str, *, still: bool = False) -> Objective:
    torch.manual_seed(0)
    recipe = recipe_of(name)
    for setting in ("teacher_momentum", "center_momentum") if still else ():
        if hasattr(recipe.objective, setting):
            setattr(recipe.objective, setting, 1.0)
    return with_frozen_teacher(build_objective(recipe))


def batches_of(
    objective: Objective, *, rank: int = 0, world_size: int = 1, batch: int = 16, micro: int = 8
) -> Iterator[Any]:
    """Micro-batches as the training loop hands them over."""
    stream = Stream(
        open_dataset(data_of(objective.Config().name) / "train-*.tar", limit=64),
        views_from(objective.views()),
        global_batch_size=batch,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        seed=0,
        num_streams=2,
        resampler="torch",
    )
    return (stream.finish(made) for made in iter(stream))


def read(parameters: Sequence[torch.nn.Parameter]) -> list[Tensor]:
    return [parameter.detach().float() for parameter in parameters]


@pytest.fixture(autouse=True, scope="module")
def _one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__builds_from_its_default_config(name: str) -> None:
    if kind_of(name) == "image":
        backbone = create_backbone("vit_tiny_patch16_224", options={"depth": 4})  # few, to be quick
    else:
        backbone = from_config(type(backbone_of(name))())
    objective = registry.load(name)(backbone, registry.config_class(name)())
    assert objective.Config is registry.config_class(name)
    assert objective.backbone is backbone and views_from(objective.views())
    groups = objective.param_groups(0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in objective.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trainable)


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__public_checks_pass(name: str, check: Callable[..., None]) -> None:
    objective = objective_of(name)
    check(objective, next(batches_of(objective)))


def test_contract__public_checks_name_what_is_wrong() -> None:
    objective = objective_of("mae")
    batch = next(batches_of(objective))
    objective.unused = torch.nn.Parameter(torch.ones(2))
    with pytest.raises(AssertionError, match="no gradient reaches unused"):
        contract.check_gradients(objective, batch)
    forward = objective.forward
    objective.forward = lambda batch, progress: forward({**batch, "seed": torch.randint(9**9, (8,))}, progress)
    with pytest.raises(AssertionError, match="two passes over one batch differ"):
        contract.check_forward_changes_no_state(objective, batch)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__loss_falls(name: str) -> None:
    """A loss against a moving target says little about learning, so teacher and center are held still here."""
    objective = objective_of(name, still=True)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    total = 24
    losses = []
    for step, batch in enumerate(itertools.islice(batches_of(objective, micro=16), total)):
        progress = Progress(step, total)
        output = objective(batch, progress)
        optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        objective.after_step(progress, read)
        losses.append(output.loss.item())
        assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    start, end = sum(losses[:5]) / 5, sum(losses[-5:]) / 5
    assert end < start - 0.02 * abs(start), losses


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__gradients_reach_what_is_trained_and_nothing_else(name: str) -> None:
    objective = objective_of(name)
    batch = next(batches_of(objective))
    objective(batch, Progress(STEPS - 1, STEPS)).loss.backward()  # the last step: nothing is held back any more
    without = {n for n, p in objective.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    frozen = {n for n, p in objective.named_parameters() if not p.requires_grad and p.grad is not None}
    assert not without and not frozen
    if objective.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in objective.teacher.modules.parameters())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__forward_changes_no_state_and_draws_from_the_batch_alone(name: str) -> None:
    objective = objective_of(name)
    batch = next(batches_of(objective))
    before = {n: t.clone() for n, t in objective.extra_state().items()}
    first = objective(batch, Progress(1, STEPS))
    torch.manual_seed(99)
    second = objective(batch, Progress(1, STEPS))
    assert torch.equal(first.loss, second.loss)
    changed = {n for n, t in objective.extra_state().items() if not torch.equal(t, before[n])}
    assert not {n for n in changed if "running" not in n and "num_batches" not in n}  # batch norms count by themselves
    other = objective({**batch, "seed": batch["seed"] + 1}, Progress(1, STEPS))
    assert name in ("dino", "distillation", "selfpatch") or not torch.equal(first.loss, other.loss)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__metrics_say_how_healthy_the_features_are_and_cost_nothing_unread(name: str) -> None:
    objective = objective_of(name)
    batch = next(batches_of(objective))
    logged = objective(batch, Progress(1, STEPS))
    unread = objective(batch, Progress(1, STEPS, is_logged=False))
    assert torch.equal(logged.loss, unread.loss)
    assert unread.metrics.keys() < logged.metrics.keys()
    assert logged.metrics["effective_rank"] >= 1
    values = {name: value.item() for name, value in logged.metrics.items()}
    assert objective.diagnose(values, Progress(1, STEPS)) is None  # all of it is there, and the run is young


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__extra_state_comes_back_bit_for_bit(name: str) -> None:
    objective = objective_of(name)
    batch = next(batches_of(objective))
    progress = Progress(2, STEPS)
    objective(batch, progress)
    objective.after_step(progress, read)
    saved = {n: t.clone() for n, t in objective.extra_state().items()}
    torch.manual_seed(7)
    again = with_frozen_teacher(build_objective(recipe_of(name)))
    again.load_state_dict(objective.state_dict())
    again.load_extra_state(saved)
    assert all(torch.equal(t, saved[n]) for n, t in again.extra_state().items())
    assert torch.equal(objective(batch, progress).loss, again(batch, progress).loss)
    with pytest.raises(KeyError, match=r"extra state differs in surplus"):
        again.load_extra_state({**saved, "surplus": torch.zeros(1)})


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__pictures_are_pictures(name: str) -> None:
    objective = objective_of(name)
    state = torch.get_rng_state()
    pictures = objective.pictures(next(batches_of(objective)))
    assert torch.equal(torch.get_rng_state(), state) and objective.training
    assert len(pictures) >= 2
    for caption, images in pictures.items():
        assert images.ndim == 4 and images.shape[1] == 3 and 1 <= len(images) <= 16, caption
        assert images.isfinite().all() and images.min() >= 0 and images.max() <= 1
        assert images.float().std() > 0, f"{caption} shows nothing"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__diagnose_is_silent_on_a_sound_start(name: str) -> None:
    objective = objective_of(name)
    output = objective(next(batches_of(objective)), Progress(0, STEPS))
    values = {n: float(t) for n, t in {**output.metrics, "loss": output.loss.detach()}.items()}
    assert objective.diagnose(values, Progress(0, STEPS)) is None


def test_teacher__follows_the_formula() -> None:
    student = torch.nn.Linear(3, 2)
    teacher = Teacher(head=student)
    start = student.weight.detach().clone()
    with torch.no_grad():
        student.weight += 1
    teacher.update(0.75, read)
    torch.testing.assert_close(teacher.head.weight, 0.75 * start + 0.25 * (start + 1))
    assert not list(teacher.modules.buffers()) and teacher.state_dict().keys() == {"head.weight", "head.bias"}


# --- under an engine -------------------------------------------------------------------------------------------------

# Sharded weights and float32 masters for every objective. What stages 0 to 2 do is the same for all
# (tests/pretrain/test_engine.py), so that some of each kind are enough here; stages 0 and 1 of the others are held to
# recorded losses (tests/integration/test_recorded_losses.py).
OF_ALL = [("fp32", 3), ("bf16", 1)]
OF_SOME = {
    ("fp32", 0): ("dinov3", "gmml", "point_mae", "volume_mae"),
    ("fp32", 1): ("dinov3", "point_mae", "sit", "uni4eye"),
    ("fp32", 2): ("dino", "nerf_mae"),
}
SETTINGS = [(name, *setting) for name in OBJECTIVES for setting in OF_ALL]
SETTINGS += [(name, *setting) for setting, names in OF_SOME.items() for name in names]
EXACT = [(name, stage) for name, precision, stage in SETTINGS if precision == "fp32"]
# Settings whose state is saved, loaded and continued: with float32 masters those whose stage 1 is tried without.
SAVED = [(name, "fp32", 3) for name in OBJECTIVES]
SAVED += [(name, precision, 1) for name in OF_SOME["fp32", 1] for precision in ("fp32", "bf16")]


def _every_setting(directory: Path) -> dict[str, Any]:
    settings = SETTINGS if dist.get_world_size() == RANKS else [(name, "fp32", 0) for name in OBJECTIVES]
    return {
        f"{name}-{precision}-{stage}": _trained(name, precision, stage, directory)
        for name, precision, stage in settings
    }


def _trained(name: str, precision: str, stage: int, directory: Path) -> dict[str, Any]:
    """Losses of some steps; what the second half gives again from what was saved before it; what the teacher became."""
    recipe = recipe_of(name, workers=dist.get_world_size(), stage=stage, precision=precision)
    torch.manual_seed(0)
    engine = Engine(with_frozen_teacher(build_objective(recipe)), recipe, torch.device("cpu"))
    place = {"rank": dist.get_rank(), "world_size": dist.get_world_size()}
    batches = batches_of(engine.objective, **place, batch=RANKS * MICRO, micro=RANKS * MICRO // dist.get_world_size())
    steps = [[batch] for batch in itertools.islice(batches, STEPS)]
    losses = [_step(engine, step, steps[step]) for step in range(STEPS // 2)]
    state = directory / f"{name}-{precision}-{stage}"
    engine.save(state)
    extra = {n: t.clone() for n, t in engine.objective.extra_state().items()}
    losses += [_step(engine, step, steps[step]) for step in range(STEPS // 2, STEPS)]
    ended = {n: t.double().norm().item() for n, t in engine.objective.extra_state().items() if t.is_floating_point()}

    found = {"losses": losses, "norms": ended}
    if (name, precision, stage) not in SAVED or dist.get_world_size() == 1:
        return found
    torch.manual_seed(1)
    again = Engine(with_frozen_teacher(build_objective(recipe)), recipe, torch.device("cpu"))
    again.load(state)
    again.objective.load_extra_state(extra)
    repeated = [_step(again, step, steps[step]) for step in range(STEPS // 2, STEPS)]
    after = again.objective.extra_state()
    same = all(torch.equal(t, after[n]) for n, t in engine.objective.extra_state().items())
    return found | {"repeated": repeated, "same_state": same}


def _step(engine: Engine, step: int, micro_batches: list[dict[str, Tensor]]) -> float:
    engine.set_schedule(1e-3, 0.05, step)
    result = engine.step(micro_batches, Progress(step, STEPS, is_logged=False))
    assert result.applied
    loss = result.loss.clone()
    dist.all_reduce(loss)
    return float(loss) / dist.get_world_size()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("contract")


@pytest.fixture(scope="module")
def both(run_on_ranks: Callable[..., Any], directory: Path) -> dict[str, Any]:
    return run_on_ranks(RANKS, _every_setting, directory)


@pytest.fixture(scope="module")
def alone(run_on_ranks: Callable[..., Any], directory: Path) -> dict[str, Any]:
    return run_on_ranks(1, _every_setting, directory)


def assert_alike(ours: dict[str, float], others: dict[str, float]) -> None:
    """Norms of tensors of the state, by name.

    Biases in front of a batch norm have gradients of rounding errors, of which Adam makes steps of the learning rate in
    any direction: hence the absolute part, and a larger one for the means that such a norm takes away.
    """
    assert ours.keys() == others.keys()
    for name, norm in ours.items():
        drift = STEPS * 1e-3 if name.endswith("running_mean") else 1e-5
        assert norm == pytest.approx(others[name], rel=1e-5, abs=drift), name


@pytest.mark.integration
@pytest.mark.parametrize(("name", "stage"), EXACT)
def test_contract__two_ranks_equal_one_process(
    name: str, stage: int, both: dict[str, Any], alone: dict[str, Any]
) -> None:
    """The same global batch in two ranks and in one process."""
    ours, single = both[f"{name}-fp32-{stage}"], alone[f"{name}-fp32-0"]
    assert ours["losses"] == pytest.approx(single["losses"], rel=2e-5)
    assert_alike(ours["norms"], single["norms"])


@pytest.mark.integration
@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__the_engine_equals_a_plain_pytorch_loop(name: str, alone: dict[str, Any]) -> None:
    """Losses and what the teacher becomes: clip, AdamW, then `after_step`, in the paper's order."""
    recipe = recipe_of(name)
    torch.manual_seed(0)
    objective = with_frozen_teacher(build_objective(recipe))
    optimizer = torch.optim.AdamW(objective.param_groups(0.05), lr=1e-3, betas=tuple(recipe.optimizer.betas))
    losses = []
    for step, batch in enumerate(itertools.islice(batches_of(objective, micro=RANKS * MICRO), STEPS)):
        for group in optimizer.param_groups:
            group["lr"] = 0.0 if step < group.get("frozen_share", 0) * STEPS else 1e-3 * group["lr_scale"]
        loss = objective(batch, Progress(step, STEPS)).loss
        optimizer.zero_grad()
        loss.backward()
        for parameter in filter(lambda p: p.requires_grad and p.grad is None, objective.parameters()):
            parameter.grad = torch.zeros_like(parameter)  # frozen prototypes: an engine has zeros where torch has none
        torch.nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        objective.after_step(Progress(step, STEPS), read)
        losses.append(loss.item())
    norms = {n: t.double().norm().item() for n, t in objective.extra_state().items() if t.is_floating_point()}
    assert alone[f"{name}-fp32-0"]["losses"] == pytest.approx(losses, rel=1e-5)
    assert_alike(alone[f"{name}-fp32-0"]["norms"], norms)


@pytest.mark.integration
@pytest.mark.parametrize(("name", "precision", "stage"), SAVED)
def test_contract__saved_state_continues(name: str, precision: str, stage: int, both: dict[str, Any]) -> None:
    found = both[f"{name}-{precision}-{stage}"]
    assert found["repeated"] == found["losses"][STEPS // 2 :]
    assert found["same_state"]


@pytest.mark.integration
@pytest.mark.parametrize("name", OBJECTIVES)
def test_contract__bf16_stays_finite_and_close(name: str, both: dict[str, Any]) -> None:
    found = both[f"{name}-bf16-1"]
    assert found["losses"] == pytest.approx(both[f"{name}-fp32-3"]["losses"], rel=0.15)
