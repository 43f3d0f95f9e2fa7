"""Locks on what a run has only one of: a driver, a sender to MLflow.

A lock ends with the process that holds it, however that ends. Processes on other hosts see it where the file system
passes `flock` on (NFS since version 4, Lustre and CephFS do). Not here: leases that expire (`evaluation.lease`).
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import IO

__all__ = ["LOOKED_AT_S", "hold", "holder", "is_held"]

LOOKED_AT_S = 0.2  # after which a lock that is still held is so by its owner, and not by who looks whether it is held


def hold(path: Path) -> IO[str] | None:
    """Take the lock for this process, until the file that is returned is closed; None when another one has it."""
    lock = path.open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def holder(path: Path) -> str:
    """The id of the process that took the lock last."""
    return path.read_text().strip()


def is_held(path: Path) -> bool:
    """Whether a process has the lock now. Who looks has it for a moment, too: see `LOOKED_AT_S`."""
    try:
        with path.open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
