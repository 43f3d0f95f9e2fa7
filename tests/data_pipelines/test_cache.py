"""The folder that fetched shards go through: its bound, its sharing, and what a kill leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from data_pipelines.errors import DataError
from data_pipelines.storage.cache import ShardCache

SIZE = 1000


def make(name: str, calls: list[str] | None = None) -> Callable[[BinaryIO], None]:
    def produce(part: BinaryIO) -> None:
        if calls is not None:
            calls.append(name)
        part.write(content(name))

    return produce


def content(name: str) -> bytes:
    return name.encode().ljust(SIZE, b".")


def read(cache: ShardCache, name: str, calls: list[str] | None = None) -> bytes:
    descriptor = cache.open(name, SIZE, make(name, calls))
    try:
        return os.pread(descriptor, SIZE, 0)
    finally:
        os.close(descriptor)


def names(folder: Path) -> set[str]:
    return {path.name for path in (folder / "blocks").iterdir()}


def test_open__keeps_the_most_recently_used_within_the_limit(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path, 4 * SIZE, 5.0), []  # type: ShardCache, list[str]
    for name in "abcdacde":
        assert read(cache, name, calls) == content(name)
    assert calls == list("abcde")
    assert names(tmp_path) == set("acde")  # b was unused for longest
    assert read(cache, "b", calls) == content("b")
    assert calls == list("abcdeb")
    assert names(tmp_path) == set("cdeb")
    assert not any((tmp_path / "parts").iterdir())


def test_open__an_evicted_file_stays_readable_through_its_descriptor(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, SIZE, 5.0)
    first = cache.open("a", SIZE, make("a"))
    assert read(cache, "b") == content("b")
    assert names(tmp_path) == {"b"}
    assert os.pread(first, SIZE, 0) == content("a")
    os.close(first)


def test_pin__keeps_a_file_until_its_descriptor_is_closed(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, 5.0)
    pinned = cache.open("a", SIZE, make("a"))
    assert cache.pin("a", pinned)
    for name in "bcd":
        read(cache, name)
    assert names(tmp_path) == {"a", "d"}
    os.close(pinned)
    read(cache, "e")
    assert names(tmp_path) == {"d", "e"}
    gone = cache.open("a", SIZE, make("a"))
    cache.path("a").unlink()
    assert not cache.pin("a", gone)
    os.close(gone)


def test_open__wrong_length_is_fetched_again(tmp_path: Path) -> None:
    cache, calls = ShardCache(tmp_path, 4 * SIZE, 5.0), []  # type: ShardCache, list[str]
    read(cache, "a", calls)
    with open(cache.path("a"), "r+b") as file:
        file.truncate(10)
    assert read(cache, "a", calls) == content("a")
    assert calls == ["a", "a"]


def test_open__size_known_only_at_the_end_counts_too(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2 * SIZE, 5.0)
    for name in "abc":
        os.close(cache.open(name, None, make(name)))
    assert names(tmp_path) == {"b", "c"}
    with pytest.raises(DataError, match=r"of 2000 bytes cannot hold a file of 2001; raise data.cache_gb"):
        cache.open("d", None, lambda part: part.write(bytes(2001)) and None)
    assert names(tmp_path) == {"b", "c"}
    assert not any((tmp_path / "parts").iterdir())


def test_open__failed_fetch_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    def fail(part: BinaryIO) -> None:
        part.write(b"half")
        raise DataError("the network is gone")

    cache = ShardCache(tmp_path, 4 * SIZE, 5.0)
    with pytest.raises(DataError, match="the network is gone"):
        cache.open("a", SIZE, fail)
    assert not any((tmp_path / "parts").iterdir()) and not names(tmp_path)
    assert read(cache, "a") == content("a")


def test_open__threads_that_want_the_same_fetch_it_once(tmp_path: Path) -> None:
    calls: list[str] = []
    cache, asked = ShardCache(tmp_path, 4 * SIZE, 5.0), threading.Barrier(4)

    def want() -> None:
        asked.wait()
        assert read(cache, "a", calls) == content("a")
        calls.append("read")

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(calls) == ["a", "read", "read", "read", "read"]


def test_open__holder_that_stands_still_is_named(tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 4 * SIZE, 0.1)

    def stuck(part: BinaryIO) -> None:
        with pytest.raises(DataError, match=r"another process holds .*/parts/a and has written nothing for 0.1 s"):
            ShardCache(tmp_path, 4 * SIZE, 0.1).open("a", SIZE, make("a"))
        make("a")(part)

    os.close(cache.open("a", SIZE, stuck))


def test_open__folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        DataError, match=r"cannot use the shard cache .*/file: .*; set PRETRAIN_CACHE or data.cache_dir"
    ):
        ShardCache(tmp_path / "file", SIZE, 5.0).open("a", SIZE, make("a"))


@pytest.mark.parametrize("count", [b"", b"abc", (10**9).to_bytes(8, "little")], ids=["lost", "cut", "too high"])
def test_open__wrong_byte_count_is_corrected(tmp_path: Path, count: bytes) -> None:
    cache = ShardCache(tmp_path, 4 * SIZE, 5.0)
    for name in "abc":
        read(cache, name)
    (tmp_path / "lock").write_bytes(count)
    for name in "defg":
        read(cache, name)
    assert names(tmp_path) == set("defg")


WRITER = """
import os, random, sys
from pathlib import Path
from data_pipelines.storage.cache import ShardCache
cache, size, rng = ShardCache(Path(sys.argv[1]), int(sys.argv[3]), 30.0), 1000, random.Random(int(sys.argv[2]))
def produce(part, name):
    part.write(name.encode().ljust(size, b"."))
print("ready", flush=True)
for _ in range(int(sys.argv[4])):
    name = str(rng.randrange(40))
    descriptor = cache.open(name, size, lambda part: produce(part, name))
    assert os.pread(descriptor, size, 0) == name.encode().ljust(size, b"."), name
    os.close(descriptor)
"""


def writer(folder: Path, seed: int, limit: int, rounds: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", WRITER, str(folder), str(seed), str(limit), str(rounds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE)


def used_bytes(folder: Path) -> int:
    total = 0
    for path in (*(folder / "parts").glob("*"), *(folder / "blocks").glob("*")):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # evicted between listing and asking
            continue
    return total


def test_cache__several_processes_stay_within_the_limit_together(tmp_path: Path) -> None:
    limit = 10 * SIZE
    writers = [writer(tmp_path, seed, limit, 500) for seed in range(3)]
    highest = 0
    while any(process.poll() is None for process in writers):
        highest = max(highest, used_bytes(tmp_path))
        time.sleep(0.002)
    assert [process.wait() for process in writers] == [0, 0, 0]
    # A file that becomes a block between the two listings above is seen twice by this test: one per writer.
    assert 5 * SIZE < highest <= limit + 3 * SIZE
    assert used_bytes(tmp_path) <= limit
    for process in writers:
        process.communicate()


def test_cache__killed_processes_leave_a_sound_cache(tmp_path: Path) -> None:
    limit = 10 * SIZE
    for seed in range(3):
        process = writer(tmp_path, seed, limit, 10**9)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        while not (tmp_path / "blocks").exists():
            time.sleep(0.002)
        time.sleep(0.05 * (seed + 1))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    last = writer(tmp_path, 9, limit, 300)  # asserts the content of everything it reads
    last.communicate()
    assert last.returncode == 0
    assert used_bytes(tmp_path) <= limit
    assert not any((tmp_path / "parts").iterdir())
