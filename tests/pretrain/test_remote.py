"""Remote storages: where their working copies are, who may drive a run, and files that are copied both ways."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pretrain.errors import RequestError, RunFailed
from pretrain.remote import lease
from pretrain.remote.folder import RemoteFolder, answering
from pretrain.remote.lease import EXPIRY_S, Lease, LeaseHeld, LeaseLost
from pretrain.remote.mirror import Mirror
from pretrain.remote.places import shown_storage, storage_problem, uri_of, working_copy


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RemoteFolder]:
    """A folder in the memory of this process."""
    yield RemoteFolder(f"memory:/{tmp_path}")
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists(str(tmp_path)):
        filesystem.rm(str(tmp_path), recursive=True)


# Places ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("uri", ["s3://bucket", "s3://bucket/a/b", "gs://b/a.b/[c] d", "sftp://host:22/runs"])
def test_working_copy__and_its_storage_are_read_off_each_other(
    uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    folder = working_copy(uri)
    assert folder.is_relative_to(tmp_path / "runs") and uri_of(folder) == uri == shown_storage(folder)
    assert working_copy(f"{uri}/") == folder
    assert list(tmp_path.iterdir()) == []


def test_uri_of__other_directories_are_of_no_remote_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    for folder in (tmp_path, tmp_path / "cache", tmp_path / "cache/runs", tmp_path / "cache/runs/s3", Path("runs")):
        assert uri_of(folder) is None and shown_storage(folder) == str(folder)
    monkeypatch.delenv("PRETRAIN_CACHE")
    monkeypatch.setenv("HOME", "~")  # no home directory
    assert uri_of(tmp_path) is None


@pytest.mark.parametrize(
    ("uri", "problem"),
    [
        ("s33://bucket", "fsspec knows no s33://; did you mean 's3'?"),
        ("s3://", "expected a URI such as s3://BUCKET/PREFIX"),
        ("memory://x", "holds what one process writes"),
        ("s3://user:secret@bucket/x", "user, password and query belong in the environment"),
        ("file:///data/runs", "is on a disk; give the directory itself: /data/runs"),
        ("https://host/runs", "cannot be written to"),
        ("s3://bucket/../other", "has an empty part, '.' or '..' in its path"),
        ("s3://bucket//runs", "has an empty part"),
    ],
)
def test_storage_problem__places_without_runs(uri: str, problem: str) -> None:
    assert problem in (storage_problem(uri) or "")
    with pytest.raises(RequestError) as refused:
        working_copy(uri)
    assert problem in str(refused.value) and "secret" not in str(refused.value)


def test_answering__tells_who_is_to_blame_in_one_line() -> None:
    for error, kind in ((PermissionError("no"), RequestError), (ConnectionError("down\nlast"), RunFailed)):
        line = r"^storage=s3://b/x: \w+: (no|last); `pretrain doctor --storage s3://b/x`"
        with pytest.raises(kind, match=line), answering("s3://b/x"):
            raise error


# Leases ---------------------------------------------------------------------------------------------------------------


class Machine:
    """A working copy and the lease that it asks for; time passes while it waits, and then `meanwhile` happens."""

    def __init__(self, folder: RemoteFolder, path: Path, now: Callable[[], float] = lambda: 1000.0) -> None:
        path.mkdir()
        self.waited, self.said = 0.0, list[str]()
        self.meanwhile: Callable[[], object] = lambda: None
        self.lease = Lease(folder, "driver.json", path / "token", wait=self._wait, clock=now)

    def take(self) -> None:
        self.lease.take(self.said.append)

    def _wait(self, seconds: float) -> None:
        self.waited += seconds
        assert self.waited < 3 * EXPIRY_S
        self.meanwhile()


def test_lease__a_live_holder_keeps_it_and_is_named(folder: RemoteFolder, tmp_path: Path) -> None:
    first, second = Machine(folder, tmp_path / "a"), Machine(folder, tmp_path / "b")
    first.take()
    assert first.said == [] and first.waited == 0 and first.lease.is_mine() and not second.lease.is_mine()
    second.meanwhile = first.lease.refresh
    with pytest.raises(LeaseHeld, match=r"^process \d+ of .+"):
        second.take()
    assert second.waited < EXPIRY_S and len(second.said) == 1 and first.lease.is_mine()


def test_lease__is_taken_from_a_machine_that_died_which_sees_it_when_it_wakes(
    folder: RemoteFolder, tmp_path: Path
) -> None:
    first, second = Machine(folder, tmp_path / "a"), Machine(folder, tmp_path / "b", now=lambda: -1000.0)
    first.take()
    second.take()
    assert EXPIRY_S <= second.waited < EXPIRY_S + 10 and second.lease.is_mine() and not first.lease.is_mine()
    for act in (first.lease.refresh, first.lease.end, first.lease.withdraw):
        with pytest.raises(LeaseLost):
            act()
    second.lease.refresh()


def test_lease__nobody_waits_for_an_end_that_was_said_nor_for_itself_nor_for_the_distant_past(
    folder: RemoteFolder, tmp_path: Path
) -> None:
    first, second = Machine(folder, tmp_path / "a"), Machine(folder, tmp_path / "b")
    first.take()
    first.take()  # a process that was killed, and the next one in its working copy
    first.lease.end()
    second.take()
    late = Machine(folder, tmp_path / "c", now=lambda: 1000.0 + 2 * lease.FORGOTTEN_S)
    late.take()
    assert first.said == second.said == late.said == [] and late.lease.is_mine()
    late.lease.withdraw()
    assert late.lease.holder() is None


def test_lease__of_two_who_take_it_at_once_one_has_it(folder: RemoteFolder, tmp_path: Path) -> None:
    dead, first, second = (Machine(folder, tmp_path / name) for name in "abc")
    dead.take()

    def other_takes_it_too() -> None:
        if first.waited > EXPIRY_S:  # the first has written, and looks once more
            first.meanwhile = lambda: None
            second.lease._held = None
            second.take()

    first.meanwhile = other_takes_it_too
    folder_now = dead.lease.holder()
    assert folder_now is not None
    second.lease._watch = lambda found: None  # type: ignore[method-assign]  # it has waited as long
    with pytest.raises(LeaseLost):
        first.take()
    assert second.lease.is_mine()


def test_lease__the_same_token_twice_is_seen(folder: RemoteFolder, tmp_path: Path) -> None:
    """A working copy that was copied to another machine."""
    first, second = Machine(folder, tmp_path / "a"), Machine(folder, tmp_path / "b")
    first.take()
    (tmp_path / "b/token").write_text((tmp_path / "a/token").read_text())
    second.take()
    second.lease.refresh()
    with pytest.raises(LeaseLost):
        first.lease.refresh()


def test_lease__a_damaged_one_is_named(folder: RemoteFolder, tmp_path: Path) -> None:
    folder.write("driver.json", b'{"token": 1')
    with pytest.raises(ValueError, match=r"driver.json: damaged; delete it if nothing drives the run"):
        Machine(folder, tmp_path / "a").take()


# Files ----------------------------------------------------------------------------------------------------------------


def put_recorded(folder: RemoteFolder, monkeypatch: pytest.MonkeyPatch, dies_after: int | None = None) -> list[str]:
    """What is put into the store from now on; the process dies before the next file after `dies_after`."""
    real, names = folder.put, list[str]()

    def put(path: Path, name: str) -> str:
        if len(names) == dies_after:
            raise KeyboardInterrupt
        names.append(name)
        return real(path, name)

    monkeypatch.setattr(folder, "put", put)
    return names


def test_push__sends_what_has_changed_those_that_are_told_of_first(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("recipe", "journal", "logs/a"):
        (tmp_path / name).write_text(name)
    names = put_recorded(folder, monkeypatch)
    mirror = Mirror(tmp_path, folder)
    order = ["recipe", "gone", "journal", "logs/a"]
    mirror.push(order)
    assert names == ["logs/a", "journal", "recipe"]
    assert [folder.read(name) for name in names] == [b"logs/a", b"journal", b"recipe"]
    (tmp_path / "journal").write_text("journal and more")
    Mirror(tmp_path, folder).push(order)  # as another process of this machine
    assert names[3:] == ["journal"] and folder.read("journal") == b"journal and more"
    mirror.push(order)
    assert len(names) == 4


def test_push__killed_between_any_two_files_the_store_never_has_more_told_than_it_has(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`cursor` says how many bytes of `journal` were read; both grow while they are sent."""
    journal, cursor = tmp_path / "journal", tmp_path / "cursor"
    real, sent = folder.put, itertools.count()

    def grow() -> None:
        with journal.open("ab") as file:
            file.write(b"line\n")
        cursor.write_text(json.dumps(journal.stat().st_size))

    def put(path: Path, name: str) -> str:
        grow()
        if next(sent) % 3 == 2:
            raise KeyboardInterrupt
        return real(path, name)

    monkeypatch.setattr(folder, "put", put)
    killed = 0
    for _ in range(20):
        grow()
        try:
            Mirror(tmp_path, folder).push(["cursor", "journal"])
        except KeyboardInterrupt:
            killed += 1
        assert json.loads(folder.read("cursor") or b"0") <= len(folder.read("journal") or b"")
    assert killed > 5 and len(folder.read("journal") or b"") > 100


