"""What a run starts from: the order, what references mean, and what is refused before anything heavy starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pretrain.checkpoints import initialization, store
from pretrain.checkpoints.initialization import Start, checked, find_training_state, find_weights, starting_point
from pretrain.config.load import load_plan, load_recipe
from pretrain.config.schema import Recipe
from pretrain.errors import RequestError
from pretrain.tracking.client import MlflowRun, connect

RUN_ID = "tiny-20260101-000000-0001"
SPEC = {"library": "timm", "name": "vit_tiny_patch16_224"}
MakeCheckpoint = Callable[[Path, int], Path]


@pytest.mark.parametrize(
    ("own", "resume_from", "init_from", "expected"),
    [
        ("a", "b", "c", Start("resume", "a")),
        ("a", None, "c", Start("resume", "a")),
        ("a", "b", None, Start("resume", "a")),
        ("a", None, None, Start("resume", "a")),
        (None, "b", "c", Start("resume_from", "b")),
        (None, "b", None, Start("resume_from", "b")),
        (None, None, "c", Start("init_from", "c")),
        (None, None, None, Start("scratch")),
    ],
)
def test_starting_point__resume_then_resume_from_then_init_from_then_scratch(
    own: str | None, resume_from: str | None, init_from: str | None, expected: Start
) -> None:
    assert starting_point(own=own, resume_from=resume_from, init_from=init_from) == expected


@pytest.fixture
def run_dir(storage: Path, mlflow_uri: str, make_checkpoint: MakeCheckpoint) -> Path:
    """A run with checkpoints of steps 10 and 20, versions 1 and 2 of a registered model; 10 is the best."""
    run_dir = storage / RUN_ID
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("name: tiny\nevaluation:\n  select: linear/photos/top1\n")
    run = MlflowRun.bind(connect(mlflow_uri), mlflow_uri, "pretrain", RUN_ID, 0, None)
    for step in (10, 20):
        checkpoint = make_checkpoint(run_dir, step)
        change(checkpoint, backbone=SPEC, objective="mae", zero_stage=1, world_size=2)
        run.register(checkpoint, step, "tiny", {"run_id": RUN_ID})
    run.promote("tiny", "1")
    return run_dir


def change(checkpoint: Path, **facts: Any) -> None:
    path = checkpoint / "checkpoint.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))


@pytest.fixture
def recipe(storage: Path) -> Recipe:
    settings = ["backbone.name=vit_tiny_patch16_224", "train.steps=40", f"storage={storage}"]
    return load_recipe("demo", ["backbone.options={}", "train.zero_stage=1", *settings])


@pytest.mark.parametrize(
    ("reference", "step"),
    [
        (RUN_ID, 20),
        (f"runs:/{RUN_ID}", 20),
        (f"runs:/{RUN_ID}/10", 10),
        ("{storage}/" + RUN_ID, 20),
        ("{storage}/" + RUN_ID + "/checkpoints/step-00000010", 10),
        ("file://{storage}/" + RUN_ID + "/checkpoints/step-00000010", 10),
        ("models:/tiny@best", 10),
        ("tiny@best", 10),
        ("models:/tiny/2", 20),
    ],
)
def test_checked__every_form_is_pinned_to_what_it_means_now(
    run_dir: Path, storage: Path, recipe: Recipe, reference: str, step: int
) -> None:
    reference = reference.format(storage=storage)
    pinned = checked(replace(recipe, init_from=reference), storage / "new").init_from
    assert pinned is not None
    found = find_weights(pinned, storage)
    manifest = json.loads((found.file.parent / "checkpoint.json").read_text())
    assert manifest["step"] == step and found.sha256 == manifest["files"]["backbone.safetensors"]["sha256"]
    run = MlflowRun.bind(connect(f"sqlite:///{storage}/mlflow.db"), "", "pretrain", RUN_ID, 0, None)
    run.promote("tiny", "2")  # whatever moves later
    assert find_weights(pinned, storage).sha256 == found.sha256
    if "models" in pinned:
        assert pinned == f"models:/tiny/{step // 10}"
    elif "://" in pinned:
        assert pinned == f"file://{store.checkpoint_path(run_dir, step)}"
    else:  # by the run, not by its place: the storage may be moved
        assert pinned == f"runs:/{RUN_ID}/{step}"


def test_checked__resume_from_takes_the_newest_training_state(run_dir: Path, storage: Path, recipe: Recipe) -> None:
    assert find_training_state(RUN_ID, storage).step == 20
    (run_dir / "checkpoints/step-00000020/training_state.removed").write_text("")
    asked = replace(recipe, resume_from=RUN_ID, init_from="models:/nothing")  # which resume_from comes before
    assert checked(asked, storage / "new").resume_from == f"runs:/{RUN_ID}/10"


def test_checked__a_run_with_a_checkpoint_of_its_own_needs_neither(
    run_dir: Path, storage: Path, recipe: Recipe, make_checkpoint: MakeCheckpoint
) -> None:
    asked = replace(recipe, init_from="runs:/gone", resume_from="runs:/gone")
    assert checked(asked, run_dir) == asked
    with pytest.raises(RequestError, match="resume_from=runs:/gone: no run 'gone'"):
        checked(asked, storage / "new")


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"init_from": "runs:/tiny-2026"}, r"init_from=runs:/tiny-2026: no run 'tiny-2026' in .*; there are: tiny-"),
        ({"init_from": "models:/tinny"}, r"init_from=models:/tinny: no registered model 'tinny'; did you mean 'tiny'"),
        ({"init_from": "/no/such"}, "init_from=/no/such: no such directory"),
        ({"init_from": "/no/such.safetensors"}, r"init_from=/no/such\.safetensors: .*no such file"),
        ({"init_from": "timm:vit_tinny_patch16_224"}, r"has no model 'vit_tinny_patch16_224'; did you mean 'vit_tiny"),
        ({"init_from": "timm:vit_tiny_patch16_224"}, r"not in the local cache, and nothing is downloaded .*@FILE"),
        ({"init_from": "timm:vit_tiny_patch16_224@/w.pth"}, r"/w\.pth: no such file"),
        ({"resume_from": "models:/tiny"}, r"resume_from=models:/tiny: .*a training state is not in the registry"),
        ({"resume_from": f"runs:/{RUN_ID}/30"}, "no checkpoint of step 30; there are: 10, 20"),
    ],
)
def test_checked__what_is_not_there_is_one_line(
    run_dir: Path, storage: Path, recipe: Recipe, asked: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(storage / "empty"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *asked: None)
    with pytest.raises(RequestError, match=says) as refused:
        checked(replace(recipe, **asked), storage / "new")
    assert len(refused.value.mistakes) == 1 and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("facts", "key", "says"),
    [
        ({"backbone": SPEC | {"name": "vit_small_patch16_224"}}, "init_from", "holds a backbone vit_small_patch16_224"),
        ({"backbone": SPEC | {"kind": "points"}}, "init_from", "of kind points, the recipe has .* of kind image"),
        ({"backbone": SPEC | {"name": "vit_small_patch16_224"}}, "resume_from", "holds a backbone vit_small"),
        ({"objective": "dino"}, "resume_from", "taken with objective.name=dino, the recipe has mae"),
        ({"zero_stage": 3}, "resume_from", "taken with train.zero_stage=3, the recipe has 1"),
        ({"step": 40}, "resume_from", "at step 40; train.steps=40 leaves nothing to do"),
    ],
)
def test_checked__what_does_not_fit_is_one_line(
    run_dir: Path, storage: Path, recipe: Recipe, facts: dict[str, Any], key: str, says: str
) -> None:
    checkpoint = run_dir / "checkpoints/step-00000020"
    change(checkpoint, **facts)
    with pytest.raises(RequestError, match=f"{key}=.*{says}"):
        checked(replace(recipe, **{key: str(checkpoint)}), storage / "new")


def test_checked__damaged_weights_are_refused(run_dir: Path, storage: Path, recipe: Recipe) -> None:
    weights = run_dir / "checkpoints/step-00000020/backbone.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(RequestError, match=r"init_from=.*backbone\.safetensors: contents differ from the SHA-256"):
        checked(replace(recipe, init_from=RUN_ID), storage / "new")


def test_find_weights__files_and_the_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"norm.weight": np.ones(4, np.float32)}, file)
    plain = find_weights(str(file), tmp_path)
    assert plain.file == file and plain.spec == {} and len(plain.sha256) == 64
    named = find_weights(f"timm:vit_tiny_patch16_224@{file}", tmp_path)
    assert (named.file, named.spec["name"]) == (file, "vit_tiny_patch16_224")
    import huggingface_hub

    asked: list[tuple[str, str]] = []

    def cache(repository: str, name: str) -> str | None:
        asked.append((repository, name))
        return str(file) if name == "model.safetensors" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cache)
    assert find_weights("timm:vit_tiny_patch16_224.augreg_in21k", tmp_path).file == file
    assert asked == [("timm/vit_tiny_patch16_224.augreg_in21k", "model.safetensors")]


def test_load_recipe__paths_in_references_are_made_absolute_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some run").mkdir()
    for written, expected in (
        ("runs:/x/3", "runs:/x/3"),
        ("models:/x@best", "models:/x@best"),
        ("x@best", "x@best"),
        ("s3://bucket/run/step-00000001", "s3://bucket/run/step-00000001"),
        ("a.safetensors", f"{tmp_path}/a.safetensors"),
        ("runs/x", f"{tmp_path}/runs/x"),
        ("some run", f"{tmp_path}/some run"),
        ("timm:vit_tiny_patch16_224", "timm:vit_tiny_patch16_224"),
        ("timm:vit_tiny_patch16_224@a.safetensors", f"timm:vit_tiny_patch16_224@{tmp_path}/a.safetensors"),
    ):
        recipe = load_recipe("demo", [f"init_from={written}", f"resume_from={written}"])
        assert (recipe.init_from, recipe.resume_from) == (expected, expected)


def test_load_plan__a_stage_may_start_from_a_reference(tmp_path: Path) -> None:
    plan = load_plan("demo", ["stages=[{name: a, init_from: 'runs:/x'}, {name: b}, {name: c, init_from: a}]"])
    assert [(stage.init_from, stage.recipe.init_from) for stage in plan.stages] == [
        (None, "runs:/x"),
        (0, None),
        (0, None),
    ]


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("runs", "expected a URI such as s3://BUCKET/PREFIX"),
        ("s33://bucket", "fsspec knows no s33://; did you mean 's3'?"),
        ("memory://x", "holds what one process writes"),
        ("s3://user:secret@bucket/x", "user, password and query belong in the environment"),
    ],
)
def test_load_recipe__checkpoint_storage_is_checked(uri: str, says: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_recipe("demo", [f"checkpoints.storage={uri}"])
    assert says in str(refused.value) and "secret" not in str(refused.value)
    assert load_recipe("demo", ["checkpoints.storage=s3://bucket/x"]).checkpoints.storage == "s3://bucket/x"


@pytest.mark.parametrize("key", ["init_from", "teacher_from", "resume_from"])
@pytest.mark.parametrize("uri", ["s3://me:pass@word@bucket/x", "https://host/x.safetensors?signature=secret"])
def test_references__credentials_in_them_are_refused_and_not_repeated(key: str, uri: str) -> None:
    with pytest.raises(RequestError) as refused:
        load_recipe("demo", [f"{key}={uri}"])
    (line,) = [line for line in refused.value.mistakes if "belong in the environment" in line]
    assert line.startswith(f"command line: {key}=") and not {"me", "word", "secret"} & set(re.findall(r"\w+", line))


def test_checked__imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from dataclasses import replace
from pretrain.checkpoints.initialization import checked
from pretrain.config.load import load_recipe
from pretrain.errors import RequestError
recipe = load_recipe("demo", ["storage=" + sys.argv[1]])
for key in ("init_from", "resume_from"):
    try:
        checked(replace(recipe, **{key: "runs:/none"}), Path(sys.argv[1]) / "new")
    except RequestError:
        continue
    raise SystemExit("accepted")
assert not {"mlflow", "torch", "ray", "deepspeed", "timm"} & sys.modules.keys()
"""
    root = Path(initialization.__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": str(root)}, check=True)
