"""What an engine and a training state do with modules that the engine must not see, and reading weights for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from backbones.images.config import ImageConfig
from backbones.io import save_backbone
from backbones.registry import create_backbone
from objectives.base import Objective, Output, Progress
from objectives.companions import Companion
from objectives.errors import ObjectiveError
from objectives.teacher import ReadWeights, Teacher
from pretrain.checkpoints.store import CheckpointError
from pretrain.config.schema import DataConfig, OptimizerConfig, Recipe, TrainConfig
from pretrain.config.stages import Plan, Stage
from pretrain.record.run_dir import RunDir
from pretrain.training import frozen_teachers, state
from pretrain.training.engine import Engine
from pretrain.training.handover import take_over
from pretrain.training.publication import Publisher

RANKS = 2
VIT = {"depth": 2, "embed_dim": 24, "num_heads": 2}
FIXED = (300, 400)  # more numbers than ZeRO-3 keeps whole
SETTINGS = [("fp32", 0), ("fp32", 1), ("fp32", 2), ("fp32", 3), ("bf16", 1), ("bf16", 2), ("bf16", 3)]


@dataclass
class ToyConfig:
    name: str = "toy"


class Toy(Objective):
    """Features near those of a moving average of itself and those of a frozen network; a third one is only carried."""

    Config: ClassVar[type] = ToyConfig

    def __init__(self) -> None:
        super().__init__()
        self.backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=VIT)
        self.head = nn.Linear(24, 24)
        self.fixed = nn.Parameter(torch.randn(FIXED), requires_grad=False)
        self.teacher: Teacher = Teacher(backbone=self.backbone)
        other = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=VIT)
        self.frozen = Companion(other, filled="checkpoint", moves="frozen", saved="reference")
        self.carried = Companion(nn.Linear(24, 24), filled="student", moves="frozen", saved="sharded")

    def companions(self) -> dict[str, Companion]:
        return super().companions() | {"frozen": self.frozen, "carried": self.carried}

    def views(self) -> list[dict[str, Any]]:
        return [{"name": "image", "size": 16}]

    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        x = self.backbone.preprocess(batch["image"])
        with torch.no_grad(), self.teacher.precision(self.backbone.dtype, x.device):
            targets = [network.features(x).patches.float() for network in (self.exported, self.frozen.module)]  # type: ignore[operator]
        found = self.head(self.backbone.features(x).patches).float()
        loss = torch.stack([(found - target).square().mean() for target in targets]).mean()
        return Output(loss, {"loss": loss.detach()})

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        self.teacher.update(0.9, read)

    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}


def recipe_of(precision: str, stage: int) -> Recipe:
    sizes = {"steps": 4, "global_batch_size": 4, "micro_batch_size": 4 // RANKS, "accumulation": 1, "workers": RANKS}
    return Recipe(
        name="companions",
        objective=ToyConfig(),
        backbone=ImageConfig("vit_tiny_patch16_224", 16, 8, options=VIT),
        data=DataConfig(train="shards"),
        optimizer=OptimizerConfig(lr=1e-2, clip_grad=1.0),
        train=TrainConfig(**sizes, zero_stage=stage, precision=precision, checkpoint_every=4),  # type: ignore[arg-type]
    )


def batch_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    return {"image": torch.rand(2, 3, 16, 16, generator=generator), "seed": torch.arange(2)}


def engine_of(precision: str, stage: int, weights: Path | None) -> Engine:
    torch.manual_seed(0 if weights else 1)
    toy = Toy()
    if weights:
        toy.frozen.load(weights)
    return Engine(toy, recipe_of(precision, stage), torch.device("cpu"))


def _fixed() -> Tensor:
    """The parameter that is not trained, as `engine_of` draws it."""
    torch.manual_seed(0)
    return Toy().fixed.detach()


def step(engine: Engine, number: int) -> None:
    engine.set_schedule(1e-2, 0.05)
    assert engine.step([batch_of(number)], Progress(number, 4, is_logged=False)).applied


def _read_in_every_setting(weights: Path) -> dict[str, bool]:
    """Whether many weights at once are what DeepSpeed gives one by one, and the teacher what the formula gives."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for precision, stage in SETTINGS:
        engine, fixed = engine_of(precision, stage, weights), _fixed()
        teacher = engine.objective.teacher
        assert isinstance(teacher, Teacher)
        before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
        step(engine, 0)
        names, parameters = zip(*engine.objective.named_parameters(), strict=True)
        many = dict(zip(names, engine.read_weights(list(parameters)), strict=True))
        sharded = stage == 3 or precision == "bf16"
        one_by_one = {
            name: safe_get_full_fp32_param(p) if sharded and p.requires_grad else p.detach().float()
            for name, p in zip(names, parameters, strict=True)
        }
        one_by_one["fixed"] = fixed.bfloat16().float() if precision == "bf16" else fixed
        same = [
            torch.equal(many[name], value) and value.shape == many[name].shape for name, value in one_by_one.items()
        ]
        expected = {name: old.lerp(many[name], 1 - 0.9) for name, old in before.items()}
        moved = [torch.equal(expected[name], value) for name, value in teacher.state_dict().items()]
        is_moved = not any(torch.equal(before[name], expected[name]) for name in expected)
        held = (*parameters, *teacher.module.parameters(), *map(teacher.share_of, teacher.module.parameters()))
        engine.close()
        is_freed = not any(tensor.numel() for tensor in held)
        found[f"{precision}-{stage}"] = all(same) and all(moved) and is_moved and is_freed
    return found


