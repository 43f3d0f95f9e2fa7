"""Frozen teachers by `teacher_from`: what fills them, what is refused before a run begins, and what is counted."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from backbones.io import save_backbone
from objectives.base import Objective, Progress
from objectives.companions import Companion
from objectives.parts.frozen_teacher import FrozenBackbone
from pretrain.checkpoints.initialization import checked_plan
from pretrain.checkpoints.store import CheckpointError, verify
from pretrain.cli.main import main
from pretrain.config.load import load_plan
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, Stage
from pretrain.driver.start import run
from pretrain.errors import RequestError
from pretrain.record.run_dir import RunDir
from pretrain.training import frozen_teachers, state
from pretrain.training.engine import Engine
from pretrain.training.model import build_objective
from pretrain.training.preflight import look_ahead
from pretrain.training.publication import Publisher

RECIPE = """
objective:
  name: dinov3
  num_prototypes: 24
  head_hidden_dim: 24
  head_bottleneck_dim: 8
  patch_num_prototypes: 16
  patch_head_hidden_dim: 24
  patch_head_bottleneck_dim: 8
  last_layer: weight_norm
  num_local: 2
  local_size: 8
  drop_path: 0.0
  # The same for an image whichever rank it is on.
  mask_share: 1.0
  mask_ratio: [0.3, 0.3]
  koleo_weight: 0.0
backbone:
  name: vit_small_patch16_dinov3_qkvb
  image_size: 16
  patch_size: 4
  options: {embed_dim: 32, depth: 2, num_heads: 2, num_reg_tokens: 1, init_values: 0.5}
