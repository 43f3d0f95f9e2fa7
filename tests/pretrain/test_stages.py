"""Recipes in stages: one resolved recipe per stage, the command line last, and YAML that comes back equal."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pretrain.config.load import load_for_resume, load_plan, load_recipe
from pretrain.config.stages import plan_yaml, written_stages
from pretrain.errors import RequestError

STAGED = """
objective: {name: mae, decoder_dim: 48, decoder_heads: 3}
backbone: {name: vit_tiny_patch16_224, image_size: 64, patch_size: 16, options: {depth: 2}}
data: {train: shards}
optimizer: {lr: 1.0e-3, warmup_steps: 2}
train: {steps: 10, global_batch_size: 32, checkpoint_every: 5}
stages:
  - {name: small}
  - {name: large, backbone: {image_size: 96, options: {depth: 2, embed_dim: 96, num_heads: 3}}, train: {steps: 6}}
  - {name: last, init_from: small, objective: {name: gmml}}
"""


ANCHORED = [f"stages[{index}].objective={{name: dinov3, gram_weight: 1.0}}" for index in (1, 2)]


@pytest.fixture
def staged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "train-000000.tar").touch()
    path = tmp_path / "staged.yaml"
    path.write_text(STAGED)
    return str(path)


def test_load_plan__resolves_one_recipe_per_stage(staged: str) -> None:
    plan = load_plan(staged)
    small, large, last = plan.stages
    assert [stage.name for stage in plan.stages] == ["small", "large", "last"]
    assert [(stage.first_step, stage.last_step) for stage in plan.stages] == [(0, 10), (10, 16), (16, 26)]
    assert (small.recipe.backbone.image_size, large.recipe.backbone.image_size) == (64, 96)
    assert small.recipe.backbone.options == {"depth": 2}  # a mapping of free names is one value
    assert large.recipe.objective == small.recipe.objective
    assert last.recipe.objective.name == "gmml" and not hasattr(last.recipe.objective, "decoder_dim")
    assert [stage.init_from for stage in plan.stages] == [None, 0, 0]
    assert {stage.recipe.name for stage in plan.stages} == {"staged"}
    assert [stage.recipe.train.seed for stage in plan.stages] == [0, 1, 2]
    assert [stage.samples_seen(stage.last_step) for stage in plan.stages] == [320, 512, 832]
    assert plan.total_steps == 26 and plan.recipe is last.recipe
    assert [plan.index_at(step) for step in (0, 10, 11, 16, 17, 26)] == [0, 0, 1, 1, 2, 2]


def test_load_plan__teachers_of_a_stage_or_of_a_step(staged: str) -> None:
    overrides = ["stages[1].teacher_from=small", "stages[1].init_with=teacher", "stages[2].teacher_from=large/15"]
    small, large, last = load_plan(staged, [*overrides, *ANCHORED]).stages
    assert [(stage.teacher_from, stage.teacher_step) for stage in (small, large, last)] == [
        (None, None), (0, None), (1, 15)
    ]  # fmt: skip
    assert [stage.init_with for stage in (small, large, last)] == ["student", "teacher", "student"]
    assert all(stage.recipe.teacher_from is None for stage in (small, large, last))


def test_load_plan__without_stages_is_one_nameless_stage(staged: str, tmp_path: Path) -> None:
    plain = tmp_path / "plain.yaml"
    plain.write_text(STAGED.partition("stages:")[0])
    (stage,) = load_plan(plain).stages
    assert (stage.name, stage.first_step, stage.init_from) == ("", 0, None)
    assert stage.recipe == load_recipe(plain)


def test_load_plan__the_command_line_comes_last(staged: str) -> None:
    same_model = "stages[1].backbone={image_size: 64, options: {depth: 2}}"
    overrides = ["train.steps=4", "stages[1].train.steps=3", same_model, "stages[1].reset_optimizer=false"]
    plan = load_plan(staged, overrides)
    assert [stage.recipe.train.steps for stage in plan.stages] == [4, 3, 4]
    assert [stage.reset_optimizer for stage in plan.stages] == [True, False, True]
    assert [plan.optimizer_steps(index, 6) for index in (0, 1)] == [6, 6]
    assert load_plan(staged, ["stages[1].train={seed: 5}"]).stages[1].recipe.train.seed == 5
    (only,) = load_plan(staged, ["stages=[{name: only, train: {steps: 7}}]"]).stages
    assert (only.name, only.recipe.train.steps) == ("only", 7)
    plan = load_plan(staged, ["train.seed=5", "stages[1].train.seed=3"])
    assert [stage.recipe.train.seed for stage in plan.stages] == [5, 3, 7]
    (plain,) = load_plan(staged, ["stages=[]"]).stages
    assert plain.recipe.train.steps == 10


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["stages[0].train.seed=7", "stages[2].reset_optimizer=true"],
        ["train.seed=0"],  # equal in all, which is not what leaving it out means
        ["stages[1].train.seed=0"],
        ["init_from=shards", "stages[1].init_from=shards", "stages[2].init_from=shards"],
        ["init_from=shards"],
        ["stages=[{}]"],
        ["stages=[{name: only}]"],
        [*ANCHORED, "stages[1].init_with=teacher", "stages[1].teacher_from=small", "stages[2].teacher_from=small/5"],
    ],
)
def test_plan_yaml__comes_back_equal(staged: str, tmp_path: Path, overrides: list[str]) -> None:
    plan = load_plan(staged, overrides)
    saved = tmp_path / "elsewhere" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(plan_yaml(plan))
    assert load_plan(saved) == plan
    if len(plan.stages) == 1:
        return
    text = saved.read_text()
    assert text.count("decoder_dim") == (
        1 if ANCHORED[0] in overrides else 2
    )  # of the stages that have it, since the third has another objective
    assert text.count("global_batch_size") == 1  # what all stages share is said once


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["stages=3"], "command line: stages=3: expected a list of mappings, one of overrides per stage"),
        (["stages[1].name=small"], "stages[1].name=small: named twice; give each stage its own name"),
        (["stages[4].train.steps=3"], "stages[4].train.steps=3: stages has 3 items, counted from 0"),
        (["stages.train.steps=3"], "name one stage and a setting, e.g. stages[0].train.steps=200"),
        (["stages[0].train.workers=3"], "stages[0].train.workers: is one for all stages; set it outside stages"),
        (["stages[0].evaluation.select=x"], "stages[0].evaluation.select: is one for all stages"),
        (
            ["stages[1].init_from=smal"],
            "stages[1].init_from=smal: no earlier stage has that name; did you mean 'small'?",
        ),
        (["stages[1].init_from=last"], "stages[1].init_from=last: that stage comes later; expected an earlier one"),
        (["stages[0].train={steps: 3, workers: 2}"], "stages[0].train.workers: is one for all stages"),
        (
            ["stages[0].train.stepz=3"],
            "stage small: command line: train.stepz=3: unknown setting; did you mean 'train.steps'?",
        ),
        (
            ["stages[1].optimizer.warmup_steps=6"],
            "stage large: command line: optimizer.warmup_steps=6: has to be below train.steps=6",
        ),
        (["stages[0].reset_optimizer=false"], "the first stage has no moments to carry over"),
        (["stages[2].reset_optimizer=false"], "moments are carried over from the stage before only"),
        (
            ["stages[1].reset_optimizer=false", "stages[1].optimizer.betas=[0.5, 0.6]"],
            "stages[1].optimizer.betas=[0.5, 0.6]: was [0.9, 0.95] in the stage before, whose optimizer this one keeps",
        ),
        (["stages[1].reset_optimizer=false"], "stages[1].backbone.image_size=96: was 64 in the stage before"),
        (["stages[1].reset_optimizer=perhaps"], "expected true or false"),
        (["stages[1].init_with=theirs"], "stages[1].init_with=theirs: expected student or teacher"),
        (["stages[0].init_with=teacher"], "stages[0].init_with=teacher: the stage before is the one whose teacher"),
        (["stages[2].init_with=teacher"], "stages[2].init_with=teacher: the stage before is the one whose teacher"),
        (
            ["stages[1].teacher_from=small/7", *ANCHORED[:1]],
            "stages[1].teacher_from=small/7: no checkpoint of that step; stage small has those of steps 5, 10",
        ),
        (
            ["stages[1].teacher_from=smal/5"],
            "command line: stages[1].teacher_from=smal/5: no earlier stage 'smal'; did you mean 'small'?; expected an "
            "earlier stage, STAGE/STEP, or a reference as docs/stages.md lists them, such as timm:NAME@FILE",
        ),
        (["stages[1].teacher_from=smal"], "stages[1].teacher_from=smal: no earlier stage 'smal'; did you mean 'small'"),
        (
            ["stages[2].teacher_from=other/5"],
            "stages[2].teacher_from=other/5: no earlier stage 'other'; earlier stages are small, large; expected",
        ),
        (
            ["stages[1].teacher_from=last/20"],
            "stages[1].teacher_from=last/20: that stage comes later; expected an earl",
        ),
        (
            ["stages[1].teacher_from=large"],
            "stages[1].teacher_from=large: that is this stage itself, which has nothing",
        ),
        (
            ["stages[1].teacher_from=small/five"],
            "stages[1].teacher_from=small/five: 'five' is no step of stage small; expected small/STEP",
        ),
        (
            ["stages=[{name: a}, {name: b, teacher_from: 3}]"],
            "stages[1].teacher_from=3: expected an earlier stage, STAG",
        ),
        (
            ["stages=[{name: a}, {name: b, init_from: 3}]"],
            "stages[1].init_from=3: expected an earlier stage, or a reference",
        ),
    ],
)
def test_load_plan__mistakes_name_the_stage(staged: str, overrides: list[str], line: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_plan(staged, overrides)
    assert any(line in mistake for mistake in caught.value.mistakes), caught.value.mistakes


def test_load_plan__what_all_stages_share_is_wrong_once(staged: str) -> None:
    with pytest.raises(RequestError) as caught:
        load_plan(staged, ["train.zero_stage=4"])
    assert caught.value.mistakes == ("command line: train.zero_stage=4: expected a whole number in [0, 3] or null",)


def test_written_stages__each_with_all_its_settings(staged: str) -> None:
    plan = load_plan(staged)
    found = written_stages(yaml.safe_load(plan_yaml(plan)))
    assert [stage["stage"] for stage in found] == ["small", "large", "last"]
    for ours, stage in zip(found, plan.stages, strict=True):
        assert ours["name"] == "staged"
        assert ours["train"]["steps"] == stage.recipe.train.steps and ours["train"]["seed"] == stage.recipe.train.seed
        assert ours["backbone"]["options"] == stage.recipe.backbone.options
        assert ours["objective"]["name"] == stage.recipe.objective.name
    assert written_stages({"train": {"steps": 3}}) == [{"train": {"steps": 3}}]


def test_load_for_resume__of_stages(staged: str, tmp_path: Path) -> None:
    saved = tmp_path / "run" / "recipe.yaml"
    saved.parent.mkdir()
    saved.write_text(plan_yaml(load_plan(staged)))
    resumed = load_for_resume(saved, ["train.workers=1"])
    assert [stage.recipe.train.workers for stage in resumed.stages] == [1, 1, 1]
    assert [stage.recipe.train.micro_batch_size for stage in resumed.stages] == [16, 16, 16]
    for broken in ("stages: 5", "stages: [null]", "stages: {a: 1}"):
        saved.write_text(saved.read_text().partition("stages:")[0] + broken + "\nstorage: runs")
        with pytest.raises(RequestError, match="expected a list of mappings"):
            load_for_resume(saved, ["train.workers=1"])