def _save_and_restore(run_dir: Path, weights: Path, stage: int) -> dict[str, Any]:
    position = SimpleNamespace(epoch=0, position=4)
    stream: Any = SimpleNamespace(state_at=lambda _: position, order_signature={}, require_order=lambda _: None)
    recipe = recipe_of("fp32", stage)
    engine = engine_of("fp32", stage, weights)
    step(engine, 0)
    Publisher(RunDir(run_dir), Stage("", recipe), engine, stream).take(1, is_last=True)
    _, found = state.find_start(run_dir, recipe)
    assert found is not None
    path = found.path
    saved = {file.name: sorted(load_file(file)) for file in (path / "training_state").glob("objective-*")}

    again = engine_of("fp32", stage, None)
    state.restore(found, again, stream, 1)
    same = {
        name: all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
        for (name, one), two in zip(
            engine.objective.companions().items(), again.objective.companions().values(), strict=True
        )
    }
    dist.barrier()
    kept = weights.read_bytes()
    refusals = []
    for spoil in (lambda: save_file({"x": torch.zeros(1)}, weights), weights.unlink):
        if dist.get_rank() == 0:
            spoil()
        dist.barrier()
        try:
            state.restore(found, engine_of("fp32", stage, None), stream, 1)
        except CheckpointError as error:
            refusals.append(str(error))
        dist.barrier()
    if dist.get_rank() == 0:
        weights.write_bytes(kept)
    references = json.loads((path / "training_state" / "companions.json").read_text())
    return {"saved": saved, "same": same, "refusals": refusals, "references": references}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    network = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=VIT).network
    path = tmp_path_factory.mktemp("weights") / "earlier.safetensors"
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def read(run_on_ranks: Callable[..., Any], weights: Path) -> dict[str, bool]:
    return run_on_ranks(RANKS, _read_in_every_setting, weights)


@pytest.mark.integration
@pytest.mark.parametrize(("precision", "stage"), SETTINGS)
def test_read_weights__many_at_once_are_what_one_at_a_time_are(
    precision: str, stage: int, read: dict[str, bool]
) -> None:
    assert read[f"{precision}-{stage}"]


@pytest.mark.integration
@pytest.mark.parametrize("stage", [1, 3])
def test_companions__come_back_and_references_are_checked(
    run_on_ranks: Callable[..., Any], weights: Path, tmp_path: Path, stage: int
) -> None:
    found = run_on_ranks(RANKS, _save_and_restore, tmp_path / "run", weights, stage)
    first, second = found["saved"]["objective-00000.safetensors"], found["saved"]["objective-00001.safetensors"]
    assert {name.partition(".")[0] for name in first} == {"teacher", "carried"}  # and nothing of "frozen"
    assert sorted(name for name in [*first, *second] if name.startswith("carried")) == [
        "carried.bias",
        "carried.weight",
    ]
    assert (
        len(second) == 1 if stage == 1 else abs(len(first) - len(second)) <= 1
    )  # in stage 3 the teacher is shared out
    assert found["same"] == {"teacher": True, "frozen": True, "carried": True}
    assert found["references"].keys() == {"frozen"} and found["references"]["frozen"]["location"] == str(weights)
    changed, gone = found["refusals"]
    assert f"weights {weights}: sha256 " in changed and "put that file back" in changed
    assert f"weights {weights}: No such file or directory; put the file back" in gone
    assert "\n" not in changed + gone


