"""A folder in a store behind fsspec, for small files: listed, read and written whole."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError, RunFailed, last_line

__all__ = ["RemoteFolder", "answering"]

_STAMPS = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
_REFUSALS = (FileNotFoundError, ImportError, NotImplementedError, PermissionError, ValueError)


class RemoteFolder:
    """A folder at a URI. Whatever the store's library raises comes out, but for what is said otherwise."""

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")

    def inside(self, name: str) -> RemoteFolder:
        """A folder in it."""
        return RemoteFolder(f"{self.uri}/{name}")

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The file system, without any cache of listings (other processes write, too), and the folder in it."""
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(self.uri, skip_instance_cache=True, use_listings_cache=False)
        return filesystem, root.rstrip("/")

    def files(self, folder: str = "") -> dict[str, str]:
        """Names of the files directly in a folder -> a text that changes when the file does."""
        return {name: _stamp(facts) for name, facts in self._entries(folder) if facts["type"] == "file"}

    def folders(self) -> list[str]:
        """Names of the folders directly in it, sorted."""
        return sorted(name for name, facts in self._entries("") if facts["type"] == "directory")

    def read(self, name: str) -> bytes | None:
        """The contents of a file; None when there is none."""
        filesystem, root = self._opened
        try:
            content: bytes = filesystem.cat_file(f"{root}/{name}")
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        filesystem, root = self._opened
        filesystem.pipe_file(f"{root}/{name}", content)

    def put(self, path: Path, name: str) -> str:
        """Copy a local file that nobody writes to any more to `name`; the text that `files` has for it.

        Raises:
            OSError: The store has lost some of it.
        """
        filesystem, root = self._opened
        filesystem.put_file(str(path), f"{root}/{name}")
        facts, size = filesystem.info(f"{root}/{name}"), path.stat().st_size
        if facts["size"] != size:
            raise OSError(f"{self.uri}/{name}: was written, and the store has {facts['size']} of its {size} bytes")
        return _stamp(facts)

    def get(self, name: str, dest: Path) -> None:
        """Copy a file to a local path."""
        filesystem, root = self._opened
        filesystem.get_file(f"{root}/{name}", str(dest))

    def remove(self, name: str) -> None:
        filesystem, root = self._opened
        filesystem.rm_file(f"{root}/{name}")

    def _entries(self, folder: str) -> list[tuple[str, dict[str, Any]]]:
        filesystem, root = self._opened
        path = f"{root}/{folder}".rstrip("/")
        try:
            found = filesystem.ls(path, detail=True)
        except FileNotFoundError:
            return []
        below = [(facts["name"].rstrip("/"), facts) for facts in found]
        return [(name.rpartition("/")[2], facts) for name, facts in below if name.strip("/") != path.strip("/")]


@contextmanager
def answering(uri: str) -> Iterator[None]:
    """Turn what a store's library raises into one line.

    Raises:
        RequestError: The store, or its library, is not there or refuses.
        RunFailed: It does not answer.
    """
    try:
        yield
    except (RequestError, RunFailed):
        raise
    except Exception as error:  # of any of a store's libraries
        remedy = f"`pretrain doctor --storage {redact(uri)}` says what is amiss"
        line = f"storage={redact(uri)}: {type(error).__name__}: {redact(last_line(error))}; {remedy}"
        if isinstance(error, _REFUSALS):
            raise RequestError(line) from error
        raise RunFailed(line) from error


def _stamp(facts: dict[str, Any]) -> str:
    """That of the content where the store has one, else the time of writing; with the size."""
    found = next((str(facts[key]) for key in _STAMPS if facts.get(key) is not None), "")
    return f"{facts.get('size')} {found}"
