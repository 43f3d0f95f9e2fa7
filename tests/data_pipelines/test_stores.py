"""Bytes by location: local files, object stores (a local S3 server), commands."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry

from data_pipelines.errors import DataError, TooLargeError
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.credentials import whole_url
from data_pipelines.storage.locations import redact, redacted, sibling
from data_pipelines.storage.stores import FetchOptions, Store

BLOCK = 50_000
CONTENT = np.random.default_rng(0).integers(0, 256, 4 * BLOCK + 123, np.uint8).tobytes()


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., FetchOptions]:
    def make(**changes: Any) -> FetchOptions:
        defaults = {"cache_dir": str(tmp_path / "cache"), "block_bytes": BLOCK, "retries": 1, "timeout_s": 5.0}
        return FetchOptions(**{**defaults, "deadline_s": 20.0, **changes})

    return make


# Local.


def test_local__ranges_sizes_and_absent_files(tmp_path: Path) -> None:
    file, store = tmp_path / "a.tar", Store()
    file.write_bytes(CONTENT)
    assert store.size(str(file)) == len(CONTENT)
    assert store.read(str(file), 7, 100) == CONTENT[7:107]
    assert store.local_copy(str(file)) == file
    assert store.read_file(str(file), len(CONTENT)) == CONTENT
    with pytest.raises(TooLargeError, match=rf"{file}: has more than {len(CONTENT) - 1} bytes"):
        store.read_file(str(file), len(CONTENT) - 1)
    assert store.read_file(str(tmp_path / "b.index"), 9) is None
    assert store.prefetch([(str(file), 0, 10)]) is None
    with pytest.raises(DataError, match=rf"{file}: needs bytes 200100\.\.200200, the file ends at 200123; it was cut"):
        store.read(str(file), 200_100, 100)
    with pytest.raises(DataError, match=r"cannot open shard .*b.tar: No such file"):
        store.size(str(tmp_path / "b.tar"))
    with pytest.raises(DataError, match=r"b.tar at offset 3: cannot read: No such file"):
        store.read(str(tmp_path / "b.tar"), 3, 1)


def test_local__store_survives_pickling_closing_and_forking(tmp_path: Path) -> None:
    file, store = tmp_path / "a.tar", Store()
    file.write_bytes(CONTENT)
    assert store.read(str(file), 0, 5) == CONTENT[:5]
    copy = pickle.loads(pickle.dumps(store))
    store.close()
    assert copy.read(str(file), 5, 5) == CONTENT[5:10]
    child = os.fork()
    if child == 0:
        os._exit(0 if copy.read(str(file), 9, 9) == CONTENT[9:18] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read(str(file), 0, 5) == CONTENT[:5]


def test_local__more_files_than_descriptors_are_kept_open(tmp_path: Path) -> None:
    store = Store()
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        (tmp_path / f"{number}.tar").write_bytes(str(number).encode())
        assert store.read(str(tmp_path / f"{number}.tar"), 0, 1) == str(number)[:1].encode()
    assert len(os.listdir("/proc/self/fd")) <= before + 256
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_local__threads_read_more_files_than_are_kept_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.storage.stores._MAX_OPEN_FILES", 2)
    contents = [bytes([number]) * 100_000 for number in range(6)]
    for number, content in enumerate(contents):
        (tmp_path / f"{number}.tar").write_bytes(content)
    before, interval = len(os.listdir("/proc/self/fd")), sys.getswitchinterval()
    store = Store()

    def read(seed: int) -> int:
        numbers = [seed * turn % 6 for turn in range(2000)]
        return sum(store.read(str(tmp_path / f"{n}.tar"), n, 90_000) != contents[n][:90_000] for n in numbers)

    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert list(pool.map(read, (1, 5, 7, 11, 13, 17))) == [0] * 6
    finally:
        sys.setswitchinterval(interval)
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    store.close()
    assert len(os.listdir("/proc/self/fd")) <= before


def test_location__neither_path_nor_url(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^a.tar is neither an absolute path nor a URL of http, https, s3, gs or gcs$"):
        Store(FetchOptions(cache_dir=str(tmp_path))).read("a.tar", 0, 1)


# Options and locations.


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "blocks"}, "fetch mode 'blocks' is unknown; allowed are auto, range and shard"),
        ({"retries": -1}, "retries at least 0"),
        ({"timeout_s": 0.0}, "must be positive"),
        ({"cache_bytes": 10}, "a cache of 10 bytes cannot hold one block of 4194304; raise data.cache_gb"),
    ],
)
def test_fetch_options__wrong_values_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        FetchOptions(**wrong)


def test_fetch_options__folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path))
    assert FetchOptions().folder == tmp_path / "shards"
    assert FetchOptions(cache_dir="/elsewhere").folder == Path("/elsewhere")
    monkeypatch.delenv("PRETRAIN_CACHE")
    assert FetchOptions().folder == Path.home() / ".cache" / "pretrain" / "shards"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pass@h:1/d/a.tar?sig=x#y", "https://h:1/d/a.tar"),
        ("cannot get http://u@h/a?t=1, nor s3://k:s@data/x", "cannot get http://h/a nor s3://data/x"),
        ("s3://data/train-0?.tar", "s3://data/train-0?.tar"),
        ("s3://data/a.tar?versionId=1", "s3://data/a.tar"),
        ("/local/a?b@c.tar", "/local/a?b@c.tar"),
        ("https://me:pa:ss@host/path@x", "https://host/path@x"),
        ("https://me@corp.org:p@ss@host/a", "https://host/a"),
        ("s3://AKIA:ab/cd+e/f@bucket/train.tar", "s3://bucket/train.tar"),
        ("cannot get s3://me:p/a@bucket: 403", "cannot get s3://bucket: 403"),
        ("https://me:p@s/s@host:8080/a.tar?x=1", "https://host:8080/a.tar"),
        ("https://me:p?s#s@host/a.tar", "https://host/a.tar"),
        ("https://me:p/s@[::1]:80/a.tar", "https://[::1]:80/a.tar"),
        ("https://host:8080/a@b/c.tar", "https://host:8080/a@b/c.tar"),
        ("https://[::1]:8080/a@b/c.tar", "https://[::1]:8080/a@b/c.tar"),
        ("https://host/a@b/c.tar?user=x:y@z/w", "https://host/a@b/c.tar"),
        ("http://a:1/b@x,http://me:pw@h/c", "http://a:1/b@x,http://h/c"),
        ("postgresql+psycopg://me:p/w@host:5432/db?password=x&sslkey=/k", "postgresql+psycopg://host:5432/db"),
        ("sqlite:////a/b@c/mlflow.db", "sqlite:////a/b@c/mlflow.db"),
        ("gs://bucket/a.tar?token=x;y&z", "gs://bucket/a.tar"),
        ("https://h/a.tar?a=1&sig='x'y&b=2#f", "https://h/a.tar"),
        ("cannot get 'https://h/a.tar?sig=x', 'http://h/b?k=2'", "cannot get 'https://h/a.tar', 'http://h/b'"),
        ("postgresql://me:p@a/b@db.corp", "postgresql://db.corp"),
        ("postgresql://me:p@a/b@db:5432", "postgresql://db:5432"),
    ],
)
def test_redact__no_user_and_no_query(text: str, shown: str) -> None:
    assert redact(text) == shown


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("https://me:p@s/s@host:8080/a-{0..9}.tar?sig=x&x=1", "https://***@host:8080/a-{0..9}.tar?***"),
        ("HTTPS://token@host/a.tar", "HTTPS://***@host/a.tar"),
        ("s3://data/train-?.tar", "s3://data/train-?.tar"),
        ("s3://data/a.tar?versionId=1", "s3://data/a.tar?***"),
        ("pipe:curl -s https://me:pw@h/a.tar?t=1", "pipe:curl -s https://***@h/a.tar?***"),
        ("/local/a?b@c.tar", "/local/a?b@c.tar"),
    ],
)
def test_redact__what_is_stored_says_where_something_is_left_out(text: str, stored: str) -> None:
    assert redact(text, marked=True) == redact(stored, marked=True) == stored
    assert redacted({"a": [text, 3], "b": (None, text)}) == {"a": [stored, 3], "b": (None, stored)}


def test_whole_url__takes_from_the_environment_what_was_left_out(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stored = "https://***@host/d/a.tar?***"
    for name in ("PRETRAIN_URLS", "PRETRAIN_URLS_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert whole_url("https://host/d/a.tar?x=1") == "https://host/d/a.tar?x=1"
    with pytest.raises(
        DataError, match=r"^https://\*\*\*@host/d/a.tar\?\*\*\*: credentials are not stored; put the whole"
    ):
        whole_url(stored)
    monkeypatch.setenv("PRETRAIN_URLS", "https://me:p@s/s@host/d/b.tar?s=1 https://me:p@s/s@host/d/a.tar?s=1")
    assert whole_url(stored) == "https://me:p@s/s@host/d/a.tar?s=1"
    monkeypatch.setenv("PRETRAIN_URLS_FILE", str(tmp_path / "urls"))
    with pytest.raises(DataError, match=r"PRETRAIN_URLS_FILE=.*urls: cannot be read \(No such file"):
        whole_url(stored)
    (tmp_path / "urls").write_text("https://me:pw@host/d/\n")
    assert whole_url("https://***@host/d/c/x-{0..9}.tar") == "https://me:pw@host/d/c/x-{0..9}.tar"
    (tmp_path / "urls").write_text("https://me:pw@host/d/a.tar?s=2\n")
    with pytest.raises(DataError, match="stands for several URLs"):
        whole_url(stored)


def test_redact__commands_are_told_apart_without_their_arguments() -> None:
    first, second = (redact(f"pipe:curl -H token:{secret} http://h/a.tar") for secret in ("abc", "xyz"))
    assert first.startswith("pipe:curl (command ") and "abc" not in first
    assert first != second


def test_sibling__keeps_the_query() -> None:
    assert sibling("/d/a.tar", "dataset.json") == "/d/dataset.json"
    assert sibling("http://h:1/d/a.tar?sig=x", "a.tar.index") == "http://h:1/d/a.tar.index?sig=x"
    assert sibling("s3://data/a.tar", "dataset.json") == "s3://data/dataset.json"
    assert sibling("pipe:cat a.tar", "dataset.json") is None


# Commands.


def test_pipe__refused_unless_allowed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"pipe:touch .* is a command and is not run; set data.allow_pipe=true"):
        Store().read(f"pipe:touch {tmp_path}/owned", 0, 1)
    assert not (tmp_path / "owned").exists()


def test_pipe__runs_once_and_is_kept(tmp_path: Path, options: Callable[..., FetchOptions], demo_data: Path) -> None:
    shard = next(iter(sorted((demo_data / "grocery").glob("train-*.tar"))))
    allowed = options(allow_pipe=True)
    command = f"pipe:echo run >> {tmp_path}/runs; cat {shard} | cat"
    store = Store(allowed)
    assert store.size(command) == shard.stat().st_size
    assert store.read(command, 512, 100) == shard.read_bytes()[512:612]
    assert store.read_file(command, 9) is None
    store.close()
    piped, local = open_dataset([command], fetch=allowed), open_dataset(shard)
    assert (piped.digest, piped.num_samples, piped.read(3)) == (local.digest, local.num_samples, local.read(3))
    assert (tmp_path / "runs").read_text() == "run\n"
    piped.close()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("printf abc; echo 'no such key' >&2; exit 3", r"exited with status 3 after 3 bytes: no such key"),
        ("false | cat", r"exited with status 1 after 0 bytes: it printed no error"),
        ("true", r"wrote nothing to its standard output"),
        ("printf abc; sleep 60", r"wrote nothing for 0.3 s after 3 bytes; it was ended"),
    ],
)
def test_pipe__failures_are_named(options: Callable[..., FetchOptions], command: str, message: str) -> None:
    store = Store(options(allow_pipe=True, deadline_s=0.3))
    with pytest.raises(DataError, match=message):
        store.read(f"pipe:{command}", 0, 1)
    store.close()


# Object stores.


def test_s3__blocks_and_whole_shards(s3: Any, options: Callable[..., FetchOptions]) -> None:
    s3.pipe_file("data/a.tar", CONTENT)
    for mode in ("auto", "range", "shard"):
        store = Store(options(mode=mode))
        assert store.size("s3://data/a.tar") == len(CONTENT)
        assert store.read("s3://data/a.tar", BLOCK - 5, 10) == CONTENT[BLOCK - 5 : BLOCK + 5]
        store.prefetch([("s3://data/a.tar", 2 * BLOCK, 2 * BLOCK + 1)])
        assert store.read("s3://data/a.tar", 4 * BLOCK, 123) == CONTENT[4 * BLOCK :]
        assert store.local_copy("s3://data/a.tar").read_bytes() == CONTENT
        assert store.read_file("s3://data/a.tar.index", 9) is None
        assert store.read_file("s3://data/a.tar", len(CONTENT)) == CONTENT
        with pytest.raises(TooLargeError, match=f"s3://data/a.tar: has more than {len(CONTENT) - 1} bytes"):
            store.read_file("s3://data/a.tar", len(CONTENT) - 1)
        store.close()


def test_s3__replaced_and_missing_shards_are_named(s3: Any, options: Callable[..., FetchOptions]) -> None:
    store = Store(options())
    s3.pipe_file("data/a.tar", CONTENT)
    assert store.read("s3://data/a.tar", 0, 9) == CONTENT[:9]
    s3.pipe_file("data/a.tar", CONTENT[::-1])
    with pytest.raises(DataError, match=r"s3://data/a.tar at offset 50000: the shard was replaced while it was in use"):
        store.read("s3://data/a.tar", BLOCK, 9)
    for location in ("s3://data/none.tar", "s3://no-such-bucket/a.tar"):
        with pytest.raises(DataError, match=rf"{location} at offset 0: no such file; check the name"):
            store.size(location)
    store.close()


def test_s3__server_away(options: Callable[..., FetchOptions], s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(DataError, match=r"s3://data/a.tar at offset 0: .*; gave up after 2 attempts in"):
        Store(options()).size("s3://data/a.tar")


def test_s3__no_credentials(
    options: Callable[..., FetchOptions], s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"s3://data/a.tar at offset 0: .*[Cc]redentials"):
        Store(options()).size("s3://data/a.tar")


def test_s3__open_dataset_equals_local(s3: Any, options: Callable[..., FetchOptions], demo_data: Path) -> None:
    folder = demo_data / "grocery"
    for path in sorted(folder.glob("*.tar")):
        s3.pipe_file(f"data/d/{path.name}", path.read_bytes())
    names = tuple(f"s3://data/d/{path.name}" for path in sorted(folder.glob("train-*.tar")))
    store = Store(options())
    assert expand_source("s3://data/d/train-*.tar", store=store) == names
    assert set(names) < set(expand_source("s3://data/d/", store=store))
    with pytest.raises(DataError, match=r"no .tar shard matches s3://data/d/trian-\*.tar"):
        expand_source("s3://data/d/trian-*.tar", store=store)
    store.close()
    local, remote = open_dataset(folder / "train-*.tar"), open_dataset("s3://data/d/train-*.tar", fetch=options())
    assert (remote.digest, remote.counts) == (local.digest, local.counts)
    ids = [0, local.num_samples - 1]
    remote.prefetch(ids)
    assert [remote.read(number) for number in ids] == [local.read(number) for number in ids]
    remote.close()


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_object_stores__missing_package_is_one_line(
    monkeypatch: pytest.MonkeyPatch, options: Callable[..., FetchOptions], scheme: str, package: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("s3", "gcs"):
        monkeypatch.delitem(_registry, name, raising=False)
    with pytest.raises(
        DataError, match=rf"^{scheme}:// needs the package {package}: pip install 'pretrain\[{extra}\]'$"
    ):
        Store(options()).size(f"{scheme}://b/a.tar")


def test_gs__reads_of_one_generation(monkeypatch: pytest.MonkeyPatch, options: Callable[..., FetchOptions]) -> None:
    """Without a network: the requests that would be sent, answered here."""
    gcsfs = pytest.importorskip("gcsfs", reason="gcsfs is not installed")
    monkeypatch.setitem(fsspec.config.conf, "gcs", {"token": "anon"})
    asked = []

    async def info(self: Any, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(CONTENT), "type": "file", "generation": "7", "etag": "x"}

    async def cat(self: Any, path: str, start: int, end: int, **pinned: Any) -> bytes:
        asked.append((path, start, end, pinned))
        if start == 2 * BLOCK:
            raise FileNotFoundError(path)
        return CONTENT[start:end]

    monkeypatch.setattr(gcsfs.GCSFileSystem, "_info", info)
    monkeypatch.setattr(gcsfs.GCSFileSystem, "_cat_file", cat)
    store = Store(options())
    assert store.size("gs://b/a.tar") == len(CONTENT)
    assert store.read("gcs://b/a.tar", BLOCK, 9) == CONTENT[BLOCK : BLOCK + 9]
    assert asked == [("b/a.tar", BLOCK, 2 * BLOCK, {"generation": "7"})]
    with pytest.raises(TooLargeError, match=r"gs://b/a.tar: has more than 9 bytes"):
        store.read_file("gs://b/a.tar", 9)
    with pytest.raises(DataError, match=r"gs://b/a.tar at offset 100000: the shard was replaced .*generation was 7"):
        store.read("gs://b/a.tar", 2 * BLOCK, 9)
    store.close()
