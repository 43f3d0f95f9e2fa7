"""`import pretrain`: the names of the Python contract, imported when they are used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pretrain


def test_pretrain__has_the_names_of_the_contract() -> None:
    assert set(pretrain.__all__) == {
        "RunResult",
        "__version__",
        "embed",
        "evaluate",
        "export",
        "load_backbone",
        "resume",
        "run",
    }
    for name in ("embed", "evaluate", "export", "load_backbone", "resume", "run"):
        assert callable(getattr(pretrain, name))
    assert isinstance(pretrain.RunResult, type)


def test_pretrain__unknown_name_is_an_attribute_error() -> None:
    assert isinstance(pretrain, ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'runn'"):
        _ = pretrain.runn  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["evaluation.py", "objectives.py", "data_pipelines/__init__.py"])
def test_import__a_file_of_the_user_that_shadows_a_package_is_named(tmp_path: Path, name: str) -> None:
    """It was an ImportError about a name inside the package."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("# my helpers\n")
    (tmp_path / "script.py").write_text("import pretrain\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(pretrain.__file__).parents[1])}
    said = {}
    for how in (["script.py"], ["-m", "pretrain", "recipes"], ["-m", "pretrain.worker"]):
        done = subprocess.run(
            [sys.executable, *how], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        said[how[-1]] = (done.returncode, done.stderr.splitlines()[-1])
        assert how[0] == "script.py" or len(done.stderr.splitlines()) == 1
    line = f"{tmp_path / name} is taken for the package '{name.partition('/')[0].removesuffix('.py')}'"
    assert {text.partition(": ")[2].startswith(line) for _, text in said.values()} == {True}, said
    assert [code for code, _ in said.values()] == [1, 2, 2]
