"""Every name of fsspec, s3fs and gcsfs that is not documented: an upgrade that moves one fails here."""

from __future__ import annotations

import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.storage import fsspec_internals
from data_pipelines.storage.fsspec_internals import answer_of_s3, part_of_gcs, path_in, run_on, without_retries

NAMES = {
    "http": ("loop", "set_session", "_strip_protocol"),
    "s3": ("loop", "retries", "split_path", "_call_s3", "_glob", "_info", "_strip_protocol"),
    "gcs": ("loop", "_cat_file", "_glob", "_info", "_strip_protocol"),
}
PACKAGES = {"http": "aiohttp", "s3": "s3fs", "gcs": "gcsfs"}


def filesystem_of(kind: str) -> Any:
    fsspec = pytest.importorskip("fsspec")
    pytest.importorskip(PACKAGES[kind])
    settings = {"gcs": {"token": "anon"}, "s3": {"anon": True}}.get(kind, {})
    return fsspec.filesystem(kind, skip_instance_cache=True, **settings)


@pytest.mark.parametrize(("kind", "names"), NAMES.items())
def test_names__are_there(kind: str, names: tuple[str, ...]) -> None:
    filesystem = filesystem_of(kind)
    assert [name for name in names if not hasattr(filesystem, name)] == []
    coroutines = {name for name in names if name in ("set_session", "_call_s3", "_cat_file", "_glob", "_info")}
    assert {name for name in coroutines if not inspect.iscoroutinefunction(getattr(filesystem, name))} == set()


def test_names__are_all_that_is_used() -> None:
    used = set(re.findall(r"filesystem\.(\w+)", Path(fsspec_internals.__file__).read_text(encoding="utf-8")))
    assert used == {name for names in NAMES.values() for name in names}
    others = [
        path for path in Path(fsspec_internals.__file__).parent.glob("*.py") if path.name != "fsspec_internals.py"
    ]
    private = re.compile(r"filesystem\.(_\w+)|from fsspec\.asyn|set_session|split_path")
    assert [path.name for path in others if private.search(path.read_text(encoding="utf-8"))] == []


def test_info__is_asked_anew_and_versions_are_pinned() -> None:
    for kind in ("s3", "gcs"):
        parameters = inspect.signature(filesystem_of(kind)._info).parameters
        assert "refresh" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    parameters = inspect.signature(filesystem_of("gcs")._cat_file).parameters
    assert list(parameters)[:3] == ["path", "start", "end"] and any(
        p.kind is p.VAR_KEYWORD for p in parameters.values()
    )


@pytest.mark.parametrize("kind", ["s3", "gcs"])
def test_path_in__is_bucket_and_key(kind: str) -> None:
    scheme = {"s3": "s3", "gcs": "gs"}[kind]
    assert path_in(filesystem_of(kind), f"{scheme}://bucket/a/b.tar") == "bucket/a/b.tar"


def test_run_on__the_loop_of_the_file_system() -> None:
    async def added(first: int, second: int) -> int:
        await asyncio.sleep(0)
        return first + second

    assert run_on(filesystem_of("http"), added, 2, 3) == 5


def test_answer_of_s3__asks_once_for_bucket_and_key(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem, asked = without_retries(filesystem_of("s3")), []

    async def call(method: str, **arguments: str) -> dict[str, Any]:
        asked.append((method, arguments))
        return {"Body": b"x"}

    monkeypatch.setattr(filesystem, "_call_s3", call)
    assert run_on(filesystem, answer_of_s3_with_range, filesystem) == {"Body": b"x"}
    assert asked == [("get_object", {"Bucket": "bucket", "Key": "a/b.tar", "Range": "bytes=0-9"})]
    assert filesystem.retries == 1


async def answer_of_s3_with_range(filesystem: Any) -> dict[str, Any]:
    return await answer_of_s3(filesystem, "bucket/a/b.tar", Range="bytes=0-9")


def test_part_of_gcs__of_one_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    filesystem = filesystem_of("gcs")

    async def cat(path: str, start: int, end: int, **arguments: str) -> bytes:
        return f"{path} {start} {end} {arguments}".encode()

    monkeypatch.setattr(filesystem, "_cat_file", cat)
    found = run_on(filesystem, part_of_gcs, filesystem, "bucket/a", 3, 5, "7")
    assert found == b"bucket/a 3 5 {'generation': '7'}"
