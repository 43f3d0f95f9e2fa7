"""A folder of fetched shards and blocks, bounded in bytes and shared by all processes of a node.

    blocks/NAME   whole files; the time of last use is their mtime, and the longest unused go first
    parts/NAME    being written; the writer holds an exclusive `flock` on it, so that others wait instead of fetching
                  the same, and a part nobody holds belonged to a process that died
    lock          guards the byte count it holds: an upper bound of what is in both folders

A part has its full size from the start (sparse), so room is reserved before bytes arrive, and it becomes a block by a
rename; a kill at any moment leaves whole blocks, dead parts that the next process removes, and a count that is too
high at worst, which the next eviction corrects. Locks go with the process. The folder has to be on a local disk.

Not here: where the bytes come from (`fetch`), what they are called (`data_pipelines.storage.stores`).
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from data_pipelines.errors import DataError

__all__ = ["ShardCache"]

_COUNT_BYTES = 8
_POLL_S = (0.002, 0.05)  # first and longest pause while another process fetches


class ShardCache:
    """Files by name; `open` fetches what is not there.

    Args:
        folder: made at the first use.
        limit: bytes of all files together. Blocks being written by several processes at once, and files pinned by
            `pin`, may exceed it while they are.
        stall_s: a writer that adds nothing for so long makes those who wait for it fail.
    """

    def __init__(self, folder: Path, limit: int, stall_s: float) -> None:
        self._folder, self._limit, self._stall_s = folder, limit, stall_s
        self._blocks, self._parts, self._lock = str(folder / "blocks"), folder / "parts", folder / "lock"
        self._ready = False

    def path(self, name: str) -> Path:
        return Path(self._blocks, name)

    def find(self, name: str, size: int | None) -> int | None:
        """A descriptor of the file, marked as just used; None if it is absent. One of a wrong size is removed."""
        path = f"{self._blocks}/{name}"  # not pathlib: each read of a sample comes here
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(descriptor).st_size != size:
            os.close(descriptor)
            with suppress(FileNotFoundError):
                os.unlink(path)
            return None
        os.utime(descriptor)
        return descriptor

    def open(self, name: str, size: int | None, produce: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the file, which stays readable even when the file is evicted. The caller closes it.

        Args:
            size: in bytes; None if it is not known before.
            produce: writes the content; called by one of the processes and threads that ask at the same time.

        Raises:
            DataError: the folder cannot be written, or is smaller than the file; and whatever `produce` raises.
        """
        pause, longest = _POLL_S
        try:
            while (descriptor := self.find(name, size)) is None:
                self._prepare()
                with self._claim(name) as part:
                    if part is not None:
                        found = self.find(name, size)  # finished by another between the two lines above
                        return self._produce(name, part, size, produce) if found is None else found
                time.sleep(pause)
                pause = min(2 * pause, longest)
        except OSError as error:
            raise DataError(
                f"cannot use the shard cache {self._folder}: {error.strerror}; "
                "set PRETRAIN_CACHE or data.cache_dir to a folder with room"
            ) from None
        return descriptor

    def pin(self, name: str, descriptor: int) -> bool:
        """Keep a file from eviction until `descriptor` is closed; False if it is evicted already."""
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return _is_at(self.path(name), descriptor)

    def _prepare(self) -> None:
        if not self._ready:
            os.makedirs(self._blocks, exist_ok=True)
            self._parts.mkdir(exist_ok=True)
            for entry in os.scandir(self._parts):
                _remove_unlocked(entry.path)
            self._ready = True

    @contextmanager
    def _claim(self, name: str) -> Iterator[BinaryIO | None]:
        """The locked part file of a name, removed at the end unless it was published; None while another holds it."""
        path = self._parts / name
        with open(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as part:
            try:
                fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.time() - os.fstat(part.fileno()).st_mtime > self._stall_s:
                    raise DataError(
                        f"another process holds {path} and has written nothing for {self._stall_s:g} s; end it"
                    ) from None
                yield None
                return
            if not _is_at(path, part.fileno()):  # published or removed between open and lock
                yield None
                return
            try:
                yield part
            finally:
                if _is_at(path, part.fileno()):
                    path.unlink()
                # Closing is not enough where a fork in between left a second descriptor.
                fcntl.flock(part, fcntl.LOCK_UN)

    def _produce(self, name: str, part: BinaryIO, size: int | None, produce: Callable[[BinaryIO], None]) -> int:
        if size is not None:
            self._reserve(name, size)
            part.truncate(size)
        produce(part)
        part.flush()
        if size is None:
            self._reserve(name, part.tell())
        os.replace(self._parts / name, self.path(name))
        # Opened before the lock on the file goes with `part`: nobody can evict it in between.
        return os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC)

    def _reserve(self, name: str, size: int) -> None:
        """Count `size` bytes more, after evicting what the limit demands."""
        if size > self._limit:
            raise DataError(
                f"the shard cache {self._folder} of {self._limit} bytes cannot hold a file of {size}; "
                "raise data.cache_gb"
            )
        with open(os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b", buffering=0) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            count = os.pread(lock.fileno(), _COUNT_BYTES, 0)
            used = int.from_bytes(count, "little") if len(count) == _COUNT_BYTES else self._limit
            if used + size > self._limit:
                used = self._evict(self._limit - size, name)
            os.pwrite(lock.fileno(), (used + size).to_bytes(_COUNT_BYTES, "little"), 0)

    def _evict(self, room: int, own: str) -> int:
        """Remove files until at most `room` bytes are left, and up to a tenth of the limit more, so that the next call
        is not soon; returns what is left."""
        # Parts first: one that becomes a block meanwhile is counted twice rather than not at all.
        used = sum(_remove_unlocked(entry.path) for entry in os.scandir(self._parts) if entry.name != own)
        blocks = []
        for entry in os.scandir(self._blocks):
            with suppress(FileNotFoundError):
                status = entry.stat()
                blocks.append((status.st_mtime_ns, status.st_size, entry.path))
                used += status.st_size
        if used > room:
            for _, size, path in sorted(blocks):
                if used <= room and used - size < room - self._limit // 10:
                    break
                used -= size - _remove_unlocked(path)
        return used


def _remove_unlocked(path: str) -> int:
    """Remove a file that nobody has locked; returns the bytes that are still there."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _is_at(Path(path), descriptor):
            os.unlink(path)
        return 0
    except BlockingIOError:
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
