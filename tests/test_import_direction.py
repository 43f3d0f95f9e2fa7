"""Who may import whom, and what must stay cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
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
# Rooms of a package from the ground up: a file may import its own room and those of earlier rows, not its neighbors in
# a row. A room is a folder or a file of the package itself; those that no row names are together the room "".
ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "data_pipelines": (
        ("",),
        ("storage",),
        ("shards",),
        ("views",),
        ("streaming",),
        ("packing", "inspection"),
        ("radiance",),
    ),
    "evaluation": (
        ("protocol", "keys", "lease", "threads", "progress"),
        ("comparison",),
        ("metrics",),
        ("selection", "results", "features", "data"),
        ("extraction",),
        ("pooling",),
        ("protocols",),
        ("registry", "floor"),
        ("suites", "runner"),
        ("pictures",),
        ("extract", ""),
    ),
    "pretrain": (
        ("errors", "version", "screen", "processes"),
        ("remote",),
        ("record", "config"),
        ("tracking", "machine"),
        ("checkpoints",),
        ("training", "evaluations", "comparisons", "exports", "embeddings"),
        ("reporting", "known_checkpoints", "schedules", "sweeps"),
        ("worker", "photos", "radiance", "deployment", "doctor"),
        ("driver", "jobs"),
        ("cli",),
        ("",),
    ),
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
    "pretrain.schedules.service",
    "pretrain.sweeps.sweep",
    "pretrain.jobs.supervisor",
    "objectives",
    "objectives.registry",
    "objectives.dino.config",
    "objectives.mae.config",
    "objectives.nerf_mae.config",
    "objectives.uni4eye.config",
    "objectives.volume_mae.config",
    "objectives.parts.settings",
    "backbones",
    "backbones.images.config",
    "backbones.images.timm_names",
    "backbones.voxels.config",
    "backbones.registry",
    "cluster",
    "cluster.manifests.kuberay",
    "cluster.job_server",
    "evaluation",
    "evaluation.extraction.recipe",
    "evaluation.protocol",
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


def import_graph(package: str) -> dict[str, set[str]]:
    """Modules of a package -> those of its own that they import at run time, wherever in the file."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted((ROOT / package).rglob("*.py"))
    }

    def imported(path: Path) -> Iterator[str]:
        names = [
            name for node in run_time_nodes(ast.parse(path.read_text(encoding="utf-8"))) for name in names_of(node)
        ]
        for name in names:
            while name and name not in modules:  # `from package.module import name`
                name = name.rpartition(".")[0]
            yield name

    return {module: set(imported(path)) & modules.keys() - {module} for module, path in modules.items()}


def run_time_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only type checkers see."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            for other in node.orelse:
                yield other
                yield from run_time_nodes(other)
        else:
            yield from run_time_nodes(node)


def names_of(node: ast.AST) -> list[str]:
    """Full names that an import statement may mean; none for other nodes."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []


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


@pytest.mark.parametrize("package", ROOMS)
def test_imports__no_arrow_upward_between_the_rooms_of_a_package(package: str) -> None:
    rows = ROOMS[package]
    height = {room: number for number, row in enumerate(rows) for room in row}
    assert {room for room in height if room} <= {path.stem for path in (ROOT / package).iterdir()}

    def room_of(module: str) -> str:
        if module.endswith(".__main__"):  # a program on top of everything, wherever it lies
            return ""
        room = module.split(".")[1] if "." in module else ""
        return room if room in height else ""

    wrong = []
    for module, imported in import_graph(package).items():
        here = room_of(module)
        for other in sorted(imported):
            there = room_of(other)
            if there != here and height[there] >= height[here]:
                wrong.append(f"{module} imports {other}")
    assert wrong == []


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports__no_circle_between_the_files_of_a_package(package: str) -> None:
    try:
        TopologicalSorter(import_graph(package)).prepare()
    except CycleError as error:
        pytest.fail(f"these import each other: {' <- '.join(error.args[1])}")


def test_import_graph__sees_what_functions_import_and_not_what_types_need(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a.py").write_text("def f():\n    from toy.b import x\n")
    (package / "b.py").write_text("from toy import c\nfrom toy.c import y\n")
    (package / "c.py").write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import toy.a\nelse:\n    import toy\n"
    )
    monkeypatch.setattr("tests.test_import_direction.ROOT", tmp_path)
    assert import_graph("toy") == {"toy": set(), "toy.a": {"toy.b"}, "toy.b": {"toy.c"}, "toy.c": {"toy"}}


def test_imports__the_command_line_reads_recipes_only_when_it_is_asked_to() -> None:
    read = ("omegaconf", "pretrain.config.load")
    code = f"import sys, pretrain.cli.main; print(*[name for name in {read!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


@pytest.mark.parametrize("module", CHEAP)
def test_imports__cheap_modules_import_nothing_heavy(module: str) -> None:
    code = f"import sys, {module}; print(*[name for name in {HEAVY!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == []
