"""Places on a local disk that a user names for what is to be written. Not here: places of runs (`run_dir`)."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pretrain.errors import RequestError

__all__ = ["nearest_above", "require_local"]


def require_local(dest: str | os.PathLike[str], what: str) -> Path:
    """The absolute path of a destination, below a folder that is there and can be written to.

    Args:
        what: is to be written, for the message.

    Raises:
        RequestError: It is nothing, a URL, or below something that is no folder or takes nothing.
    """
    text = os.fspath(dest)
    if not text:
        raise RequestError(f"the destination is empty; name where {what} is to be written")
    if "://" in text:
        raise RequestError(f"{text}: {what} is written to a local disk; copy it to its store afterwards")
    path = Path(text).absolute()
    try:
        if not (above := nearest_above(path)).is_dir():
            raise RequestError(f"{text}: {above} is no folder; choose another destination")
        with tempfile.TemporaryDirectory(prefix=".pretrain-", dir=above):
            pass  # tried, for permissions do not tell of file systems that are read-only or no place for files
    except OSError as error:
        problem = f"{what} cannot be written there: {error.strerror}"
        raise RequestError(f"{text}: {problem}; choose another destination") from None
    return path


def nearest_above(path: Path) -> Path:
    """The nearest thing above an absolute path that is there."""
    return next((folder for folder in path.parents if folder.exists()), path)
