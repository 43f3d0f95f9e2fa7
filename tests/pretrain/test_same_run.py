"""`pretrain run RECIPE --run-id ID`: the same command begins a run, goes on with it, and leaves a finished one be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pretrain.cli.main import main
from pretrain.config.load import load_for_resume, load_plan
from pretrain.config.same_run import changes
from pretrain.config.stages import Plan, plan_yaml
from pretrain.driver.drive import Driver
from pretrain.errors import RequestError
from pretrain.record.run_dir import RunDir

STAGED = ["dinov3_cifar10", "data.root=/nowhere", "evaluation.enabled=false"]


def begun(storage: Path, recipe: str, *settings: str) -> RunDir:
    """A run as it is on disk once it has begun."""
    run = RunDir(storage / "mine")
    run.path.mkdir(parents=True)
    run.recipe.write_text(plan_yaml(plan(storage, recipe, *settings)))
    return run


def plan(storage: Path, recipe: str, *settings: str) -> Plan:
    return load_plan(recipe, [f"storage={storage}", *settings], check_files=False)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ([], []),
        (["train.workers=1"], ["train.micro_batch_size=64", "train.workers=1"]),
        (["train.workers=1", "train.micro_batch_size=32"], ["train.accumulation=2", "train.workers=1"]),
        (["train.steps=400"], ["train.steps=400"]),
        (["train.epochs=30"], ["train.steps=347"]),  # what passes over the data come to
        (["tracking.also=[tensorboard]"], ['tracking.also=["tensorboard"]']),
        (["cluster.address=auto"], ["cluster.address=auto"]),
        (["data.cache_dir=null", "data.fetch=shard"], ["data.fetch=shard"]),
    ],
)
def test_changes__what_a_resume_takes_is_passed_on(asked: list[str], told: list[str], tmp_path: Path) -> None:
    run = begun(tmp_path, "demo")
    wanted = plan(tmp_path, "demo", *asked)
    assert changes(load_for_resume(run.recipe, ()), wanted, "mine") == told
    assert load_for_resume(run.recipe, told) == wanted


def test_changes__another_recipe_under_the_name_is_refused_by_its_settings(tmp_path: Path) -> None:
    run = begun(tmp_path, "demo")
    wanted = plan(tmp_path, "demo", "optimizer.base_lr=0.5", "backbone.image_size=96", "train.workers=1")
    with pytest.raises(RequestError) as refused:
        changes(load_for_resume(run.recipe, ()), wanted, "mine")
    lines = refused.value.mistakes
    assert [line.partition("=")[0] for line in lines[:-1]] == ["backbone.image_size", "optimizer.base_lr"]
    assert "optimizer.base_lr=0.5: run mine has " in lines[1] and "give another --run-id" in lines[-1]


def test_changes__references_were_pinned_when_the_run_began(tmp_path: Path) -> None:
    run = begun(tmp_path, "demo", "init_from=models:/demo/3")
    recorded = load_for_resume(run.recipe, ())
    assert changes(recorded, plan(tmp_path, "demo", "init_from=models:/demo@best"), "mine") == []
    with pytest.raises(RequestError, match=r"init_from=null: run mine has models:/demo/3"):
        changes(recorded, plan(tmp_path, "demo"), "mine")


def test_changes__of_stages(tmp_path: Path) -> None:
    recorded = plan(tmp_path, *STAGED)
    assert changes(recorded, plan(tmp_path, *STAGED), "mine") == []
    assert changes(recorded, plan(tmp_path, *STAGED, "train.workers=1"), "mine") == ["train.workers=1"]
    with pytest.raises(RequestError, match=r"stages\[1\]\.train\.steps=7: run mine has 1500"):
        changes(recorded, plan(tmp_path, *STAGED, "stages[1].train.steps=7"), "mine")
    with pytest.raises(RequestError, match="has the stages pretrain, gram, highres, the recipe none"):
        changes(recorded, plan(tmp_path, "demo"), "mine")


def test_run__begins_goes_on_and_refuses_by_run_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driven: list[tuple[str, int]] = []

    def drive(self: Any, on_start: Any) -> None:
        driven.append((self.run_dir.run_id, self.recipe.train.workers))
        self.run_dir.logs.mkdir(exist_ok=True)
        self._write_recipe()

    monkeypatch.setattr(Driver, "drive", drive)
    settings = (f"storage={tmp_path}",)
    assert main(["run", "demo", *settings, "--run-id", "mine"]) == 0
    assert main(["run", "demo", *settings, "train.workers=1", "--run-id", "mine"]) == 0
    assert driven == [("mine", 2), ("mine", 1)]
    assert main(["run", "demo", *settings, "train.seed=5", "--run-id", "mine"]) == 2
    assert len(driven) == 2


def test_run__a_name_that_something_else_has_is_refused_and_what_a_killed_driver_left_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def drive(self: Any, on_start: Any) -> None:
        raise RequestError("refused later")

    monkeypatch.setattr(Driver, "drive", drive)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    (tmp_path / "left" / "logs").mkdir(parents=True)
    (tmp_path / "left" / ".driver.lock").touch()
    command = ["run", "demo", f"storage={tmp_path}", "--run-id"]
    assert main([*command, "photos"]) == 2
    assert "photos is there, and is no run" in capsys.readouterr().err
    assert main([*command, "left"]) == 2
    assert "refused later" in capsys.readouterr().err
    assert (tmp_path / "left").is_dir()  # of another process, which may be at work there
    assert main([*command, "new"]) == 2 and not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", ["a/b", "..", "-x", "a" * 101, "a b", "x\ny"])
def test_run__bad_run_id_is_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "demo", f"storage={tmp_path}", "--run-id", name]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --run-id ") and "names a directory" in line
    assert list(tmp_path.iterdir()) == []


def test_dry_run__says_whether_the_run_begins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "demo", f"storage={tmp_path}", "--dry-run", "--run-id", "mine"]
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run       mine: begins"
    begun(tmp_path, "demo")
    assert main(command) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "run       mine: goes on"
