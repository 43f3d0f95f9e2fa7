"""What systems leave beside data unasked: AppleDouble companions, folder settings, thumbnails. It is never data.

Every place that lists files, shards or members of tars asks here, leaves these out, and says so once.
"""

from __future__ import annotations

__all__ = ["is_hidden"]

_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


def is_hidden(path: str) -> bool:
    """Whether a file is hidden, or lies in a hidden folder of its path.

    Args:
        path: of a member inside its tar, or of a file relative to the folder that is listed, with slashes; what lies
            above is the user's choice, and no reason to leave a file out.
    """
    parts = path.split("/")
    return any((part[:1] == "." and part not in (".", "..")) or part.lower() in _NAMES for part in parts)
