"""Work that several processes of a machine want done, and one of them does: a lock beside the file that comes of it.

The lock is a `flock` on `<name>.lock`, so it ends with the process that holds it, however that ends: whoever waits then
finds no file and does the work itself. Removing the lock's file is part of letting go.

Not here: claims that expire, on file systems without locks (`evaluation.lease`); the cache of fetched shards, whose
locks are the files that are written (`data_pipelines.storage.cache`).
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["claimed", "is_at"]


@contextmanager
def claimed(path: Path, *, wait: bool) -> Iterator[bool]:
    """Be the only one, of all processes and threads, that makes the file at `path`.

    Args:
        path: Of the file. Look for it again inside the block: another may have just made it.
        wait: Until nobody else does; otherwise the block is entered with False while another one has the claim.

    Raises:
        OSError: The folder cannot be made or written, or its file system has no locks.
    """
    lock = path.with_name(f"{path.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not is_at(lock, file.fileno()):
                continue  # let go, and so removed, between opening and locking: what is locked is no lock any more
            try:
                yield True
            finally:
                lock.unlink(missing_ok=True)
                # Closing is not enough where a fork in between left a second descriptor.
                fcntl.flock(file, fcntl.LOCK_UN)
            return


def is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that lies there now."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False
