from __future__ import annotations

from dataclasses import make_dataclass
from importlib.metadata import EntryPoint

import pytest

from objectives import registry
from objectives.base import Objective
from objectives.errors import ObjectiveError


@pytest.fixture
def plugin(monkeypatch):
    """Makes an object the plug-in "theirs"; the cache of what is installed is emptied before and after."""

    def install(thing: object) -> None:
        monkeypatch.setattr(registry, "entry_points", lambda group: [EntryPoint("theirs", "their.module:Thing", group)])
        monkeypatch.setattr(EntryPoint, "load", lambda self: thing)
        registry._all.cache_clear()

    yield install
    registry._all.cache_clear()


def test_load__plugin_is_found_with_its_settings(plugin):
    settings = make_dataclass("Settings", [("name", str, "theirs")])
    theirs = type("Theirs", (Objective,), {"Config": settings})
    plugin(theirs)
    assert "theirs" in registry.names()
    assert registry.load("theirs") is theirs
    assert registry.config_class("theirs") is settings


@pytest.mark.parametrize("thing", [dict, "text", make_dataclass("Settings", [("name", str, "theirs")])])
def test_load__plugin_that_is_no_objective_is_refused(plugin, thing):
    plugin(thing)
    with pytest.raises(ObjectiveError, match=r"^objective 'theirs': their\.module:Thing is not a subclass of"):
        registry.load("theirs")


@pytest.mark.parametrize(
    "config", [{}, {"Config": dict}, {"Config": make_dataclass("Settings", [("ratio", float, 0.5)])}]
)
def test_load__plugin_without_settings_is_refused(plugin, config):
    plugin(type("Theirs", (Objective,), config))
    with pytest.raises(ObjectiveError, match="needs a class attribute Config: a dataclass of its settings, with name"):
        registry.config_class("theirs")
