from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from importlib.metadata import EntryPoint

import pytest

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
    for name in registry.OBJECTIVES:
        loaded = registry.load(name)
        assert issubclass(loaded, Objective)
        assert loaded.Config is registry.config_class(name)
        assert loaded.Config().name == name


def test_load__unknown_name_says_the_nearest():
    with pytest.raises(ObjectiveError, match=r"'mea' is not known; did you mean 'mae'\? known: .*mae"):
        registry.load("mea")
    with pytest.raises(ObjectiveError, match="not known"):
        registry.config_class("nothing like it")


def test_load__plugins_come_from_entry_points(entry):
    entry("theirs", "objectives.mae.objective:MAE")
    assert registry.names() == tuple(sorted((*registry.OBJECTIVES, "theirs")))
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


def test_registry__imports_no_torch():
    code = (
        "import sys; import objectives; from objectives import registry; registry.names(); "
        "registry.config_class('mae')(); assert not {'torch', 'timm', 'numpy'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
