"""Rooms and arrows of the house, measured from the import lines: the picture in docs/architecture.md and its numbers.

A room is a file or a folder directly inside a package; an arrow says that some file of one room imports from another.
Imports for type checking alone are left out, imports inside functions count.

    python scripts/import_graph.py [ROOT]        one line per package: rooms, arrows, circles; then each room's arrows
"""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("data_pipelines", "backbones", "cluster", "objectives", "evaluation", "pretrain")
Graph = dict[str, set[str]]


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of what a file imports: modules, and `module.name` for what may be one."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and ast.unparse(branch.test) == "TYPE_CHECKING"
        for child in branch.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms_of(root: Path, package: str) -> Graph:
    """Room -> the other rooms of the package that it imports from."""
    folder = root / package
    rooms = {path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    rooms -= {"__init__", "__main__"}
    graph: Graph = {room: set() for room in sorted(rooms)}
    for path in sorted(folder.rglob("*.py")):
        room = path.relative_to(folder).parts[0].removesuffix(".py")
        if room in graph and path.name != "__main__.py":  # a program stands on top, wherever it lies
            targets = {name.split(".")[1] for name in imported_modules(path) if name.startswith(f"{package}.")}
            graph[room] |= (targets & rooms) - {room}
    return graph


def circles(graph: Graph) -> list[set[str]]:
    """Groups of rooms that reach each other."""
    reach = {room: _reachable(graph, room) for room in graph}
    groups = {frozenset(other for other in reach[room] if room in reach[other]) for room in graph}
    return [set(group) for group in groups if len(group) > 1]


def _reachable(graph: Graph, start: str) -> set[str]:
    seen, waiting = set(), [start]
    while waiting:
        for target in graph[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def levels(graph: Graph) -> list[list[str]]:
    """Rooms from the lowest up: each level imports from those before it only (rooms of a circle share one)."""
    height: dict[str, int] = {}
    groups = {room: next((group for group in circles(graph) if room in group), {room}) for room in graph}

    def measure(room: str) -> int:
        if room not in height:
            below = {target for member in groups[room] for target in graph[member]} - groups[room]
            height[room] = 1 + max((measure(target) for target in below), default=-1)
        return height[room]

    found: dict[int, list[str]] = defaultdict(list)
    for room in graph:
        found[measure(room)].append(room)
    return [sorted(found[level]) for level in sorted(found)]


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    graphs = {package: rooms_of(root, package) for package in PACKAGES}
    print(f"{'package':16}{'files':>7}{'rooms':>7}{'arrows':>8}{'circles':>9}")
    for package, graph in graphs.items():
        files = len(list((root / package).rglob("*.py")))
        arrows = sum(map(len, graph.values()))
        print(f"{package:16}{files:7}{len(graph):7}{arrows:8}{len(circles(graph)):9}")
    for package, graph in graphs.items():
        print(f"\n{package}/, the lowest rooms first")
        for level in levels(graph):
            for room in level:
                print(f"  {room:20} -> {', '.join(sorted(graph[room])) or '(nothing)'}")


if __name__ == "__main__":
    main()
