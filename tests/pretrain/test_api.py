"""`import pretrain`: the names of the Python contract, imported when they are used."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest

import pretrain


def test_pretrain__has_the_names_of_the_contract() -> None:
    assert set(pretrain.__all__) == {"RunResult", "__version__", "evaluate", "load_backbone", "resume", "run"}
    for name in ("evaluate", "load_backbone", "resume", "run"):
        assert callable(getattr(pretrain, name))
    assert isinstance(pretrain.RunResult, type)


def test_pretrain__run_stays_a_function_when_the_module_of_that_name_is_imported() -> None:
    code = (
        "import pretrain.run, pretrain.config, sys, types\n"
        "assert isinstance(pretrain.run, types.FunctionType), pretrain.run\n"
        "assert pretrain.run is sys.modules['pretrain.run'].run\n"
        "assert isinstance(pretrain.config, types.ModuleType)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_pretrain__unknown_name_is_an_attribute_error() -> None:
    assert isinstance(pretrain, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = pretrain.runn  # type: ignore[attr-defined]
