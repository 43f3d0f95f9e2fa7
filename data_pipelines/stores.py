"""Bytes of shards, wherever they lie: `Store.read(location, begin, size)`.

A location is an absolute local path. `pread` has no file position, so forked loader workers share descriptors safely;
a pickled store drops them, since a descriptor number means another file in another process.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError

__all__ = ["Store"]

_MAX_OPEN_FILES = 256


class Store:
    """Reads byte ranges of files; opens each at its first read and keeps the most recently used open."""

    def __init__(self) -> None:
        self._files: OrderedDict[str, int] = OrderedDict()  # location -> descriptor, least recently used first

    def size(self, location: str) -> int:
        """Bytes of the whole file.

        Raises:
            DataError: it cannot be opened.
        """
        try:
            return os.stat(location).st_size
        except OSError as error:
            raise DataError(f"cannot open shard {location}: {error.strerror}") from None

    def read(self, location: str, begin: int, size: int) -> bytes:
        """Exactly `size` bytes from `begin`.

        Raises:
            DataError: the file is gone, or ends before; names location and offset.
        """
        try:
            content = os.pread(self._descriptor(location), size, begin)
        except OSError as error:
            raise DataError(f"{location} at offset {begin}: cannot read: {error.strerror}") from None
        if len(content) != size:
            raise DataError(
                f"{location}: needs bytes {begin}..{begin + size}, the file ends at {begin + len(content)}; "
                "it was cut after it was indexed: copy it again"
            )
        return content

    def read_file(self, location: str) -> bytes | None:
        """A small file whole (an index, a manifest); None if there is none."""
        try:
            return Path(location).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def local_copy(self, location: str) -> Path:
        """A local file with the bytes of `location`, valid until the cache needs its place."""
        return Path(location)

    def prefetch(self, ranges: list[tuple[str, int, int]]) -> None:
        """Fetch (location, begin, size) ranges that are not here yet, several at a time; local files are here."""

    def close(self) -> None:
        """Close the files; the next read opens what it needs again."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _descriptor(self, location: str) -> int:
        if location in self._files:
            self._files.move_to_end(location)
            return self._files[location]
        descriptor = os.open(location, os.O_RDONLY | os.O_CLOEXEC)
        self._files[location] = descriptor
        if len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return descriptor

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": OrderedDict()}
