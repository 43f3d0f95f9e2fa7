"""A folder of this machine and its counterpart in a store: what has changed in the one is copied to the other.

What both sides were like when a file was copied last is kept in the local folder. Not here: which direction is right
(`pretrain.record.remote_runs`).
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from pretrain.remote.folder import RemoteFolder

__all__ = ["Mirror"]

_KNOWN, _LOCK, _ASIDE = ".mirror.json", ".mirror.lock", ".mirror-"


class Mirror:
    """The two folders.

    Args:
        local: Of this machine; several processes may copy at a time.
        remote: Its counterpart.
    """

    def __init__(self, local: Path, remote: RemoteFolder) -> None:
        self._local, self._remote = local, remote

    def push(self, names: Sequence[str]) -> None:
        """Copy to the store what has changed here.

        All is read before anything is sent: a file may tell of those that are named after it, which are read later and
        sent earlier, so that the store never has more told than it has.

        Args:
            names: Of files, relative to both folders; those that are not here are passed over.

        Raises:
            Exception: Whatever the store's library raises; what was sent until then need not be sent again.
        """
        with self._locked() as known:
            changed = [(name, here) for name in names if (here := self._here(name)) not in (None, _of(known, name)[0])]
            if not changed:
                return
            with tempfile.TemporaryDirectory(prefix=_ASIDE, dir=self._local) as aside:
                for index, (name, _) in enumerate(changed):
                    shutil.copyfile(self._local / name, Path(aside, str(index)))
                for index, (name, here) in reversed(list(enumerate(changed))):
                    known[name] = [here, self._remote.put(Path(aside, str(index)), name)]

    def fetch(self, folders: Sequence[str], is_wanted: Callable[[str], bool]) -> None:
        """Copy from the store what has changed there, each file whole.

        Args:
            folders: To look into, relative to both; "" is the folder itself.
            is_wanted: Of a name relative to both.

        Raises:
            Exception: Whatever the store's library raises.
        """
        with self._locked() as known, tempfile.TemporaryDirectory(prefix=_ASIDE, dir=self._local) as aside:
            for folder in folders:
                for file, there in self._remote.files(folder).items():
                    name = f"{folder}/{file}".lstrip("/")
                    dest = self._local / name
                    if not is_wanted(name) or (_of(known, name)[1] == there and dest.exists()):
                        continue
                    self._remote.get(name, Path(aside, "file"))
                    dest.parent.mkdir(exist_ok=True)
                    os.replace(Path(aside, "file"), dest)
                    known[name] = [self._here(name), there]

    @contextmanager
    def _locked(self) -> Iterator[dict[str, Any]]:
        """What is known, for this process alone; it is kept also of a copy that ends half-way."""
        self._local.mkdir(parents=True, exist_ok=True)
        with open(self._local / _LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self._local / _KNOWN
            try:
                known = parse_json(path.read_text())
            except (FileNotFoundError, ValueError):  # all is copied again
                known = {}
            before = dict(known)
            try:
                yield known
            finally:
                if known != before:
                    write_atomically(path, json.dumps(known).encode())

    def _here(self, name: str) -> list[int] | None:
        try:
            found = (self._local / name).stat()
        except FileNotFoundError:
            return None
        return [found.st_size, found.st_mtime_ns]


def _of(known: dict[str, Any], name: str) -> list[Any]:
    """The file here and the file there, as they were copied last."""
    found: list[Any] = known.get(name, [None, None])
    return found
