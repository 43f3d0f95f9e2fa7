"""Places that a user names for what is to be written: which are refused, in one line with the path as it was given."""

from __future__ import annotations

from pathlib import Path

import pytest

from pretrain.cli.main import main
from pretrain.errors import RequestError
from pretrain.record.destinations import require_local

NOWHERE = "/proc/x"  # no place for files, whatever the permissions say
WRITING = {
    "export": ["export", "runs:/one", "DEST", "--format", "timm"],
    "embed": ["embed", "runs:/one", "photos", "DEST"],
    "pull": ["pull", "one@best", "DEST"],
    "data pack": ["data", "pack", "photos", "DEST"],
    "data show": ["data", "show", "{demo}", "-o", "DEST.png"],
    "init": ["init", "photos", "-o", "DEST.yaml"],
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").touch()
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_require_local__is_absolute_and_leaves_nothing(here: Path) -> None:
    before = names(here)
    assert require_local("new/deep/file", "a thing") == here / "new" / "deep" / "file"
    assert names(here) == before


@pytest.mark.parametrize(
    ("dest", "said"),
    [
        ("", "the destination is empty; name where a thing is to be written"),
        ("s3://bucket/x", "s3://bucket/x: a thing is written to a local disk"),
        ("photos/a.jpg/x/y", "photos/a.jpg/x/y: {}/photos/a.jpg is no folder; choose another destination"),
        ("/proc/x/y", "/proc/x/y: a thing cannot be written there: No such file"),
        (f"{'x' * 300}/y", f"{'x' * 300}/y: a thing cannot be written there: File name too long"),
    ],
)
def test_require_local__says_why_not(here: Path, dest: str, said: str) -> None:
    with pytest.raises(RequestError) as refused:
        require_local(dest, "a thing")
    (line,) = refused.value.mistakes
    assert line.startswith(said.replace("{}", str(here)))


@pytest.mark.parametrize("command", WRITING)
def test_commands__a_destination_that_takes_nothing_is_one_line(
    here: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = str(Path(__file__).parents[2] / "pretrain" / "demo_data" / "grocery")
    arguments = [word.replace("DEST", NOWHERE).replace("{demo}", demo) for word in WRITING[command]]
    before = names(here)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert NOWHERE in line and ".tmp" not in line and "/.pretrain-" not in line
    assert names(here) == before


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["export", "runs:/one", "", "--format", "timm"], "DEST"),
        (["embed", "runs:/one", "", "out"], "DATA"),
        (["pull", "one@best", ""], "DEST"),
        (["pull", "one@best", "there", "--storage", ""], "--storage"),
        (["data", "pack", "photos", ""], "DEST"),
        (["data", "show", "photos", "-o", ""], "--output"),
        (["data", "verify", "photos", ""], "SOURCE..."),
        (["init", ""], "DATA"),
        (["resume", ""], "RUN_ID"),
        (["report", ""], "RUN_ID"),
        (["recipes", ""], "NAME"),
    ],
)
def test_commands__nothing_is_no_name(
    here: Path, arguments: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = names(here)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"error: {name} is empty; give a value (is a variable of the shell unset?)\n"
    assert names(here) == before
