"""Where runs and checkpoints will be: free space, what publishing takes, and the clock of who stores."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from pretrain.doctor.finding import Finding, Level, size
from pretrain.errors import last_line

__all__ = ["clock", "disk", "store"]

DISK_FEW, DISK_NONE = 20 << 30, 1 << 30  # bytes
SKEW_FEW_S, SKEW_MUCH_S = 5.0, 300.0  # stores refuse requests that were signed more than some minutes ago


def disk(storage: str) -> Finding:
    place = _existing(Path.cwd() if "://" in storage else Path(storage).absolute())
    free = shutil.disk_usage(place).free
    level: Level = "fail" if free < DISK_NONE else "warn" if free < DISK_FEW else "ok"
    remedy = "free some, or keep checkpoints elsewhere (checkpoints.storage=URI, train.keep_last)"
    return Finding("disk", level, f"{size(free)} free at {place}", "" if level == "ok" else remedy)


def store(storage: str) -> Finding:
    """Write, write again only if absent, read, delete: what publishing a checkpoint takes."""
    began = time.monotonic()
    try:
        with _probe(storage) as probe:
            is_safe = probe.refuses_second()
            if probe.read() != probe.content:
                return Finding("storage", "fail", f"{storage}: reads back something else", "do not use this store")
    except Exception as error:  # of any of a store's libraries
        remedy = "see whether it exists, who may write there, and the credentials in the environment"
        return Finding("storage", "fail", f"{storage}: {type(error).__name__}: {last_line(error)}", remedy)
    text = f"{storage}: written, read and deleted in {time.monotonic() - began:.1f} s"
    if is_safe:
        return Finding("storage", "ok", f"{text}; a second writer is refused")
    remedy = "let one driver at a time write to a run: here nothing keeps a second one from overwriting"
    return Finding("storage", "warn", f"{text}; a second writer is NOT refused", remedy)


def clock(storage: str) -> Finding:
    """This clock against that of the machine that stores, by the time that it gives a file."""
    try:
        with _probe(storage) as probe:
            skew = probe.modified() - probe.written_at
    except Exception as error:
        return Finding("clock", "warn", f"not compared: {type(error).__name__}: {last_line(error)}", "see storage")
    text = f"{abs(skew):.0f} s {'behind' if skew > 0 else 'ahead of'} {storage}" if abs(skew) >= 2 else "as the store's"
    level: Level = "fail" if abs(skew) > SKEW_MUCH_S else "warn" if abs(skew) > SKEW_FEW_S else "ok"
    return Finding("clock", level, text, "" if level == "ok" else "let the clock be set by NTP (chrony, timesyncd)")


class _LocalProbe:
    """A small file in a directory, or in the closest one above that exists."""

    def __init__(self, storage: str) -> None:
        self.content = secrets.token_bytes(16)
        self._path = _existing(Path(storage).absolute()) / f".pretrain-doctor-{secrets.token_hex(8)}"

    def write(self) -> None:
        self.written_at = time.time()
        with self._path.open("xb") as file:
            file.write(self.content)

    def refuses_second(self) -> bool:
        try:
            self._path.open("xb").close()
        except FileExistsError:
            return True
        return False

    def read(self) -> bytes:
        return self._path.read_bytes()

    def modified(self) -> float:
        return self._path.stat().st_mtime

    def remove(self) -> None:
        self._path.unlink()


class _StoreProbe:
    """A small object in a store."""

    def __init__(self, uri: str) -> None:
        import fsspec

        self.content = secrets.token_bytes(16)
        self._files, root = fsspec.core.url_to_fs(uri, skip_instance_cache=True, use_listings_cache=False)
        self._name = f"{root.rstrip('/')}/.pretrain-doctor-{secrets.token_hex(8)}"

    def write(self) -> None:
        self.written_at = time.time()
        self._files.pipe_file(self._name, self.content)

    def refuses_second(self) -> bool:
        try:
            self._files.pipe_file(self._name, self.content, mode="create")
        except FileExistsError:
            return True
        except (TypeError, ValueError, NotImplementedError):  # of a store whose library cannot ask for it
            return False
        return False

    def read(self) -> bytes:
        return bytes(self._files.cat_file(self._name))

    def modified(self) -> float:
        when: datetime = self._files.modified(self._name)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()

    def remove(self) -> None:
        self._files.rm_file(self._name)


@contextlib.contextmanager
def _probe(storage: str) -> Iterator[_LocalProbe | _StoreProbe]:
    probe = _StoreProbe(storage) if "://" in storage else _LocalProbe(storage)
    probe.write()
    try:
        yield probe
    finally:
        probe.remove()


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.is_dir())
