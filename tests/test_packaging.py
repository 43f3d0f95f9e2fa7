"""What an installation contains: the six packages and their data, nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"backbones", "cluster", "data_pipelines", "evaluation", "objectives", "pretrain"}
BUILD_INPUTS = ("pyproject.toml", "README.md", "LICENSE", *sorted(PACKAGES), "tests")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in BUILD_INPUTS:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=ignored)
        else:
            shutil.copy(path, source / name)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", "."]
    result = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.mark.slow
def test_wheel__holds_exactly_the_six_packages_and_their_data(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == PACKAGES
    expected = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert "pretrain/py.typed" in names and "pretrain/recipes/demo.yaml" in names


@pytest.mark.slow
def test_wheel__command_licence_and_size(wheel: zipfile.ZipFile) -> None:
    members = {name.split(".dist-info/")[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "pretrain = pretrain.cli:console" in wheel.read(members["entry_points.txt"]).decode()
    metadata = wheel.read(members["METADATA"]).decode()
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata
    assert wheel.read(members["licenses/LICENSE"]) == (ROOT / "LICENSE").read_bytes()
    demo_bytes = sum(info.file_size for info in wheel.infolist() if info.filename.startswith("pretrain/demo_data/"))
    assert 0 < demo_bytes <= 6 * 1024 * 1024


def test_version__is_the_same_everywhere() -> None:
    import pretrain

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == pretrain.__version__
    assert f"## [{pretrain.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["runtime", "dev"])
def test_requirements__are_exact_pins_of_every_dependency(name: str) -> None:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9a-z.]*", line) for line in pins)
    pinned = {line.partition("==")[0] for line in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + (project["optional-dependencies"]["dev"] if name == "dev" else [])
    names = {re.match(r"[\w-]+", text).group().lower() for text in wanted}  # type: ignore[union-attr]
    assert names <= pinned


def test_requirements__dev_holds_runtime() -> None:
    pins = {name: set((ROOT / "requirements" / f"{name}.txt").read_text().splitlines()) for name in ("runtime", "dev")}
    assert pins["runtime"] <= pins["dev"]
