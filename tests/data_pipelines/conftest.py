"""Shards to test with: tiny ones written on the spot, the demo data of the package, `../shared` where there is one.

And a web server that does wrong what it is told to.
"""

from __future__ import annotations

import io
import re
import tarfile
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.shards.dataset import Dataset, open_dataset

REPOSITORY = Path(__file__).resolve().parents[2]

Members = Sequence[tuple[str, bytes]]


@pytest.fixture(autouse=True, scope="session")
def index_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Indices of test shards go to a folder of their own, not to the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRETRAIN_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Members], Path]:
    def write(path: Path, members: Members) -> Path:
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for name, content in members:
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return path

    return write


@pytest.fixture
def tiny_dataset(tmp_path: Path, write_tar: Callable[[Path, Members], Path]) -> Callable[[Sequence[int]], Dataset]:
    """`tiny_dataset([3, 5])`: shards of 3 and 5 pictures of 8 x 8 random pixels, keyed by number, `cls` = number."""

    def make(counts: Sequence[int]) -> Dataset:
        rng, number = np.random.default_rng(0), 0
        for shard, count in enumerate(counts):
            members = []
            for _ in range(count):
                picture = io.BytesIO()
                Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(picture, "PNG")
                members += [(f"{number:05d}.png", picture.getvalue()), (f"{number:05d}.cls", str(number).encode())]
                number += 1
            write_tar(tmp_path / f"tiny-{shard:06d}.tar", members)
        return open_dataset(tmp_path / "tiny-*.tar")

    return make


@pytest.fixture(scope="session")
def demo_data() -> Path:
    return REPOSITORY / "pretrain" / "demo_data"


@pytest.fixture(scope="session")
def grocery(demo_data: Path) -> Dataset:
    return open_dataset(demo_data / "grocery" / "train-*.tar")


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files` with ranges, and asks `server.faults` first what to do wrong."""

    server: FaultServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        begin = int(asked.group(1)) if asked else 0
        self.server.log.append((path, begin if asked else None))
        body = self.server.files.get(path)
        if body is None:
            self.answer(404, b"")
            return
        probe = self.headers.get("Range") == "bytes=0-0"
        fault = None if probe and not self.server.faults_at_probe else next(self.server.faults, None)
        end = min(int(asked.group(2)) + 1 if asked and asked.group(2) else len(body), len(body))
        if fault is not None:
            fault(self, body, begin, end)
        else:
            self.part(body, begin, end, ranged=asked is not None)

    def part(self, body: bytes, begin: int, end: int, *, ranged: bool = True, sent: int | None = None) -> None:
        """Bytes `begin..end` of the body, of which only `sent` are sent."""
        self.send_response(206 if ranged else 200)
        if ranged:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{len(body)}")
        self.send_header("Content-Length", str(end - begin))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        self.wfile.write(body[begin:end][:sent])
        self.wfile.flush()

    def answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


Fault = Callable[[Handler, bytes, int, int], None]  # handler, body of the file, begin and end of what is asked for


class FaultServer(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}  # by path
        self.etag = '"one"'
        self.faults: Iterator[Fault | None] = iter(())
        self.faults_at_probe = False  # whether the request that asks for size and version takes a fault too
        self.log: list[tuple[str, int | None]] = []  # (path, first byte asked for)
        self.released = threading.Event()  # ends the stalls

    @property
    def root(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def url(self) -> str:
        return f"{self.root}/train-000000.tar"

    @property
    def requests(self) -> int:
        return len(self.log)

    def handle_error(self, *args: Any) -> None:
        """A client that hangs up is part of the game."""


@pytest.fixture
def fault_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultServer]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = FaultServer()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()
