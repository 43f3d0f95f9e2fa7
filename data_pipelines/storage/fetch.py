"""Bytes over the network: http(s), s3 and gs through the file systems of fsspec, with retries that we control.

The file systems answer single requests; when to try again, how long to wait and when to give up is decided here, the
same for all of them. A request that broke off goes on at the byte already received. Their connections belong to one
process: a fork makes its own.

Not here: what is kept of the bytes (`cache`), which bytes are wanted (`blocks`), single requests (`links`).
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Awaitable, Callable
from typing import TypeVar

from data_pipelines.errors import DataError
from data_pipelines.storage.failures import Failure, RangesIgnored, failure_of
from data_pipelines.storage.fsspec_internals import run_on
from data_pipelines.storage.locations import HTTP, OBJECT_STORES, redact, scheme_of
from data_pipelines.storage.request import Facts, FetchOptions, Link

__all__ = ["Remote"]

Result = TypeVar("Result")

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_forked: list[object] = []  # connections of the parent process; see `Remote.close`


class Remote:
    """Requests that are repeated until they succeed, or until repeating is useless."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._links: dict[str, Link] = {}
        self._pid = os.getpid()

    def facts(self, location: str) -> Facts:
        """Size and version of a file.

        Raises:
            DataError: it is not there or cannot be had; names URL, cause and what was tried. So for all methods.
        """
        return self._persist(location, lambda link: link.facts(location))

    def content(self, location: str, limit: int) -> bytes | None:
        """A small file whole; None if it is absent, or may not be read.

        Raises:
            TooLargeError: it has more than `limit` bytes; what memory held of it never was more.
        """
        return self._persist(location, lambda link: link.content(location, limit))

    def glob(self, pattern: str) -> list[str]:
        """Locations that match, sorted."""
        return self._persist(pattern, lambda link: link.glob(pattern))

    def copy(
        self, location: str, begin: int, end: int | None, facts: Facts, write: Callable[[bytes], object], *, whole: bool
    ) -> None:
        """Pass bytes `begin..end` (None: to the end of the file) to `write`, in order, each once.

        Args:
            facts: what the file was when it was opened; one that was replaced since is an error.
            whole: fetch even from a server that ignores ranges, skipping what is not wanted.

        Raises:
            RangesIgnored: the server can only send the whole file, and `whole` is false.
        """
        position, patience = begin, _Patience(self._options)

        def received(piece: bytes) -> None:
            nonlocal position
            try:
                write(piece)
            except OSError as error:  # ours, not the network's
                raise DataError(
                    f"cannot write to the shard cache {self._options.folder}: {error.strerror}; "
                    "set PRETRAIN_CACHE or data.cache_dir to a folder with room"
                ) from None
            position += len(piece)
            patience.progress(len(piece))

        def rest(link: Link) -> Awaitable[None]:
            return link.copy(location, position, end, facts, received, whole=whole)

        self._persist(location, rest, patience, lambda: position)

    def close(self) -> None:
        """Give up the connections; the next request makes new ones."""
        if self._pid != os.getpid():
            # Sockets and their epoll set are shared with the parent; closing ours would deafen the parent's, so the
            # old objects are kept from being collected.
            _forked.append(self._links)
        self._links, self._pid = {}, os.getpid()

    def _persist(
        self,
        location: str,
        request: Callable[[Link], Awaitable[Result]],
        patience: _Patience | None = None,
        offset: Callable[[], int] = lambda: 0,
    ) -> Result:
        patience = patience or _Patience(self._options)
        while True:
            try:
                link = self._link(location)
                return run_on(link.filesystem, patience.bounded, request, link)
            except (RangesIgnored, DataError):
                raise
            except Exception as error:
                patience.wait(failure_of(error, self._options), location, offset())

    def _link(self, location: str) -> Link:
        if self._pid != os.getpid():
            self.close()
        scheme = scheme_of(location) or ""
        kind = {"https": "http", "gcs": "gs"}.get(scheme, scheme)
        if kind not in self._links:
            if scheme not in (*HTTP, *OBJECT_STORES):
                raise DataError(
                    f"{redact(location)} is neither an absolute path nor a URL of http, https, s3, gs or gcs"
                )
            from data_pipelines.storage.links import BucketLink, HttpLink

            self._links[kind] = HttpLink(self._options) if kind in HTTP else BucketLink(kind, self._options)
        return self._links[kind]


class _Patience:
    """Attempts and time left for one piece of work."""

    def __init__(self, options: FetchOptions) -> None:
        self._options = options
        self._begin = time.monotonic()
        self._limit: asyncio.Timeout | None = None
        self._tried = 0
        self._renew()

    def _renew(self) -> None:
        self._failed = 0
        self._received = 0
        self._end = time.monotonic() + self._options.deadline_s

    def progress(self, num_bytes: int) -> None:
        """Called inside a request; a block's worth of bytes earns all attempts and the whole deadline again."""
        self._received += num_bytes
        if self._received >= self._options.block_bytes:
            self._renew()
            if self._limit is not None:
                self._limit.reschedule(asyncio.get_running_loop().time() + self._options.deadline_s)

    async def bounded(self, request: Callable[[Link], Awaitable[Result]], link: Link) -> Result:
        self._tried += 1
        async with asyncio.timeout(max(self._end - time.monotonic(), 0.0)) as self._limit:
            return await request(link)

    def wait(self, failure: Failure, location: str, offset: int) -> None:
        """Sleep before the next attempt.

        Raises:
            DataError: there is none.
        """
        self._failed += 1
        where = f"{redact(location)} at offset {offset}: {redact(str(failure))}"
        if failure.final:
            raise DataError(where)
        seconds = failure.retry_after_s
        if seconds is None:
            spread = zlib.crc32(f"{location} {offset} {self._tried} {os.getpid()}".encode()) / 2**32
            seconds = min(_FIRST_WAIT_S * 2 ** (self._failed - 1), _LONGEST_WAIT_S) * (0.5 + spread)
        if self._failed > self._options.retries or time.monotonic() + seconds >= self._end:
            spent = time.monotonic() - self._begin
            raise DataError(
                f"{where}; gave up after {self._tried} attempt{'s' * (self._tried > 1)} in {spent:.1f} s: "
                "the server or the network fails, try again later"
            )
        time.sleep(seconds)
