"""What a web server can do to a reader: every fault is injected by a real one on the loopback."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.errors import DataError, TooLargeError
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.index import load_index, scan_shard
from data_pipelines.shards.manifest import MANIFEST_BYTES
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.stores import FetchOptions, Store

BLOCK = 50_000
CONTENT = np.random.default_rng(0).integers(0, 256, 4 * BLOCK + 123, np.uint8).tobytes()

FaultServer = Handler = Any  # those of conftest.py, which pytest does not let tests import
Fault = Callable[[Handler, bytes, int, int], None]


def status(code: int, **headers: str) -> Fault:
    return lambda handler, body, begin, end: handler.answer(code, b"no", **headers)


def drop(sent: int) -> Fault:
    def fault(handler: Handler, body: bytes, begin: int, end: int) -> None:
        handler.part(body, begin, end, sent=sent)
        handler.close_connection = True

    return fault


def stall(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.part(body, begin, end, sent=1000)
    handler.server.released.wait(10)
    handler.close_connection = True


def short_without_length(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.send_response(206)
    handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(body[begin : (begin + end) // 2])
    handler.close_connection = True


def without_range(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.part(body, 0, len(body), ranged=False)


def without_range_dropped(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.part(body, 0, len(body), ranged=False, sent=BLOCK)
    handler.close_connection = True


def html_page(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.answer(200, b"<html>please log in</html>", Content_Type="text/html; charset=utf-8")


@pytest.fixture
def server(fault_server: FaultServer) -> FaultServer:
    fault_server.files = {"/train-000000.tar": CONTENT}
    return fault_server


@pytest.fixture
def options(tmp_path: Path) -> Callable[..., FetchOptions]:
    def make(**changes: Any) -> FetchOptions:
        defaults = {"cache_dir": str(tmp_path / "cache"), "block_bytes": BLOCK, "retries": 2, "timeout_s": 0.4}
        return FetchOptions(**{**defaults, "deadline_s": 5.0, **changes})

    return make


@pytest.fixture
def store(options: Callable[..., FetchOptions]) -> Iterator[Store]:
    store = Store(options())
    yield store
    store.close()


def test_read__blocks_are_fetched_once_and_equal_the_file(server: FaultServer, store: Store) -> None:
    assert store.size(server.url) == len(CONTENT)
    for begin, size in ((0, 10), (BLOCK - 5, 10), (3 * BLOCK, BLOCK + 123), (0, len(CONTENT)), (7, 0)):
        assert store.read(server.url, begin, size) == CONTENT[begin : begin + size]
    assert sorted(begin for _, begin in server.log[1:]) == [0, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]  # type: ignore[type-var]
    with pytest.raises(DataError, match=r"needs bytes 200000\.\.200124, the file ends at 200123"):
        store.read(server.url, 4 * BLOCK, 124)


@pytest.mark.parametrize(
    ("faults", "attempts"),
    [
        ([status(500), status(503)], 3),
        ([status(429, Retry_After="0")], 2),
        ([drop(20_000)], 2),
        ([short_without_length], 2),
        ([stall], 2),
    ],
    ids=["500-503", "429", "drop", "short", "stall"],
)
def test_read__passing_faults_are_repeated_from_the_byte_received(
    server: FaultServer, store: Store, faults: Sequence[Fault], attempts: int
) -> None:
    server.faults = iter(faults)
    assert store.read(server.url, BLOCK + 5, 100) == CONTENT[BLOCK + 5 : BLOCK + 105]
    assert server.requests == 1 + attempts
    received = {drop: 20_000, short_without_length: BLOCK // 2, stall: 1000}
    kept = next((size for fault, size in received.items() if fault.__name__ in faults[0].__qualname__), 0)
    assert server.log[-1][1] == BLOCK + kept


@pytest.mark.parametrize(
    ("fault", "attempts", "message"),
    [
        (status(404), 1, r"{url} at offset 50000: HTTP 404 Not Found; check the name"),
        (status(403), 1, r"{url} at offset 50000: HTTP 403 Forbidden; check the credentials"),
        (status(500), 3, r"{url} at offset 50000: HTTP 500 Internal Server Error; gave up after 3 attempts in \d"),
        (status(429, Retry_After="99"), 1, r"at offset 50000: HTTP 429 Too Many Requests; gave up after 1 attempt in"),
        (drop(100), 3, r"{url} at offset 50300: .*gave up after 3 attempts"),
        (short_without_length, 3, r"the answer ended at byte \d+, expected 100000; gave up after 3 attempts"),
        (stall, 3, r"{url} at offset 53000: timed out \(0.4 s without data.*gave up after 3 attempts"),
        (html_page, 1, r"{url} at offset 50000: the server answered with an HTML page instead of a shard"),
    ],
    ids=["404", "403", "500", "429-long", "drop", "short", "stall", "html"],
)
def test_read__lasting_faults_end_in_one_line_with_url_and_offset(
    server: FaultServer, store: Store, fault: Fault, attempts: int, message: str
) -> None:
    server.faults = repeat(fault)
    with pytest.raises(DataError, match=message.replace("{url}", re.escape(server.url))) as caught:
        store.read(server.url, BLOCK + 5, 100)
    assert "\n" not in str(caught.value)
    assert server.requests == 1 + attempts


def test_read__nobody_answers(server: FaultServer, store: Store) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match=r"at offset 0: Cannot connect to host 127.0.0.1.*gave up after 3 attempts"):
        store.size(url)


def test_read__deadline_ends_what_trickles(server: FaultServer, options: Callable[..., FetchOptions]) -> None:
    def trickle(handler: Handler, body: bytes, begin: int, end: int) -> None:
        handler.part(body, begin, end, sent=0)
        for byte in body[begin:end]:
            if handler.server.released.wait(0.05):
                break
            handler.wfile.write(bytes([byte]))

    store, server.faults = Store(options(deadline_s=1.0)), repeat(trickle)
    with pytest.raises(
        DataError, match=r"timed out \(0.4 s without data, or 1 s in all\); gave up after 1 attempt in 1"
    ):
        store.read(server.url, 0, 10)
    store.close()


def test_read__server_without_ranges_sends_the_whole_shard_once(server: FaultServer, store: Store) -> None:
    server.faults, server.faults_at_probe = repeat(without_range), True
    assert store.read(server.url, BLOCK + 5, 100) == CONTENT[BLOCK + 5 : BLOCK + 105]
    assert store.read(server.url, 3 * BLOCK, 9) == CONTENT[3 * BLOCK : 3 * BLOCK + 9]
    assert server.requests == 2  # size, whole shard


def test_read__server_that_stops_doing_ranges(server: FaultServer, store: Store) -> None:
    server.faults = chain([None], repeat(without_range))
    assert store.read(server.url, 0, 9) == CONTENT[:9]
    assert store.read(server.url, BLOCK, 9) == CONTENT[BLOCK : BLOCK + 9]
    assert store.read(server.url, 3 * BLOCK, 9) == CONTENT[3 * BLOCK : 3 * BLOCK + 9]
    assert server.requests == 4  # size, block 0, block 1 refused, whole shard


def test_read__range_mode_demands_ranges(server: FaultServer, options: Callable[..., FetchOptions]) -> None:
    server.faults, server.faults_at_probe = repeat(without_range), True
    store = Store(options(mode="range"))
    with pytest.raises(DataError, match=r"the server cannot send parts of a file; set data.fetch to auto or shard"):
        store.read(server.url, 0, 9)
    store.close()


def test_shard_mode__goes_on_where_it_broke_off(server: FaultServer, options: Callable[..., FetchOptions]) -> None:
    store = Store(options(mode="shard", retries=1))
    server.faults = repeat(drop(BLOCK))  # every block's worth of progress earns the attempts again
    assert store.read(server.url, 4 * BLOCK, 123) == CONTENT[4 * BLOCK :]
    assert [begin for _, begin in server.log] == [0, None, BLOCK, 2 * BLOCK, 3 * BLOCK, 4 * BLOCK]
    assert store.local_copy(server.url).read_bytes() == CONTENT
    assert server.requests == 6
    store.close()


def test_shard_mode__without_ranges_a_broken_download_starts_again(server: FaultServer, store: Store) -> None:
    server.faults, server.faults_at_probe = chain([without_range, without_range_dropped], repeat(without_range)), True
    assert store.read(server.url, 4 * BLOCK, 123) == CONTENT[4 * BLOCK :]
    assert server.requests == 3


def test_read__replaced_shard_is_an_error(server: FaultServer, store: Store) -> None:
    assert store.read(server.url, 0, 9) == CONTENT[:9]
    server.etag = '"two"'
    with pytest.raises(DataError, match=r"at offset 50000: the shard was replaced while it was in use \(.*\"two\"\)"):
        store.read(server.url, BLOCK, 9)
    server.etag, server.files["/train-000000.tar"] = '"one"', CONTENT[:-100]
    with pytest.raises(DataError, match=r"200123 bytes \"one\" when it was opened, now 200023 bytes"):
        store.read(server.url, BLOCK, 9)


def test_read_file__absent_forbidden_or_a_login_page_is_none(server: FaultServer, store: Store) -> None:
    assert store.read_file(f"{server.root}/train-000000.tar.index", 9) is None
    server.faults = iter((status(403), html_page, status(500), None))
    assert store.read_file(server.url, 1 << 20) is None
    assert store.read_file(server.url, 1 << 20) is None
    assert store.read_file(server.url, 1 << 20) == CONTENT
    server.faults = repeat(status(503))
    with pytest.raises(DataError, match=r"HTTP 503 Service Unavailable; gave up after 3 attempts"):
        store.read_file(server.url, 1 << 20)


def endless(handler: Handler, body: bytes, begin: int, end: int) -> None:
    """Sends zeros without saying how many, for as long as somebody listens."""
    handler.send_response(200)
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.close_connection = True
    for _ in range(1 << 10):
        handler.wfile.write(bytes(1 << 20))
    handler.server.log.append(("everything was sent", None))


def announced(handler: Handler, body: bytes, begin: int, end: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(3 << 30))
    handler.end_headers()


@pytest.mark.parametrize("fault", [endless, announced])
def test_read_file__what_is_larger_than_it_can_be_is_not_read(
    server: FaultServer, store: Store, options: Callable[..., FetchOptions], demo_data: Path, fault: Fault
) -> None:
    """3 GiB for an index or a `dataset.json`: an index is made anew, a `dataset.json` is named."""
    server.faults = iter([fault, fault])
    with pytest.raises(TooLargeError, match=r"tar: has more than 1048576 bytes, which such a file cannot have"):
        store.read_file(server.url, 1 << 20)
    (shard, *_) = sorted((demo_data / "grocery").glob("test-*.tar"))
    server.files = {"/a.tar": shard.read_bytes(), "/a.tar.index": b"", "/dataset.json": b"{}"}
    size = shard.stat().st_size
    assert load_index(f"{server.root}/a.tar", store, num_bytes=size).num_samples == scan_shard(shard).num_samples
    server.faults = iter([fault])
    with pytest.raises(DataError, match=rf"/dataset.json: has more than {MANIFEST_BYTES} bytes"):
        expand_source(f"{server.root}/", store=store)
    assert ("everything was sent", None) not in server.log


def test_messages__show_neither_user_nor_query(server: FaultServer, store: Store) -> None:
    server.faults = repeat(status(403))
    url = server.url.replace("http://", "http://me:secret@") + "?token=hidden"
    with pytest.raises(DataError, match=re.escape(f"{server.url} at offset 0: HTTP 403")) as caught:
        store.read(url, 0, 9)
    assert not any(word in str(caught.value) for word in ("me:", "secret", "hidden"))


def test_prefetch__fetches_several_blocks_and_reports_failures_at_the_read(server: FaultServer, store: Store) -> None:
    server.faults = chain([status(404)])
    store.prefetch([(server.url, 0, 10)])
    with pytest.raises(DataError, match=r"HTTP 404"):
        store.read(server.url, 3, 3)
    store.prefetch([(server.url, 0, 10), (server.url, BLOCK - 1, BLOCK), (server.url, 5, 5)])
    assert store.read(server.url, BLOCK - 1, BLOCK) == CONTENT[BLOCK - 1 : 2 * BLOCK - 1]
    assert store.read(server.url, 0, 10) == CONTENT[:10]
    assert sorted(server.log[1:]) == [("/train-000000.tar", begin) for begin in (0, 0, BLOCK)]


def test_local_copy__then_blocks_come_from_it(server: FaultServer, store: Store) -> None:
    assert store.local_copy(server.url).read_bytes() == CONTENT
    assert store.read(server.url, BLOCK, 9) == CONTENT[BLOCK : BLOCK + 9]
    assert server.requests == 2
    store.local_copy(server.url).unlink()
    assert store.read(server.url, BLOCK, 9) == CONTENT[BLOCK : BLOCK + 9]
    assert server.requests == 3


READER = """
import sys
from data_pipelines.storage.stores import FetchOptions, Store
url, cache, mode = sys.argv[1:]
store = Store(FetchOptions(cache_dir=cache, block_bytes=50_000, timeout_s=8.0, mode=mode))
sys.stdout.buffer.write(store.read(url, 10, 40_000))
"""


def reader(server: FaultServer, cache: Path, mode: str = "auto") -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", READER, server.url, str(cache), mode], stdout=subprocess.PIPE)


def await_requests(server: FaultServer, count: int) -> None:
    until = time.monotonic() + 30
    while server.requests < count and time.monotonic() < until:
        time.sleep(0.01)
    assert server.requests >= count


def test_cache__two_processes_fetch_a_block_once(server: FaultServer, tmp_path: Path) -> None:
    def slow(handler: Handler, body: bytes, begin: int, end: int) -> None:
        handler.server.released.wait(30)
        handler.part(body, begin, end)

    server.faults = repeat(slow)
    readers = [reader(server, tmp_path), reader(server, tmp_path)]
    await_requests(server, 3)  # two ask for the size, one for the block; the other waits for it
    server.released.set()
    assert [process.communicate()[0] for process in readers] == [CONTENT[10:40_010]] * 2
    assert server.requests == 3


@pytest.mark.parametrize("mode", ["range", "shard"])
def test_cache__kill_during_download_leaves_nothing_behind(server: FaultServer, tmp_path: Path, mode: str) -> None:
    server.faults = chain([stall])
    process = reader(server, tmp_path, mode)
    await_requests(server, 2)
    (part,) = [path for path in (tmp_path / "parts").iterdir()]
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert part.exists()
    again = reader(server, tmp_path, mode)
    assert again.communicate()[0] == CONTENT[10:40_010]
    assert list((tmp_path / "parts").iterdir()) == []
    (block,) = (tmp_path / "blocks").iterdir()
    assert block.stat().st_size == (BLOCK if mode == "range" else len(CONTENT))


def test_store__forked_child_reads_with_connections_of_its_own(server: FaultServer, store: Store) -> None:
    assert store.read(server.url, 0, 9) == CONTENT[:9]
    child = os.fork()
    if child == 0:
        good = store.read(server.url, BLOCK, 9) == CONTENT[BLOCK : BLOCK + 9]
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.read(server.url, 2 * BLOCK, 9) == CONTENT[2 * BLOCK : 2 * BLOCK + 9]
    assert server.requests == 4  # the child knew the size already


def test_open_dataset__over_http_equals_local(
    server: FaultServer, options: Callable[..., FetchOptions], demo_data: Path
) -> None:
    folder = demo_data / "grocery"
    local = open_dataset(folder / "train-*.tar")
    server.files = {f"/d/{path.name}": path.read_bytes() for path in folder.iterdir() if path.suffix == ".tar"}
    names = sorted(name for name in server.files if name.startswith("/d/train-"))
    server.faults = chain([None, status(500), None, drop(1000)])
    remote = open_dataset([f"{server.root}{name}?signature=x" for name in names], fetch=options())
    assert (remote.digest, remote.counts, remote.fields) == (local.digest, local.counts, local.fields)
    ids = [0, 1, local.num_samples // 2, local.num_samples - 1]
    assert [remote.read(number) for number in ids] == [local.read(number) for number in ids]
    remote.close()


def test_open_dataset__packed_directory_over_http_reads_only_what_it_needs(
    server: FaultServer, options: Callable[..., FetchOptions], demo_data: Path
) -> None:
    paths = sorted((demo_data / "grocery").glob("train-*.tar"))
    local, entries = open_dataset(paths), []
    for path, shard in zip(paths, local.shards, strict=True):
        server.files[f"/d/{path.name}"] = path.read_bytes()
        server.files[f"/d/{path.name}.index"] = load_index(str(path), Store()).to_bytes()
        size = {"name": path.name, "samples": shard.num_samples, "bytes": shard.num_bytes}
        entries.append({**size, "sha256": "0" * 64, "index_digest": shard.index_digest})
    split = {"samples": local.num_samples, "digest": local.digest, "shards": entries}
    fields = {name: "image" if name == "jpg" else "label" for name in local.fields}
    manifest = {"format": "pretrain-dataset/1", "name": "grocery", "fields": fields, "splits": {"train": split}}
    server.files["/d/dataset.json"] = json.dumps(manifest).encode()
    remote = open_dataset(f"{server.root}/d/", fetch=options())
    assert server.log == [("/d/dataset.json", None)]
    assert (remote.digest, remote.fields) == (local.digest, local.fields)
    remote.prefetch([0, 1])
    assert [remote.read(number) for number in (0, 1)] == [local.read(number) for number in (0, 1)]
    assert {path for path, _ in server.log[1:]} == {f"/d/{paths[0].name}.index", f"/d/{paths[0].name}"}
    assert (f"/d/{paths[0].name}", None) not in server.log  # parts of the shard only
    remote.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>no such bucket</html>", r"train-000000.tar"),  # an error page with status 200 and a wrong type
        (CONTENT, r"train-000000.tar"),
    ],
    ids=["error page", "noise"],
)
def test_open_dataset__no_tar_at_that_address(
    server: FaultServer, options: Callable[..., FetchOptions], content: bytes, message: str
) -> None:
    server.files["/train-000000.tar"] = content
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(server.url, fetch=options())
    assert "\n" not in str(caught.value)


def test_open_dataset__cut_shard(server: FaultServer, options: Callable[..., FetchOptions], demo_data: Path) -> None:
    shard = next(iter(sorted((demo_data / "grocery").glob("train-*.tar")))).read_bytes()
    server.files["/train-000000.tar"] = shard[: len(shard) // 2]
    with pytest.raises(DataError, match=r"train-000000.tar.* cut"):
        open_dataset(server.url, fetch=options())


def test_expand_source__directory_of_a_web_server_needs_its_manifest(server: FaultServer, store: Store) -> None:
    with pytest.raises(DataError, match=r"/d/ has no readable dataset.json .* name the shards, as in .*train-\{000000"):
        expand_source(f"{server.root}/d/", store=store)
    for foreign in (b'{"classes": ["somebody else"]}', b'["a", "b"]'):
        server.files["/d/dataset.json"] = foreign
        with pytest.raises(DataError, match=r"/d/ has no readable dataset.json"):
            expand_source(f"{server.root}/d/", store=store)
    server.files["/d/dataset.json"] = b"{"
    with pytest.raises(DataError, match=r"/d/dataset.json is not valid JSON"):
        expand_source(f"{server.root}/d/", store=store)
