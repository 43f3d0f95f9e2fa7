"""Remote shards seen as files: which block of which shard a read needs, and fetching several of them ahead.

Shards are fetched in aligned blocks, or whole where the server cannot send parts, where the options say so, and where
someone needs the whole file (`local_copy`). A shard is known by its URL, size and version (ETag and the like), so that
a replaced one never meets blocks of the old one.

Not here: the cache folder (`cache`), requests and retries (`fetch`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from data_pipelines.errors import DataError
from data_pipelines.storage.cache import ShardCache
from data_pipelines.storage.failures import RangesIgnored
from data_pipelines.storage.fetch import Remote
from data_pipelines.storage.locations import PIPE, redact, scheme_of
from data_pipelines.storage.pipe import run_pipe
from data_pipelines.storage.request import Facts, FetchOptions

__all__ = ["RemoteShards"]

_THREADS = 8
_WHOLE = -1  # number of the "block" that is the whole shard


class RemoteShards:
    """The remote half of `stores.Store`, whose methods say what these do."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._remote = Remote(options)
        # The longest silence of a healthy writer is one of its attempts, all its waiting, and a new deadline's worth.
        self._cache = ShardCache(options.folder, options.cache_bytes, options.deadline_s + 2 * options.timeout_s)
        self._facts: dict[str, Facts] = {}
        self._keys: dict[str, str] = {}  # location -> first part of the names of its files in the cache
        self._copied: set[str] = set()  # locations that were seen whole in the cache
        self._start_process()

    def _start_process(self) -> None:
        """What is not shared with another process."""
        self._pid = os.getpid()
        self._pool: ThreadPoolExecutor | None = None
        self._coming: dict[tuple[str, int], Future[None]] = {}  # prefetches under way, or failed
        self._pinned: int | None = None  # descriptor that keeps the last local copy from eviction

    def size(self, location: str) -> int:
        known = self._known(location).size
        if known is not None:
            return known
        descriptor = self._open(location, _WHOLE)
        try:
            return os.fstat(descriptor).st_size
        finally:
            os.close(descriptor)

    def read(self, location: str, begin: int, size: int) -> bytes:
        facts = self._known(location)
        if facts.size is not None and begin + size > facts.size:
            raise _too_short(location, begin, size, facts.size)
        if self._by_blocks(location, facts):
            content = self._read_copy(location, facts, begin, size)
            if content is None:
                try:
                    return self._read_blocks(location, begin, size)
                except RangesIgnored:
                    self._give_up_ranges(location)
                    return self.read(location, begin, size)
        else:
            content = self._pread(self._open(location, _WHOLE), begin, size)
        if len(content) != size:
            raise _too_short(location, begin, size, begin + len(content))
        return content

    def read_file(self, location: str, limit: int) -> bytes | None:
        return None if scheme_of(location) == PIPE else self._remote.content(location, limit)

    def glob(self, pattern: str) -> list[str]:
        return self._remote.glob(pattern)

    def local_copy(self, location: str) -> Path:
        self._known(location)
        self._unpin()
        while True:
            descriptor = self._open(location, _WHOLE)
            name = self._name(location, _WHOLE)
            if self._cache.pin(name, descriptor):
                break
            os.close(descriptor)
        self._pinned = descriptor
        self._copied.add(location)
        return self._cache.path(name)

    def prefetch(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        self._check_process()
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefetch")
        new = {location for location, _, _ in ranges} - self._facts.keys()
        list(self._pool.map(self._known, new))
        wanted = dict.fromkeys(block for part in ranges for block in self._blocks_of(*part))
        room = self._options.cache_bytes // 2  # the rest would push out what was fetched before it is read
        for location, block in wanted:
            length = self._length(location, block)
            room -= length or 0
            if room < 0:
                break
            if (location, block) not in self._coming and not self._is_here(location, block):
                self._coming[location, block] = future = self._pool.submit(self._fetch_ahead, location, block)
                future.add_done_callback(partial(self._arrived, (location, block)))

    def close(self) -> None:
        self._check_process()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
        self._unpin()
        self._remote.close()
        self._start_process()

    def __getstate__(self) -> dict[str, Any]:
        return {"_options": self._options, "_facts": self._facts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_options"])  # type: ignore[misc]
        self._facts = state["_facts"]

    # What a shard is.

    def _known(self, location: str) -> Facts:
        self._check_process()
        if location not in self._facts:
            if scheme_of(location) != PIPE:
                facts = self._remote.facts(location)
            elif self._options.allow_pipe:
                facts = Facts(size=None, version="", ranges=False)
            else:
                raise DataError(f"{redact(location)} is a command and is not run; set data.allow_pipe=true to allow it")
            if self._options.mode == "range" and not facts.ranges:
                raise _needs_ranges(location)
            self._facts[location] = facts
            if self._is_here(location, _WHOLE):
                self._copied.add(location)
        return self._facts[location]

    def _check_process(self) -> None:
        if self._pid != os.getpid():
            if self._pinned is not None:
                os.close(self._pinned)  # this copy of the descriptor; the parent's goes on pinning
            self._start_process()

    def _by_blocks(self, location: str, facts: Facts) -> bool:
        return facts.ranges and facts.size is not None and self._options.mode != "shard"

    def _give_up_ranges(self, location: str) -> None:
        if self._options.mode == "range":
            raise _needs_ranges(location)
        self._facts[location] = replace(self._facts[location], ranges=False)

    def _blocks_of(self, location: str, begin: int, size: int) -> list[tuple[str, int]]:
        if not self._by_blocks(location, self._facts[location]) or location in self._copied:
            return [(location, _WHOLE)]
        block = self._options.block_bytes
        return [(location, number) for number in range(begin // block, (begin + max(size, 1) - 1) // block + 1)]

    def _length(self, location: str, block: int) -> int | None:
        size = self._facts[location].size
        if block == _WHOLE or size is None:
            return size
        return min(self._options.block_bytes, size - block * self._options.block_bytes)

    def _name(self, location: str, block: int) -> str:
        if location not in self._keys:
            facts = self._facts[location]
            identity = f"{location}\n{facts.size}\n{facts.version}"
            self._keys[location] = hashlib.sha256(identity.encode()).hexdigest()[:40]
        key = self._keys[location]
        return f"{key}.tar" if block == _WHOLE else f"{key}.{self._options.block_bytes}.{block}"

    # Reading.

    def _read_blocks(self, location: str, begin: int, size: int) -> bytes:
        pieces = []
        for _, number in self._blocks_of(location, begin, size):
            start = number * self._options.block_bytes
            stop = start + self._options.block_bytes
            first, last = max(begin, start), min(begin + size, stop)
            pieces.append(self._pread(self._open(location, number), first - start, last - first))
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _read_copy(self, location: str, facts: Facts, begin: int, size: int) -> bytes | None:
        """Bytes of the whole shard, if a copy of it lies in the cache."""
        if location not in self._copied:
            return None
        descriptor = self._cache.find(self._name(location, _WHOLE), facts.size)
        if descriptor is None:
            self._copied.discard(location)
            return None
        return self._pread(descriptor, begin, size)

    def _pread(self, descriptor: int, begin: int, size: int) -> bytes:
        try:
            return os.pread(descriptor, size, begin)
        finally:
            os.close(descriptor)

    def _is_here(self, location: str, block: int) -> bool:
        descriptor = self._cache.find(self._name(location, block), self._length(location, block))
        if descriptor is None:
            return False
        os.close(descriptor)
        return True

    # Fetching.

    def _open(self, location: str, block: int) -> int:
        coming = self._coming.pop((location, block), None)
        if coming is not None:
            coming.result()
        return self._fetch(location, block)

    def _fetch(self, location: str, block: int) -> int:
        name, length = self._name(location, block), self._length(location, block)
        return self._cache.open(name, length, partial(self._write, location, block))

    def _fetch_ahead(self, location: str, block: int) -> None:
        os.close(self._fetch(location, block))

    def _arrived(self, key: tuple[str, int], done: Future[None]) -> None:
        """Forget a prefetch that succeeded; a failed one is kept for the read that needs it."""
        if done.cancelled() or done.exception() is None:
            self._coming.pop(key, None)

    def _write(self, location: str, block: int, part: BinaryIO) -> None:
        if scheme_of(location) == PIPE:
            run_pipe(location, part.write, self._options.deadline_s)
            return
        facts, whole = self._facts[location], block == _WHOLE
        begin = 0 if whole else block * self._options.block_bytes
        length = self._length(location, block)
        end = None if length is None else begin + length
        self._remote.copy(location, begin, end, facts, part.write, whole=whole)

    def _unpin(self) -> None:
        if self._pinned is not None:
            os.close(self._pinned)
            self._pinned = None


def _needs_ranges(location: str) -> DataError:
    return DataError(f"{redact(location)}: the server cannot send parts of a file; set data.fetch to auto or shard")


def _too_short(location: str, begin: int, size: int, end: int) -> DataError:
    return DataError(
        f"{redact(location)}: needs bytes {begin}..{begin + size}, the file ends at {end}; "
        "it is not the shard that was indexed: copy it again"
    )
