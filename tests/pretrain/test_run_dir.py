"""One file spells the names in a run directory, and one says what a run is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from pretrain.errors import RequestError
from pretrain.record.run_dir import RunDir, find_run, runs_in

ROOT = Path(__file__).parents[2]
# What a run directory holds. A new file belongs into RunDir, and its name here.
NAMES = (
    "journal.jsonl",
    "evaluations.jsonl",
    "recipe.yaml",
    "mlflow.json",
    "mlflow.lock",
    "tracking-rejected.jsonl",
    "report.html",
    "driver.log",
    ".driver.lock",
    "backbone.safetensors",
    "heads.safetensors",
    "checkpoint.json",
)


def make_run(storage: Path, run_id: str) -> RunDir:
    run = RunDir(storage / run_id)
    run.path.mkdir(parents=True)
    run.recipe.touch()
    return run


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of the string constants of a file, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    prose = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in prose:
            yield node.lineno, node.value


def test_run_dir__nobody_else_spells_its_names() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} spells {text!r}"
        for path in sorted((ROOT / "pretrain").rglob("*.py"))
        if path != ROOT / "pretrain/record/run_dir.py"
        for line, text in literals(path)
        if any(name in text for name in NAMES)
    ]
    assert wrong == []


def test_run_dir__spells_what_the_test_looks_for() -> None:
    spelled = {text for _, text in literals(ROOT / "pretrain/record/run_dir.py")}
    assert set(NAMES) <= spelled


def test_runs_in__holds_what_has_a_recipe(tmp_path: Path) -> None:
    assert runs_in(tmp_path / "nowhere") == []
    second, first = make_run(tmp_path, "mae-2"), make_run(tmp_path, "mae-1")
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "mae-3").mkdir()
    RunDir(tmp_path / "mae-3").journal.touch()
    assert runs_in(tmp_path) == [first, second]
    assert first.is_run and not RunDir(tmp_path / "mae-3").is_run


def test_find_run__names_the_nearest_or_the_newest(tmp_path: Path) -> None:
    for number in range(1, 11):
        make_run(tmp_path, f"mae-{number:02d}")
    assert find_run("mae-03", tmp_path) == RunDir(tmp_path / "mae-03")
    with pytest.raises(RequestError, match=r"run mea-03: not in .*; did you mean 'mae-03'\?$"):
        find_run("mea-03", tmp_path)
    with pytest.raises(RequestError, match=r"; there are: mae-03, .*, mae-10$"):
        find_run("xyz", tmp_path)
    with pytest.raises(
        RequestError, match=r"a setting, and the run comes first: pretrain resume RUN_ID train.workers=1"
    ):
        find_run("train.workers=1", tmp_path)
    with pytest.raises(RequestError, match=r"; there are: none$"):
        find_run("xyz", tmp_path / "nowhere")


def test_run_dir__names_files_in_events_and_finds_them_again(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "mae-1")
    name = run.relative(run.visualizations(20))
    assert name == "visualizations/step-00000020.png" and run.inside(name) == run.visualizations(20).resolve()
    for outside in ("../mae-2/recipe.yaml", "/etc/passwd", "a/../../b"):
        with pytest.raises(ValueError, match="outside the run directory"):
            run.inside(outside)