def test_companion__by_reference_has_to_be_filled_from_a_file_and_to_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="by reference only if it is frozen"):
        Companion(nn.Linear(2, 2), filled="student", moves="ema", saved="reference")
    toy = Toy()
    with pytest.raises(ObjectiveError, match=r"^companion 'frozen' was never filled: call its `load`"):
        toy.references()
    save_file({"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ObjectiveError, match="do not fit, see: cls_token is missing; "):
        toy.frozen.load(tmp_path / "other.safetensors")
    with pytest.raises(ObjectiveError, match=r"companions differ in frozen$"):
        toy.load_references({})


def test_companion__a_teacher_is_one_by_itself_and_what_is_frozen_is_in_evaluation_mode() -> None:
    toy = Toy()
    assert toy.companions()["teacher"] is toy.teacher
    teacher, frozen = toy.teacher, toy.frozen
    assert (teacher.filled, teacher.moves, teacher.saved) == ("student", "ema", "whole")
    assert not frozen.module.training and not any(p.requires_grad for p in frozen.module.parameters())
    assert not any(name.startswith(("frozen", "carried", "teacher")) for name in toy.state_dict())


def test_fill_companions__by_teacher_from(tmp_path: Path) -> None:
    torch.manual_seed(3)
    given = Toy().backbone
    save_backbone(tmp_path / "teacher.safetensors", given.weights(), given.spec)
    recipe = replace(recipe_of("fp32", 1), teacher_from=str(tmp_path / "teacher.safetensors"))
    toy = Toy()
    frozen_teachers.fill(Plan.single(recipe), 0, toy, tmp_path)
    assert all(
        torch.equal(ours, given.weights()[name]) for name, ours in toy.frozen.module.network.state_dict().items()
    )
    assert toy.references()["frozen"]["location"] == str(tmp_path / "teacher.safetensors")
    frozen_teachers.fill(Plan.single(recipe_of("fp32", 1)), 0, toy, tmp_path)  # filled by itself: nothing to say

    with pytest.raises(ValueError, match=r"objective\.name=toy: needs a teacher; give teacher_from=REFERENCE"):
        frozen_teachers.fill(Plan.single(recipe_of("fp32", 1)), 0, Toy(), tmp_path)
    gone = Plan.single(replace(recipe, teacher_from=str(tmp_path / "gone.safetensors")))
    with pytest.raises(CheckpointError, match=r"teacher_from=.*gone.safetensors: .*no such file"):
        frozen_teachers.fill(gone, 0, Toy(), tmp_path)
    toy.companions = dict  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="objective toy has no frozen teacher to fill; leave it out"):
        frozen_teachers.fill(Plan.single(recipe), 0, toy, tmp_path)


def test_take_over__student_teacher_and_what_else_is_carried(tmp_path: Path) -> None:
    """By name; a companion that is saved by reference is filled from its source and not handed over."""
    torch.manual_seed(4)
    before, after = Toy(), Toy()
    with torch.no_grad():
        for tensor in before.extra_state().values():
            tensor.add_(1)
    weights = {**dict(before.named_parameters()), **before.extra_state()}
    frozen = {name: tensor.clone() for name, tensor in after.frozen.state_dict().items()}
    taken = take_over(after, weights)
    assert not (taken.fresh or taken.resampled or taken.unused) and len(taken.loaded) == len(weights)
    found = {**dict(after.named_parameters()), **after.extra_state()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    assert {name.partition(".")[0] for name in taken.loaded} == {"backbone", "head", "fixed", "teacher", "carried"}
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in after.frozen.state_dict().items())

    weights["teacher.backbone.vit.pos_embed"] = torch.ones(1, 17, 24)  # of another grid
    weights["head.weight"] = torch.zeros(3, 3)
    weights["gone"] = torch.zeros(1)
    kept = after.head.weight.clone()
    taken = take_over(after, weights)
    assert (taken.resampled, taken.fresh, taken.unused) == (
        ("teacher.backbone.vit.pos_embed",),
        ("head.weight",),
        ("gone",),
    )
    assert torch.equal(after.head.weight, kept)
    torch.testing.assert_close(after.teacher.backbone.vit.pos_embed, torch.ones(1, 5, 24))  # type: ignore[union-attr]


def test_take_over__a_teacher_without_weights_is_a_copy_of_the_student(tmp_path: Path) -> None:
    """As after an objective without one; fixed positions, which are a buffer there, are a parameter here."""
    torch.manual_seed(5)
    before, after = Toy(), Toy()
    weights = {name: tensor for name, tensor in before.named_parameters() if name.startswith("backbone.")}
    weights["buffer.backbone.vit.pos_embed"] = weights.pop("backbone.vit.pos_embed")
    taken = take_over(after, weights)
    student, teacher = after.backbone.weights(), after.exported.weights()
    assert after.exported is not after.backbone
    assert all(torch.equal(tensor, before.backbone.weights()[name]) for name, tensor in student.items())
    assert all(torch.equal(tensor, student[name]) for name, tensor in teacher.items())
    assert {name.partition(".")[0] for name in taken.fresh} == {"head", "fixed", "carried"}
