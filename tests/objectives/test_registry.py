from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest

import objectives
from objectives import registry
from objectives.base import Objective
from objectives.errors import ObjectiveError
from objectives.mae.config import MAEConfig


@pytest.fixture
def entry(monkeypatch):
    """Installs one entry point for a test; the cache of what is installed is emptied before and after."""

    def install(name: str, value: str) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint(name, value, group)])
        registry._all.cache_clear()

    yield install
    registry._all.cache_clear()


def test_load__every_built_in_is_an_objective_with_its_config():
    assert "mae" in registry.names()
    for name in registry.built_in_names():
        loaded = registry.load(name)
        assert issubclass(loaded, Objective)
        assert loaded.Config is registry.config_class(name)
        assert loaded.Config().name == name


def test_load__unknown_name_says_the_nearest():
    with pytest.raises(ObjectiveError, match=r"'mea' is not known; known: .*; did you mean 'mae'\?"):
        registry.load("mea")
    with pytest.raises(ObjectiveError, match="not known"):
        registry.config_class("nothing like it")


def test_load__plugins_come_from_entry_points(entry):
    entry("theirs", "objectives.mae.objective:MAE")
    assert registry.names() == tuple(sorted((*registry.built_in_names(), "theirs")))
    assert registry.config_class("theirs") is MAEConfig


def test_load__broken_plugin_is_named(entry):
    entry("theirs", "no_such_package.objective:Theirs")
    with pytest.raises(ObjectiveError, match=r"'theirs': cannot import no_such_package\.objective:Theirs"):
        registry.load("theirs")


def test_names__duplicate_is_refused(entry):
    entry("mae", "theirs:MAE")
    with pytest.raises(ObjectiveError, match="already taken"):
        registry.names()


def test_config__every_number_has_a_range_that_holds_its_default():
    for field in fields(MAEConfig):
        value = getattr(MAEConfig(), field.name)
        if isinstance(value, int | float | list) and not isinstance(value, bool):
            low, high = field.metadata["range"]
            assert all(low <= item <= high for item in (value if isinstance(value, list) else [value]))
        assert field.name == "name" or field.metadata["help"]


CONFIG = """
from dataclasses import dataclass, field


@dataclass
class ToyConfig:
    name: str = "toy"
    width: int = field(default=8, metadata={"range": (1, 64), "help": "of the head"})
"""
OBJECTIVE = """
from typing import ClassVar

from objectives.base import Objective
from PACKAGE.config import ToyConfig


class Toy(Objective):
    Config: ClassVar[type] = ToyConfig
"""


def make_folder(directory, package):
    directory.mkdir()
    files = {"__init__.py": "", "config.py": CONFIG, "objective.py": OBJECTIVE.replace("PACKAGE", package)}
    for name, text in files.items():
        (directory / name).write_text(text)


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """A new folder of the package of objectives, which nobody was told of."""
    make_folder(tmp_path / "toy_folder", "objectives.toy_folder")
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    for cached in (registry._built_in, registry._all):
        cached.cache_clear()
    yield tmp_path / "toy_folder"
    monkeypatch.undo()
    for cached in (registry._built_in, registry._all):
        cached.cache_clear()
    for module in [name for name in sys.modules if name.startswith("objectives.toy_folder")]:
        del sys.modules[module]


def test_folder__is_an_objective_without_being_told_of(folder):
    assert {"toy", "mae"} <= set(registry.built_in_names()) and "parts" not in registry.names()
    assert registry.config_class("toy")().width == 8
    assert "objectives.toy_folder.objective" not in sys.modules
    assert registry.load("toy").__name__ == "Toy" and registry.load("toy").Config is registry.config_class("toy")


def test_folder__settings_of_the_same_name_are_refused(folder):
    (folder / "config.py").write_text(CONFIG.replace('"toy"', '"mae"'))
    with pytest.raises(ObjectiveError, match=r"^objective 'mae' of \S+ is already taken by objectives\.\w+$"):
        registry.names()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.py", "x = 1", r"config\.py: needs one dataclass with name: str, and has 0 of them"),
        ("config.py", CONFIG + CONFIG.replace("Toy", "Other"), r"config\.py: needs one dataclass .* has 2 of them"),
        ("objective.py", "class Toy: pass", r"objective\.py: needs one class with Config = ToyConfig, and has 0"),
    ],
)
def test_folder__that_is_incomplete_is_named(folder, file, text, message):
    (folder / file).write_text(text)
    with pytest.raises(ObjectiveError, match=message):
        registry.load("toy")


def test_folder__of_another_package_is_found_by_its_entry_point(tmp_path):
    """In a process of its own, since it must not have imported torch."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "__init__.py").write_text("")
    make_folder(tmp_path / "theirs" / "toy", "theirs.toy")
    info = tmp_path / "theirs-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[pretrain.objectives]\ntoy = theirs.toy\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from objectives import registry; "
        "assert 'toy' in registry.names() and 'toy' not in registry.built_in_names(); "
        "assert registry.config_class('toy')().width == 8; assert 'torch' not in sys.modules; "
        "assert registry.load('toy').__module__ == 'theirs.toy.objective'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_registry__imports_no_torch():
    code = (
        "import sys; import objectives; from objectives import registry; registry.names(); "
        "[registry.config_class(name)() for name in registry.names()]; "
        "assert not {'torch', 'timm', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
