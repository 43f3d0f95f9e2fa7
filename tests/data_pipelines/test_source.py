"""What a recipe may say about where its shards are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.source import expand_source


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("train-000000.tar", "train-000001.tar", "train-000002.tar", "val-000000.tar", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "train-000000.tar.index.npz").touch()
    return tmp_path


def names(source: object) -> list[str]:
    return [path.name for path in expand_source(source)]  # type: ignore[arg-type]


def test_expand_source__directory_glob_braces_file_and_list_are_sorted_and_absolute(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = ["train-000000.tar", "train-000001.tar", "train-000002.tar"]
    assert names(str(folder)) == [*train, "val-000000.tar"]
    assert names(folder / "train-*") == train
    assert names(f"{folder}/train-{{000001..000002}}.tar") == train[1:]
    assert names(f"{folder}/{{val,train}}-000000.tar") == [train[0], "val-000000.tar"]
    assert names(f"{folder}/{{val,train}}-*.tar") == [*train, "val-000000.tar"]
    assert names(f"file://{folder}/train-*.tar") == train
    assert names([folder / "val-000000.tar", f"{folder}/train-000000.tar"]) == [train[0], "val-000000.tar"]
    monkeypatch.chdir(folder)
    assert expand_source("val-*.tar") == (folder / "val-000000.tar",)


def test_expand_source__existing_path_is_taken_literally(tmp_path: Path) -> None:
    odd = tmp_path / "run[1]{a}"
    odd.mkdir()
    (odd / "x.tar").touch()
    assert names(odd) == ["x.tar"]
    assert names(odd / "x.tar") == ["x.tar"]


@pytest.mark.parametrize(
    "source",
    ["pipe:echo x > {0}/owned; cat a.tar", "PIPE:cat a.tar", "http://h/a.tar", "s3://b/a.tar", "hf://d/a.tar", "s3:b"],
)
def test_expand_source__refuses_commands_and_remote_schemes(folder: Path, source: str) -> None:
    scheme = source.partition(":")[0]
    with pytest.raises(DataError, match=rf"scheme '{scheme}:' is not supported") as caught:
        expand_source(source.replace("{0}", str(folder)))
    assert "\n" not in str(caught.value)
    assert not (folder / "owned").exists()


def test_expand_source__url_secrets_are_not_repeated() -> None:
    with pytest.raises(DataError) as caught:
        expand_source("https://user:secret@host/a.tar?token=hidden")
    assert "secret" not in str(caught.value) and "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0}/trian-*.tar", "no .tar shard matches {0}/trian-*.tar"),
        ("{0}/train-000009.tar", "no such shard: {0}/train-000009.tar; nearest there: train-000002.tar"),
        ("{0}/train-{{000002..000004}}.tar", "no such shard: {0}/train-000003.tar"),
        ("{0}/train-{{000002..000001}}.tar", "runs backwards"),
        ("{0}/train-{{x}}.tar", "cannot read braces '{{x}}'"),
        ("{0}/empty", "no .tar shard in directory {0}/empty"),
        ("{0}/missing/a.tar", "there is no directory {0}/missing"),
        ("{0}/notes.txt", "is not a plain .tar shard"),
        ("file://otherhost{0}/train-000000.tar", "is not a local file URL"),
        (" ", "an empty string is not a data source"),
    ],
)
def test_expand_source__wrong_sources_are_named_in_one_line(folder: Path, source: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        expand_source(source.format(folder))
    assert message.format(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_expand_source__nothing_and_duplicates(folder: Path) -> None:
    with pytest.raises(DataError, match="the data source is empty"):
        expand_source([])
    with pytest.raises(DataError, match=r"train-000000.tar is named twice"):
        expand_source([str(folder), f"{folder}/train-000000.tar"])


def test_source__imports_neither_torch_nor_numpy() -> None:
    code = "import sys, data_pipelines.source; print([m for m in ('torch', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
