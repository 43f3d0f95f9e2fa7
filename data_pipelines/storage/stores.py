"""Bytes of shards, wherever they lie: `Store.read(location, begin, size)`.

A location is an absolute local path, a URL, or a command (`locations`). Local files are read in place: `pread` has no
file position, so forked loader workers share descriptors safely. What is remote comes through a cache on the local disk
(`cache`), in blocks or as whole shards.

A store may be pickled and forked: descriptors, connections and threads stay behind, since they mean nothing, or the
wrong thing, in another process. Not here: the requests themselves (`fetch`).
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.storage.blocks import RemoteShards
from data_pipelines.storage.locations import is_local
from data_pipelines.storage.request import FetchOptions, too_large

__all__ = ["FetchOptions", "Store"]

_MAX_OPEN_FILES = 256


class Store:
    """Reads byte ranges of files; opens each local one at its first read and keeps the most recently used open.

    Threads may read at the same time. What makes that right without a lock: single operations of a dictionary are
    atomic, and a file that one thread drops is closed when no other one reads it any more.
    """

    def __init__(self, options: FetchOptions | None = None) -> None:
        self._files: OrderedDict[str, _OpenFile] = OrderedDict()  # by location, least recently used first
        self._options = options or FetchOptions()

    @cached_property
    def _remote(self) -> RemoteShards:
        return RemoteShards(self._options)

    def size(self, location: str) -> int:
        """Bytes of the whole file.

        Raises:
            DataError: it cannot be opened.
        """
        if not is_local(location):
            return self._remote.size(location)
        try:
            return os.stat(location).st_size
        except OSError as error:
            raise DataError(f"cannot open shard {location}: {error.strerror}") from None

    def read(self, location: str, begin: int, size: int) -> bytes:
        """Exactly `size` bytes from `begin`.

        Raises:
            DataError: the file is gone, cannot be fetched, or ends before; names location and offset.
        """
        if not is_local(location):
            return self._remote.read(location, begin, size)
        try:
            file = self._open(location)
            content = os.pread(file.descriptor, size, begin)
        except OSError as error:
            raise DataError(f"{location} at offset {begin}: cannot read: {error.strerror}") from None
        if len(content) != size:
            raise DataError(
                f"{location}: needs bytes {begin}..{begin + size}, the file ends at {begin + len(content)}; "
                "it was cut after it was indexed: copy it again"
            )
        return content

    def read_file(self, location: str, limit: int) -> bytes | None:
        """A small file whole (an index, a manifest), not cached; None if there is none, or none that may be read.

        Raises:
            TooLargeError: it has more than `limit` bytes.
        """
        if not is_local(location):
            return self._remote.read_file(location, limit)
        try:
            with open(location, "rb") as file:
                content = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError):
            return None
        if len(content) > limit:
            raise too_large(location, limit)
        return content

    def local_copy(self, location: str) -> Path:
        """A local file with the bytes of `location`; a fetched one stays at least until the next call."""
        return Path(location) if is_local(location) else self._remote.local_copy(location)

    def glob(self, pattern: str) -> list[str]:
        """Remote locations that match, sorted.

        Raises:
            DataError: the store cannot be listed.
        """
        return self._remote.glob(pattern)

    def prefetch(self, ranges: Sequence[tuple[str, int, int]]) -> None:
        """Begin to fetch (location, begin, size) ranges that are not here yet, several at a time, and return.

        What fails is reported by the `read` that needs it.
        """
        remote = [part for part in ranges if not is_local(part[0])]
        if remote:
            self._remote.prefetch(remote)

    def close(self) -> None:
        """Close files, connections and threads; the next read opens what it needs again."""
        self._files.clear()
        if "_remote" in self.__dict__:
            self._remote.close()

    def _open(self, location: str) -> _OpenFile:
        try:
            self._files.move_to_end(location)
            return self._files[location]
        except KeyError:  # never opened, or just dropped by another thread
            opened = _OpenFile(os.open(location, os.O_RDONLY | os.O_CLOEXEC))
            file = self._files.setdefault(location, opened)  # that of another thread which was faster
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}


class _OpenFile:
    """A descriptor that is closed with the last reference to it."""

    __slots__ = ("descriptor",)

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)
