"""Places on a local disk that a user names for what is to be written. Not here: places of runs (`run_dir`)."""

from __future__ import annotations

import os
from pathlib import Path

from pretrain.errors import RequestError

__all__ = ["nearest_above", "require_local"]


def require_local(dest: str | os.PathLike[str], what: str) -> Path:
    """The absolute path of a destination, below a folder that is there.

    Args:
        what: is to be written, for the message.

    Raises:
        RequestError: It is a URL, or below something that is no folder.
    """
    text = os.fspath(dest)
    if "://" in text:
        raise RequestError(f"{text}: {what} is written to a local disk; copy it to its store afterwards")
    path = Path(text).absolute()
    if not (above := nearest_above(path)).is_dir():
        raise RequestError(f"{text}: {above} is no folder; choose another destination")
    return path


def nearest_above(path: Path) -> Path:
    """The nearest thing above an absolute path that is there."""
    return next((folder for folder in path.parents if folder.exists()), path)
