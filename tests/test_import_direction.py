"""Who may import whom, and what must stay cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MAY_IMPORT: dict[str, set[str]] = {
    "data_pipelines": set(),
    "backbones": set(),
    "cluster": set(),
    "objectives": {"backbones"},
    "evaluation": {"backbones", "data_pipelines"},
    "pretrain": {"data_pipelines", "backbones", "objectives", "evaluation", "cluster"},
}
OURS = {*MAY_IMPORT, "tests", "benchmarks", "scripts"}
ONLY_CLUSTER = {"ray"}
LOOP = ("pretrain/worker.py", "pretrain/training/engine.py")  # also started by torchrun: knows neither Ray nor MLflow
HEAVY = ("torch", "numpy", "ray", "mlflow", "deepspeed", "timm", "torchvision")
CHEAP = (
    "pretrain",
    "pretrain.cli.main",
    "pretrain.config.load",
    "pretrain.errors",
    "objectives",
    "objectives.registry",
    "objectives.configs",
    "backbones",
    "backbones.images.timm_names",
    "cluster",
    "evaluation",
    "evaluation.registry",
    "data_pipelines",
    "data_pipelines.shards.source",
)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports__only_along_the_allowed_edges(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    forbidden = OURS - MAY_IMPORT[package] - {package}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for line, name in imports(path)
        if name.split(".")[0] in forbidden or name.startswith(".")
    ]
    assert wrong == []


def test_imports__ray_only_in_cluster_and_neither_ray_nor_mlflow_in_the_loop() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for package in MAY_IMPORT
        if package != "cluster"
        for path in (ROOT / package).rglob("*.py")
        for line, name in imports(path)
        if name.split(".")[0] in ONLY_CLUSTER
    ]
    wrong += [
        f"{file}:{line} imports {name}"
        for file in LOOP
        for line, name in imports(ROOT / file)
        if name.split(".")[0] in {"ray", "mlflow", "cluster"}
    ]
    assert wrong == []


def test_imports__every_edge_of_the_table_exists_without_a_cycle() -> None:
    order = list(MAY_IMPORT)
    assert all(order.index(imported) < order.index(package) for package in order for imported in MAY_IMPORT[package])


@pytest.mark.parametrize("module", CHEAP)
def test_imports__cheap_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