def test_push__what_the_store_has_lost_is_an_error_and_sent_again(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "journal").write_text("journal")
    filesystem, _ = folder._opened
    real = filesystem.put_file
    monkeypatch.setattr(filesystem, "put_file", lambda path, name: filesystem.pipe_file(name, b"jour"))
    with pytest.raises(OSError, match="journal: was written, and the store has 4 of its 7 bytes"):
        Mirror(tmp_path, folder).push(["journal"])
    monkeypatch.setattr(filesystem, "put_file", real)
    Mirror(tmp_path, folder).push(["journal"])
    assert folder.read("journal") == b"journal"


def test_fetch__copies_what_has_changed_and_is_wanted(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("recipe", "secret", "logs/a", "other/b"):
        folder.write(name, name.encode())
    here, got = tmp_path / "run", list[str]()
    real = folder.get

    def get(name: str, dest: Path) -> None:
        got.append(name)
        real(name, dest)

    monkeypatch.setattr(folder, "get", get)
    fetch: Any = (("", "logs", "nothing"), lambda name: name != "secret")
    Mirror(here, folder).fetch(*fetch)
    assert sorted(path.name for path in here.rglob("*") if path.name[0] != ".") == ["a", "logs", "recipe"]
    assert (here / "logs/a").read_bytes() == b"logs/a"
    folder.write("recipe", b"other")
    Mirror(here, folder).fetch(*fetch)
    Mirror(here, folder).fetch(*fetch)
    assert got == ["recipe", "logs/a", "recipe"] and (here / "recipe").read_bytes() == b"other"
    (here / "logs/a").unlink()
    Mirror(here, folder).fetch(*fetch)
    assert got[3:] == ["logs/a"]
    names = put_recorded(folder, monkeypatch)
    Mirror(here, folder).push(["recipe", "logs/a"])
    assert names == []  # nothing has changed here since


def test_fetch__one_that_is_interrupted_leaves_the_file_as_it_was(
    folder: RemoteFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipe").write_text("mine")
    folder.write("recipe", b"theirs")

    def get(name: str, dest: Path) -> None:
        dest.write_text("the")
        raise ConnectionError

    monkeypatch.setattr(folder, "get", get)
    with pytest.raises(ConnectionError):
        Mirror(tmp_path, folder).fetch([""], lambda name: True)
    assert (tmp_path / "recipe").read_text() == "mine"
    assert not list(tmp_path.glob(".mirror-*"))


def test_folder__of_an_object_store(s3: Any, tmp_path: Path) -> None:
    """The stamp of a listing is that of a look at the file: what was sent is not fetched again."""
    folder = RemoteFolder("s3://data/runs")
    assert folder.files() == {} and folder.folders() == [] and folder.read("a") is None
    (tmp_path / "a").write_bytes(b"a" * 10)
    stamp = folder.put(tmp_path / "a", "one/a")
    folder.write("top", b"t")
    assert folder.folders() == ["one"] and list(folder.files()) == ["top"]
    assert folder.inside("one").files() == {"a": stamp} == folder.files("one") | {}
    folder.inside("one").write("a", b"b" * 10)
    assert folder.files("one")["a"] != stamp and folder.read("one/a") == b"b" * 10
    folder.remove("one/a")
    assert folder.read("one/a") is None
    with pytest.raises(RequestError, match=r"^storage=s3://nowhere: FileNotFoundError: "), answering("s3://nowhere"):
        RemoteFolder("s3://nowhere/runs").write("a", b"")
