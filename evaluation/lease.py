"""One computation per key over all processes: a lock file with an owner, a heartbeat and an expiry.

The file is created with O_EXCL and names host, process and a token. An owner that died (its process is gone, or its
heartbeat is older than `EXPIRY_S`) loses the lease to whoever looks next. Judging and removing a dead lease happens
under `flock`, so two onlookers cannot both take it. If clocks or file systems defeat all of this, the worst case is the
same result computed twice; publication is atomic either way.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from data_pipelines.parsing import parse_json

__all__ = ["compute_once"]

HEARTBEAT_S = 5.0
EXPIRY_S = 60.0
POLL_S = (0.05, 1.0)  # first and longest wait between looks at somebody else's lease

T = TypeVar("T")


def compute_once(lease_path: Path, find: Callable[[], T | None], make: Callable[[], T]) -> tuple[T, bool]:
    """Returns (value, made here?): what `find` finds, else what `make` makes while holding the lease.

    Waits while another live process holds the lease; when that one fails, this one tries. `make` must publish its value
    so that `find` sees it.
    """
    pause = POLL_S[0]
    while True:
        found = find()
        if found is not None:
            return found, False
        with _lease(lease_path) as is_held:
            if is_held:
                found = find()  # it may have been published between the first look and the lease
                return (found, False) if found is not None else (make(), True)
        time.sleep(pause)
        pause = min(2 * pause, POLL_S[1])


@contextlib.contextmanager
def _lease(path: Path) -> Iterator[bool]:
    token = uuid.uuid4().hex
    if not _acquire(path, token):
        yield False
        return
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heartbeat.start()
    try:
        yield True
    finally:
        stop.set()
        heartbeat.join()
        if (_owner(path) or {}).get("token") == token:  # an expired lease may have a new owner
            path.unlink(missing_ok=True)


def _acquire(path: Path, token: str) -> bool:
    path.parent.mkdir(parents=True, exist_ok=True)
    if _create(path, token):
        return True
    if not _is_dead(path):
        return False
    with open(path.parent / ".lease-guard", "w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        if _is_dead(path):  # again: another onlooker may have replaced it meanwhile
            path.unlink(missing_ok=True)
    return _create(path, token)


def _create(path: Path, token: str) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    pid = os.getpid()
    owner = {"host": socket.gethostname(), "pid": pid, "started": _process_start(pid), "token": token}
    with os.fdopen(descriptor, "w") as file:
        json.dump(owner, file)
    return True


def _owner(path: Path) -> dict[str, str | int] | None:
    """The owner written in the lease; None when it is gone or not (yet) fully written."""
    try:
        owner = parse_json(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return owner if isinstance(owner, dict) else None


def _is_dead(path: Path) -> bool:
    try:
        age_s = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return False
    owner = _owner(path)
    if owner is not None and owner.get("host") == socket.gethostname():
        # a reused process id has another start time
        started = _process_start(int(owner["pid"]))
        if started is None or started != owner.get("started"):
            return True
    return age_s > EXPIRY_S


def _process_start(pid: int) -> str | None:
    """Start time of a live process in clock ticks since boot; None when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in ("Z", "X") else fields[18]


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):  # a missed beat is what the expiry is for
            os.utime(path)
