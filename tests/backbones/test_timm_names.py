from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint

import pytest

import backbones
from backbones.errors import BackboneError
from backbones.images import timm_names as names


@pytest.fixture
def entry(monkeypatch):
    """Installs entry points for one test; the caches of what is installed are emptied before and after."""
    caches = (names.plugins, names.model_names)

    def install(*points: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, names.ENTRY_POINT_GROUP) for name, value in points]
        monkeypatch.setattr(names, "entry_points", lambda group: found if group == names.ENTRY_POINT_GROUP else [])
        for cache in caches:
            cache.cache_clear()

    yield install
    for cache in caches:
        cache.cache_clear()


def test_model_names__equal_timms_own_list():
    import timm

    assert set(names.model_names()) == set(timm.list_models())
    assert list(names.model_names()) == sorted(names.model_names())


def test_model_names__need_neither_torch_nor_timm():
    code = (
        "import sys; import backbones; from backbones.images.timm_names import model_names; n = model_names(); "
        "assert not {'torch', 'timm', 'numpy'} & sys.modules.keys(), 'heavy import'; print(len(n))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(output) > 1000


def test_model_names__include_plugins(entry):
    entry(("my_vit", "mine.models:my_vit"))
    assert "my_vit" in names.model_names()
    assert names.plugins()["my_vit"].value == "mine.models:my_vit"


@pytest.mark.parametrize("points", [[("vit_tiny_patch16_224", "a:b")], [("mine", "a:b"), ("mine", "c:d")]])
def test_plugins__duplicate_names_are_refused(entry, points):
    entry(*points)
    with pytest.raises(BackboneError, match="already taken"):
        names.model_names()


def test_package__every_public_name_resolves():
    for name in backbones.__all__:
        assert getattr(backbones, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        _ = backbones.nonsense
