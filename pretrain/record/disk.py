"""A disk that takes nothing more: full, over its quota, or read-only. Libraries say it in ways that seldom help.

No restart mends it, so a run ends at once, with one line that names the directory and what was wanted of it.
"""

from __future__ import annotations

import errno
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["DiskFull", "naming_disk", "require_room"]

_TAKES_NOTHING = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "the quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EFBIG: "no file may be that large",
}
_SAID_BY_TORCH = ("PytorchStreamWriter failed", "unexpected pos", "file write failed")


class DiskFull(Exception):
    """Nothing can be written to a directory any more; the message is one line with the remedy."""


@contextmanager
def naming_disk(directory: Path, what: str, wanted_bytes: int = 0) -> Iterator[None]:
    """Say plainly when the block fails because nothing more can be written.

    Args:
        directory: Where it writes.
        what: What it writes, e.g. "the checkpoint of step 40".
        wanted_bytes: About how much that is; 0: unknown, or little.

    Raises:
        DiskFull: In place of an error that comes from the disk; others pass.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if (reason := _reason(error, directory, wanted_bytes)) is None:
            raise
        raise DiskFull(_line(reason, directory, what, wanted_bytes)) from error


def require_room(directory: Path, what: str, wanted_bytes: int) -> None:
    """Refuse before anything is written.

    Raises:
        DiskFull: Fewer than `wanted_bytes` are free.
    """
    if shutil.disk_usage(directory).free < wanted_bytes:
        raise DiskFull(_line("no space left", directory, what, wanted_bytes))


def _reason(error: Exception, directory: Path, wanted_bytes: int) -> str | None:
    number = error.errno if isinstance(error, OSError) else None
    if said := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors
        number = int(said[1])
    if number in _TAKES_NOTHING:
        return _TAKES_NOTHING[number]
    is_full = shutil.disk_usage(directory).free < max(wanted_bytes, 1 << 20)
    return "no space left" if is_full and any(text in str(error) for text in _SAID_BY_TORCH) else None


def _line(reason: str, directory: Path, what: str, wanted_bytes: int) -> str:
    wanted = f"about {_size(wanted_bytes)} wanted, " if wanted_bytes else ""
    free = _size(shutil.disk_usage(directory).free)
    return f"{directory}: {reason} while writing {what} ({wanted}{free} free); make room, then resume the run"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