data: {train: "package:demo_data/grocery/train-*.tar"}
optimizer: {lr: 1.0e-3, clip_grad: 1.0, clip_mode: part}
train: {steps: 4, global_batch_size: 8, workers: 1, zero_stage: 0, checkpoint_every: 2}
evaluation: {enabled: false}
"""
STUDENT = [
    "objective.distill=true", "objective.head_hidden_dim=16",
    "backbone.options={embed_dim: 16, depth: 1, num_heads: 2, num_reg_tokens: 1, init_values: 0.5}",
]  # fmt: skip


@pytest.fixture
def plan_of(tmp_path: Path) -> Callable[..., Plan]:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return lambda *overrides: load_plan(path, [f"storage={tmp_path / 'runs'}", *overrides])


def publish(folder: Path, teacher: Objective, *, with_heads: bool = True) -> Path:
    """A checkpoint of the teacher, as far as its weights go."""
    folder.mkdir(parents=True)
    save_backbone(folder / "backbone.safetensors", teacher.exported.weights(), teacher.exported.spec)
    heads = teacher.exported_heads()
    assert heads is not None
    manifest = {"format": 1, "step": 4, "backbone": teacher.exported.spec, "objective": "dinov3"}
    if with_heads:
        save_file(heads.tensors, folder / "heads.safetensors")
        manifest["heads"] = heads.spec
    digests = {
        file.name: {"sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "bytes": file.stat().st_size}
        for file in folder.iterdir()
    }
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"files": digests}))
    return folder


@pytest.fixture
def teacher(plan_of: Callable[..., Plan], tmp_path: Path) -> Path:
    torch.manual_seed(3)
    return publish(tmp_path / "teacher", build_objective(plan_of().recipe))


def frozen(objective: Objective) -> dict[str, Companion]:
    return {name: each for name, each in objective.companions().items() if each.filled == "checkpoint"}


# Where they come from


def test_fill__backbone_and_heads_of_a_checkpoint(plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path) -> None:
    plan = plan_of(*STUDENT, f"teacher_from={teacher}")
    torch.manual_seed(0)
    student = build_objective(plan.recipe)
    state_of_rng = torch.get_rng_state()
    frozen_teachers.fill(plan, 0, student, tmp_path)
    assert torch.equal(state_of_rng, torch.get_rng_state())  # the student is the same whoever its teacher is
    torch.manual_seed(3)
    given = build_objective(plan_of().recipe)
    heads = given.exported_heads()
    assert heads is not None
    found = frozen(student)
    for name, tensor in given.exported.weights().items():
        assert torch.equal(tensor, found["frozen_backbone"].module.network.state_dict()[name])  # type: ignore[operator, union-attr]
    assert found["frozen_heads"].state_dict().keys() == heads.tensors.keys()
    assert all(torch.equal(tensor, heads.tensors[key]) for key, tensor in found["frozen_heads"].state_dict().items())
    assert {Path(source["location"]).name for source in student.references().values()} == {
        "backbone.safetensors", "heads.safetensors"
    }  # fmt: skip
    assert not any(parameter.requires_grad for each in found.values() for parameter in each.module.parameters())


def test_load_references__same_weights_elsewhere_are_the_same_and_others_are_refused(
    plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path
) -> None:
    """A storage may be moved between a stop and a resume; a teacher may not be another one."""
    plan = plan_of(*STUDENT, f"teacher_from={teacher}")
    student = build_objective(plan.recipe)
    frozen_teachers.fill(plan, 0, student, tmp_path)
    began_with = student.references()
    moved = tmp_path / "moved"
    shutil.move(teacher, moved)
    again = build_objective(plan.recipe)
    frozen_teachers.fill(plan_of(*STUDENT, f"teacher_from={moved}"), 0, again, tmp_path)
    again.load_references(began_with)
    assert again.references()["frozen_heads"]["location"] == str(moved / "heads.safetensors")

    torch.manual_seed(9)
    other = publish(tmp_path / "other", build_objective(plan_of().recipe))
    frozen_teachers.fill(plan_of(*STUDENT, f"teacher_from={other}"), 0, again, tmp_path)
    with pytest.raises(Exception, match=r"teacher/backbone.safetensors: No such file .*put the file back"):
        again.load_references(began_with)


def test_fill__what_is_not_there_or_damaged_is_one_line(
    plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path
) -> None:
    plan = plan_of(*STUDENT, f"teacher_from={teacher}")

    def refused() -> str:
        with pytest.raises(CheckpointError) as error:
            frozen_teachers.fill(plan, 0, build_objective(plan.recipe), tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value)

    heads = (teacher / "heads.safetensors").read_bytes()
    (teacher / "heads.safetensors").write_bytes(heads[:-4] + b"abcd")
    assert "heads.safetensors: contents differ from the SHA-256 in checkpoint.json" in refused()
    (teacher / "heads.safetensors").unlink()
    assert "heads.safetensors: missing, checkpoint.json lists it" in refused()
    shutil.rmtree(teacher)
    assert f"teacher_from={teacher}: " in refused() and "no such directory" in refused()


def test_checked_plan__a_run_goes_on_with_the_teacher_that_it_began_with(
    plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]
) -> None:
    """Asked before anything starts. One that has moved is the same; when all steps are done none is needed."""
    plan = plan_of(*STUDENT, f"teacher_from={teacher}")
    student = build_objective(plan.recipe)
    frozen_teachers.fill(plan, 0, student, tmp_path)
    run_dir = tmp_path / "runs" / "small-1"
    references = make_checkpoint(run_dir, 2) / "training_state" / "companions.json"
    references.write_text(json.dumps(student.references()))

    def refused(plan: Plan) -> str:
        with pytest.raises(RequestError) as error:
            checked_plan(plan, run_dir)
        (line,) = error.value.mistakes
        return line

    assert checked_plan(plan, run_dir) == plan
    moved = plan_of(*STUDENT, f"teacher_from={shutil.copytree(teacher, tmp_path / 'moved')}")
    assert checked_plan(moved, run_dir) == moved
    torch.manual_seed(9)
    shutil.rmtree(teacher)
    publish(teacher, build_objective(plan_of().recipe))
    changed = refused(plan)
    assert changed.startswith(f"teacher_from={teacher}: not what the run began with, {teacher}/")
    assert changed.endswith("; put that file back, or begin a new run")
    shutil.rmtree(teacher)
    gone = refused(plan)
    assert gone.startswith(f"teacher_from={teacher}: no such directory") and gone.count(str(teacher)) == 1
    assert gone.endswith("; the run goes on with the teacher that it began with, so put it back")
    make_checkpoint(run_dir, 4)
    assert checked_plan(plan, run_dir) == plan


def test_checked_plan__an_earlier_stage_whose_checkpoint_is_gone(
    plan_of: Callable[..., Plan], tmp_path: Path, make_checkpoint: Callable[[Path, int], Path]
) -> None:
    plan = plan_of("stages=[{name: a}, {name: b, teacher_from: a/2, objective: {gram_weight: 1.0}}]")
    run_dir = tmp_path / "runs" / "small-1"
    kept, _ = make_checkpoint(run_dir, 2), make_checkpoint(run_dir, 4)
    assert checked_plan(plan, run_dir) == plan
    shutil.rmtree(kept)
    with pytest.raises(RequestError, match=r"^stages\[1\].teacher_from=a/2: the checkpoint of step 2 .* is gone, "):
        checked_plan(plan, run_dir)


def test_verify__heads_that_are_not_listed_are_refused(teacher: Path) -> None:
    manifest = json.loads((teacher / "checkpoint.json").read_text())
    del manifest["files"]["heads.safetensors"]
    (teacher / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"heads.safetensors: not listed in checkpoint.json"):
        verify(teacher)


# A timm checkpoint

TINY = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def tiny() -> Any:
    torch.manual_seed(1)
    return timm.create_model(TINY)


def filled_with(file: Path) -> FrozenBackbone:
    from backbones.registry import create_backbone
    from pretrain.checkpoints.initialization import find_weights

    student = create_backbone(TINY, image_size=32, options={"depth": 1, "embed_dim": 24, "num_heads": 2})
    found = find_weights(f"timm:{TINY}@{file}", file.parent)
    frozen = FrozenBackbone(student, [32])
    frozen.outline(found.spec)
    frozen.load(found.file, found.sha256)
    return frozen


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pth"])
def test_timm__weights_of_safetensors_or_a_state_dict(name: str, tiny: Any, tmp_path: Path) -> None:
    """Its own image size, pixel statistics and widths; its classifier is left out."""
    weights = tiny.state_dict()
    if name.endswith(".pth"):
        torch.save({"epoch": 3, "args": Namespace(lr=0.1), "state_dict": weights}, tmp_path / name)
    else:
        save_file(weights, tmp_path / name)
    encoder = filled_with(tmp_path / name).backbone
    assert (encoder.image_size, encoder.embed_dim, encoder.spec["pixel_mean"]) == (224, 192, [0.5, 0.5, 0.5])
    pixels = torch.rand(1, 3, 224, 224)
    tiny.eval()
    torch.testing.assert_close(encoder.features(pixels).cls, tiny.forward_features(pixels)[:, 0])


class _Code:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("1 / 0",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"x": _Code()}, "x.pth: holds something else than tensors, which could run code; refused"),
        ({"cls_token": "no tensor"}, "x.pth: no state dict, which holds tensors by name and nothing else"),
        (
            {"cls_token": torch.zeros(1, 1, 3)},
            r"weights of vit_tiny\w+ do not fit, see: cls_token has shape .* and \d+ more; name the model that",
        ),
        (None, "x.pth: not a file that torch.save wrote, or damaged"),
    ],
)
def test_timm__files_that_are_refused(content: Any, says: str, tmp_path: Path) -> None:
    file = tmp_path / "x.pth"
    file.write_bytes(b"something else") if content is None else torch.save(content, file)
    with pytest.raises(ValueError, match=says) as refused:
        filled_with(file)
    assert "\n" not in str(refused.value)


# Before a run begins


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["teacher_from=TEACHER", "objective.num_prototypes=48"],
            "has 24 prototypes, the student's 48; set objective.nu",
        ),
        (
            ["teacher_from=TEACHER", "backbone.patch_size=8"],
            "has patches of 4 px, the student of 8; set backbone.patch_",
        ),
        (
            ["teacher_from=TEACHER/backbone.safetensors"],
            "has no heads.safetensors, whose outputs would be learned; checkpoints of objective dinov3 have",
        ),
        (["teacher_from=HEADLESS"], "has no heads.safetensors, whose outputs"),
        (["teacher_from=timm:vit_tiny_patch16_224@TIMM"], "has no heads.safetensors"),
    ],
)
def test_look_ahead__refuses_a_teacher_that_does_not_fit(
    overrides: list[str], says: str, plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path
) -> None:
    torch.manual_seed(3)
    headless = publish(tmp_path / "headless", build_objective(plan_of().recipe), with_heads=False)
    save_file({"x": torch.zeros(1)}, tmp_path / "timm.safetensors")
    places = {"TEACHER": teacher, "HEADLESS": headless, "TIMM": tmp_path / "timm.safetensors"}
    overrides = [re.sub("|".join(places), lambda name: str(places[name[0]]), text) for text in overrides]
    with pytest.raises(RequestError, match=re.escape(says)) as refused:
        look_ahead(plan_of(*STUDENT, *overrides))
    (line,) = refused.value.mistakes
    assert "\n" not in line and line.startswith("teacher_from=")


@pytest.mark.parametrize("name", ["tiny.safetensors", "tiny.pth"])
def test_look_ahead__weights_of_another_model_than_the_one_that_is_named(
    name: str, plan_of: Callable[..., Plan], tiny: Any, tmp_path: Path
) -> None:
    """Names and shapes tell, before a run has a directory; it failed in the workers, when all had been started."""
    weights = tiny.state_dict()
    torch.save(weights, tmp_path / name) if name.endswith(".pth") else save_file(weights, tmp_path / name)
    features = ["objective={name: distillation, teacher_dim: 384}"]
    reference = f"timm:vit_small_patch16_224@{tmp_path / name}"
    with pytest.raises(RequestError) as refused:
        look_ahead(plan_of(*features, f"teacher_from={reference}"))
    (line,) = refused.value.mistakes
    assert line.startswith(
        f"teacher_from={reference}: the weights of vit_small_patch16_224 do not fit, see: cls_token has shape "
        "(1, 1, 192), not (1, 1, 384); "
    )
    assert line.endswith(" more; name the model that the file is of: timm:NAME@FILE")
    (tmp_path / name).write_bytes(b"something else than weights")
    with pytest.raises(RequestError, match=f"^teacher_from={reference}: not a") as refused:
        look_ahead(plan_of(*features, f"teacher_from={reference}"))
    assert len(refused.value.mistakes) == 1


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["backbone.patch_size=8"], "the anchor has patches of 4 px, the student of 8; set backbone.patch_size=4"),
        (STUDENT[2:], "an anchor is of the student's architecture: set backbone as in the run that it comes from"),
    ],
)
def test_look_ahead__an_anchor_of_another_architecture(
    settings: list[str], says: str, plan_of: Callable[..., Plan], teacher: Path
) -> None:
    """Of a checkpoint, or of an earlier stage."""
    with pytest.raises(RequestError, match=f"^teacher_from={teacher}: ") as refused:
        look_ahead(plan_of("objective.gram_weight=1.0", f"teacher_from={teacher}", *settings))
    assert says in str(refused.value) and len(refused.value.mistakes) == 1
    stages = "stages=[{name: before}, {name: gram, teacher_from: before, objective: {gram_weight: 1.0}}]"
    with pytest.raises(RequestError, match=r"^stage gram: teacher_from=before: ") as refused:
        look_ahead(plan_of(stages, *(f"stages[1].{text}" for text in settings)))
    assert says in str(refused.value) and len(refused.value.mistakes) == 1
    differs = {"backbone.patch_size=8": "(backbone.patch_size=8, in before 4)"}
    of_options = "(backbone.options.embed_dim=16, in before 32, backbone.options.depth=1, in before 2)"
    wanted = differs.get(settings[0], of_options)
    assert str(refused.value).endswith(wanted)


def test_run__a_stage_that_would_begin_with_nothing_is_refused(
    plan_of: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drive(*arguments: Any) -> None:
        raise AssertionError("was started")

    monkeypatch.setattr("pretrain.driver.drive.Driver.drive", drive)
    stages = "stages=[{name: before}, {name: after}]"
    with pytest.raises(RequestError) as refused:
        run(plan_of(stages, f"stages[1].{STUDENT[2]}"))
    (line,) = refused.value.mistakes
    assert line == (
        "stage after: init_from=before: no weight of that stage's backbone fits (backbone.options.embed_dim=16, in "
        "before 32, backbone.options.depth=1, in before 2); set backbone as there, or train this stage in a run of its "
        "own"
    )
    assert not (tmp_path / "runs").exists()
    deeper = "stages[1].backbone.options={embed_dim: 32, depth: 3, num_heads: 2, num_reg_tokens: 1, init_values: 0.5}"
    assert len(look_ahead(plan_of(stages, deeper))) == 2  # two blocks of three are those of the stage before


def test_run__with_a_teacher_looks_before_anything_is_started(
    plan_of: Callable[..., Plan], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def drive(*arguments: Any) -> None:
        raise AssertionError("was started")

    monkeypatch.setattr("pretrain.driver.drive.Driver.drive", drive)
    with pytest.raises(RequestError, match="the anchor has patches of 4 px, the student of 8"):
        run(plan_of("objective.gram_weight=1.0", f"teacher_from={teacher}", "backbone.patch_size=8"))
    stages = "stages=[{name: before}, {name: gram, teacher_from: before, objective: {gram_weight: 1.0}}]"
    with pytest.raises(RequestError, match=r"^stage gram: teacher_from=before: the anchor has patches of 4 px"):
        run(plan_of(stages, "stages[1].backbone.patch_size=8"))
    assert not (tmp_path / "runs").exists()


def test_look_ahead__counts_the_frozen_teacher(plan_of: Callable[..., Plan], teacher: Path) -> None:
    """In float32 and whole in every ZeRO stage, whether its run is over or an earlier stage of this one."""
    stages = "stages=[{name: teacher}, {name: student, teacher_from: teacher}]"
    (alone,) = look_ahead(plan_of(*STUDENT, f"teacher_from={teacher}"))
    before, after = look_ahead(plan_of(stages, *(f"stages[1].{text}" for text in STUDENT)))
    assert alone is not None and before is not None and after is not None
    parts = {f"frozen_{part}": load_file(teacher / f"{part}.safetensors") for part in ("backbone", "heads")}
    counts = {name: sum(tensor.numel() for tensor in weights.values()) for name, weights in parts.items()}
    for look in (alone, after):
        assert {name: look.counted.companions[name] for name in counts} == counts
        assert [memory.companions for memory in look.memory] == [4 * sum(look.counted.companions.values())] * 4
        assert look.counted.saved == look.counted.companions["teacher"]  # a training state has nothing of it
        assert look.activations
    assert before.counted.heads == counts["frozen_heads"]  # which lie beside its backbone


def test_dry_run__of_a_student(
    tmp_path: Path, teacher: Path, plan_of: Callable[..., Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    request = ["run", str(tmp_path / "small.yaml"), *STUDENT, f"storage={tmp_path}/runs", "--dry-run"]
    assert main([*request, f"teacher_from={teacher}"]) == 0
    screen = " ".join(capsys.readouterr().out.split())
    assert re.search(r"; teacher \d+; frozen teacher \d+; its heads \d+", screen)
    assert f"teacher {teacher}: step 4, vit_small_patch16_dinov3_qkvb, 16 px, patches of 4 px" in screen
    assert "teacher, frozen teacher, its heads 0.1" in screen
    assert re.search(r"every 2 steps a backbone of [0-9.]+ kB, heads of [0-9.]+ kB and a training state", screen)
    assert main([*request, f"teacher_from={tmp_path}/none"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: teacher_from={tmp_path}/none: no such directory; ") and line.count("/none") == 1


def test_look_ahead__a_teacher_of_an_earlier_stage_has_to_fit_as_well(plan_of: Callable[..., Plan]) -> None:
    stages = "stages=[{name: teacher, objective: {num_prototypes: 12}}, {name: student, teacher_from: teacher}]"
    with pytest.raises(RequestError, match=r"stage student: teacher_from=teacher: the teacher's head has 12 prototyp"):
        look_ahead(plan_of(stages, *(f"stages[1].{text}" for text in STUDENT)))


# Under an engine

STEPS = 4


def _batch(step: int, images: int) -> dict[str, torch.Tensor]:
    """This rank's part of a step's images."""
    generator = torch.Generator().manual_seed(step)
    shapes = {"global_1": (images, 3, 16, 16), "global_2": (images, 3, 16, 16), "local": (2, images, 3, 8, 8)}
    batch = {name: torch.rand(*shape, generator=generator) for name, shape in shapes.items()}
    own = slice(
        dist.get_rank() * images // dist.get_world_size(), (dist.get_rank() + 1) * images // dist.get_world_size()
    )
    batch = {name: views[:, own] if name == "local" else views[own] for name, views in batch.items()}
    return batch | {"seed": torch.arange(images)[own] + 100 * step}


def _recipe(path: Path, teacher: Path, stage: int) -> Recipe:
    workers = dist.get_world_size()
    return load_plan(
        path, [*STUDENT, f"teacher_from={teacher}", f"train.workers={workers}", f"train.zero_stage={stage}"]
    ).recipe


def _engine(recipe: Recipe, run_dir: Path) -> Engine:
    torch.manual_seed(0)
    objective = build_objective(recipe)
    frozen_teachers.fill(Plan.single(recipe), 0, objective, run_dir)
    return Engine(objective, recipe, torch.device("cpu"))


def _distilled(path: Path, teacher: Path, run_dir: Path, stage: int) -> dict[str, Any]:
    """Losses of some steps; those of the second half again, from the checkpoint of the first; what is in it."""
    recipe = _recipe(path, teacher, stage)
    engine, run_dir = _engine(recipe, run_dir), run_dir / f"run-{dist.get_world_size()}-{stage}"
    position = SimpleNamespace(epoch=0, position=16)
    stream: Any = SimpleNamespace(state_at=lambda _: position, order_signature={}, require_order=lambda _: None)

    def train(engine: Engine, steps: range) -> list[float]:
        losses = []
        for step in steps:
            engine.set_schedule(1e-3, 0.05, step)
            result = engine.step([_batch(step, 8)], Progress(step, STEPS))
            assert result.applied
            losses.append(result.mean_over_ranks()["loss"])
        return losses

    losses = train(engine, range(2))
    Publisher(RunDir(run_dir), Stage("", recipe), engine, stream).take(2, is_last=True)
    losses += train(engine, range(2, STEPS))
    _, found = state.find_start(run_dir, recipe)
    assert found is not None
    again = _engine(recipe, run_dir)
    state.restore(found, again, stream, 2)
    repeated = train(again, range(2, STEPS))
    weights = [each.objective.extra_state() for each in (engine, again)]
    same = all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    saved = json.loads((found.path / "checkpoint.json").read_text())
    norms = {name: float(tensor.double().norm()) for name, tensor in weights[0].items()}
    return {"losses": losses, "repeated": repeated, "same": same, "norms": norms, "files": sorted(saved["files"])}


def _every_stage(path: Path, teacher: Path, run_dir: Path) -> dict[str, Any]:
    return {str(stage): _distilled(path, teacher, run_dir, stage) for stage in range(3)}


@pytest.mark.integration
def test_distillation__zero_0_to_2_on_one_and_two_ranks_and_resumed(
    run_on_ranks: Callable[..., Any], teacher: Path, tmp_path: Path
) -> None:
    """Alike on any number of ranks; from a checkpoint, which has nothing of the teacher in it, bit for bit."""
    path = tmp_path / "small.yaml"
    one, two = (run_on_ranks(ranks, _every_stage, path, teacher, tmp_path) for ranks in (1, 2))
    wanted = one["0"]
    for found in (*one.values(), *two.values()):
        assert found["repeated"] == found["losses"][2:] and found["same"]
        assert found["losses"] == pytest.approx(wanted["losses"], rel=2e-5)
        assert found["norms"] == pytest.approx(wanted["norms"], rel=1e-5, abs=1e-6)
        assert all(name.startswith("teacher.") for name in found["norms"])
        assert {"backbone.safetensors", "heads.safetensors"} <= set(found["files"])
