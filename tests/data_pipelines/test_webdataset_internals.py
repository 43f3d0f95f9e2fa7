"""Every name of webdataset that is not documented: an upgrade that moves one fails here."""

from __future__ import annotations

import inspect
import io
import tarfile

import pytest

from data_pipelines.streaming.webdataset_internals import grouped_members, split_name


def tar_of(*names: str) -> io.BytesIO:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    file.seek(0)
    return file


def test_tariterators__take_what_is_handed_to_them() -> None:
    from webdataset import tariterators

    assert "select_files" in inspect.signature(tariterators.tar_file_expander).parameters
    assert inspect.signature(tariterators.group_by_keys).parameters["lcase"].default is True
    assert list(inspect.signature(tariterators.base_plus_ext).parameters) == ["path"]


def test_grouped_members__one_sample_for_each_run_of_a_key() -> None:
    names = ("d/0.A", "d/0.b.c", "1.a", "none", "d/0.a")
    samples = list(grouped_members(tar_of(*names), "here", lambda name: True))
    assert samples == [
        {"__key__": "d/0", "__url__": "here", "a": b"d/0.A", "b.c": b"d/0.b.c"},
        {"__key__": "1", "__url__": "here", "a": b"1.a"},
        {"__key__": "d/0", "__url__": "here", "a": b"d/0.a"},
    ]


def test_grouped_members__asks_by_whole_name_and_reads_nothing_else() -> None:
    asked: list[str] = []
    samples = list(grouped_members(tar_of("0.a", "0.b"), "u", lambda name: asked.append(name) or name == "0.b"))  # type: ignore[func-returns-value]
    assert asked == ["0.a", "0.b"] and samples == [{"__key__": "0", "__url__": "u", "b": b"0.b"}]


@pytest.mark.parametrize(
    ("name", "parts"),
    [("d.x/0.seg.png", ("d.x/0", "seg.png")), ("0.A", ("0", "A")), ("none", (None, None)), (".a", (None, None))],
)
def test_split_name__at_the_first_dot_of_the_base(name: str, parts: tuple[str | None, str | None]) -> None:
    assert split_name(name) == parts
