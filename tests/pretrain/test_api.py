"""`import pretrain`: the names of the Python contract, imported when they are used."""

from __future__ import annotations

from types import ModuleType

import pytest

import pretrain


def test_pretrain__has_the_names_of_the_contract() -> None:
    assert set(pretrain.__all__) == {"RunResult", "__version__", "evaluate", "load_backbone", "resume", "run"}
    for name in ("evaluate", "load_backbone", "resume", "run"):
        assert callable(getattr(pretrain, name))
    assert isinstance(pretrain.RunResult, type)


def test_pretrain__unknown_name_is_an_attribute_error() -> None:
    assert isinstance(pretrain, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = pretrain.runn  # type: ignore[attr-defined]
