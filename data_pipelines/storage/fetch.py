"""Bytes over the network: http(s), s3 and gs through the file systems of fsspec, with retries that we control.

The file systems answer single requests; when to try again, how long to wait and when to give up is decided here, the
same for all of them. A request that broke off goes on at the byte already received. Their connections belong to one
process: a fork makes its own.

Not here: what is kept of the bytes (`cache`), which bytes are wanted (`shards`).
"""

from __future__ import annotations

import asyncio
import os
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Protocol, TypeVar

from data_pipelines.errors import DataError
from data_pipelines.storage.locations import HTTP, OBJECT_STORES, redact, scheme_of

__all__ = ["Facts", "FetchOptions", "RangesIgnored", "Remote"]

Result = TypeVar("Result")

_FIRST_WAIT_S = 0.2
_LONGEST_WAIT_S = 20.0
_RETRIED_STATUS = frozenset({408, 425, 429})  # and 5xx
_ABSENT_STATUS = frozenset({401, 403, 404, 410})  # of an optional file; stores answer 403 where listing is forbidden
_LIBRARIES = frozenset({"aiohttp", "aiobotocore", "botocore", "fsspec", "gcsfs", "google", "requests", "urllib3"})
_forked: list[object] = []  # connections of the parent process; see `Remote.close`


@dataclass(frozen=True)
class FetchOptions:
    """How remote shards are read; nothing here changes what is read."""

    cache_dir: str | None = None  # None: $PRETRAIN_CACHE/shards, by default ~/.cache/pretrain/shards
    cache_bytes: int = 32 << 30  # of all processes that share the folder together
    mode: str = "auto"  # range: blocks; shard: whole shards; auto: blocks where the server can
    block_bytes: int = 4 << 20
    retries: int = 5  # after the first attempt; whole shards get them anew with every `block_bytes` received
    timeout_s: float = 30.0  # to connect, and between two pieces of an answer
    deadline_s: float = 120.0  # all attempts together; whole shards get it anew with every `block_bytes` received
    allow_pipe: bool = False  # whether `pipe:COMMAND` may be run

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "range", "shard"):
            raise DataError(f"fetch mode {self.mode!r} is unknown; allowed are auto, range and shard")
        if self.block_bytes < 1 or self.retries < 0 or min(self.timeout_s, self.deadline_s) <= 0:
            raise DataError(f"{self}: block_bytes, timeout_s and deadline_s must be positive, retries at least 0")
        if self.cache_bytes < self.block_bytes:
            raise DataError(
                f"a cache of {self.cache_bytes} bytes cannot hold one block of {self.block_bytes}; raise data.cache_gb"
            )

    @property
    def folder(self) -> Path:
        if self.cache_dir:
            return Path(self.cache_dir).expanduser()
        root = os.environ.get("PRETRAIN_CACHE")
        return (Path(root).expanduser() if root else Path.home() / ".cache" / "pretrain") / "shards"


@dataclass(frozen=True)
class Facts:
    """What a server says about a file."""

    size: int | None  # bytes; None: it does not say
    version: str  # ETag, generation or date; "" if it gives none
    ranges: bool  # whether parts of the file can be asked for


class RangesIgnored(Exception):
    """The server sends the whole file, whatever part is asked for."""


class Failure(Exception):
    """One request failed.

    Attributes:
        final: asking again is useless.
        status: of HTTP, where there is one.
        retry_after_s: how long the server wants us to wait.
    """

    def __init__(
        self, cause: str, *, final: bool = False, status: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(cause)
        self.final, self.status, self.retry_after_s = final, status, retry_after_s


class Link(Protocol):
    """Single requests to one kind of store; failures raise `Failure` or an exception of the library behind."""

    filesystem: Any

    async def facts(self, location: str) -> Facts: ...

    async def copy(
        self, location: str, begin: int, end: int | None, facts: Facts, write: Callable[[bytes], None], *, whole: bool
    ) -> None: ...

    async def content(self, location: str) -> bytes | None: ...

    async def glob(self, pattern: str) -> list[str]: ...


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

    def content(self, location: str) -> bytes | None:
        """A small file whole; None if it is absent, or may not be read."""
        return self._persist(location, lambda link: link.content(location))

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
        from fsspec.asyn import sync

        patience = patience or _Patience(self._options)
        while True:
            try:
                link = self._link(location)
                return sync(link.filesystem.loop, patience.bounded, request, link)
            except (RangesIgnored, DataError):
                raise
            except Exception as error:
                patience.wait(_failure(error, self._options), location, offset())

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


def status_failure(status: int, reason: str, headers: Mapping[str, str]) -> Failure:
    """What an HTTP status other than success means."""
    final = 400 <= status < 500 and status not in _RETRIED_STATUS
    remedy = {401: "; check the credentials", 403: "; check the credentials", 404: "; check the name"}
    cause = f"HTTP {status} {reason}".strip() + remedy.get(status, "")
    return Failure(cause, final=final, status=status, retry_after_s=_retry_after_s(headers.get("Retry-After", "")))


def is_absent(error: Exception) -> bool:
    """Whether an optional file is not there, or not for us."""
    if isinstance(error, FileNotFoundError | PermissionError):
        return True
    return _failure(error, None).status in _ABSENT_STATUS


def _retry_after_s(value: str) -> float | None:
    if value.strip().isdigit():
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except ValueError:
        return None


def _failure(error: Exception, options: FetchOptions | None) -> Failure:
    """One kind of exception out of those of six libraries; what none of them raises is a bug of ours and passes."""
    if isinstance(error, Failure):
        return error
    name = type(error).__name__
    if isinstance(error, TimeoutError):
        limits = f" ({options.timeout_s:g} s without data, or {options.deadline_s:g} s in all)" if options else ""
        return Failure(f"timed out{limits}")
    text = " ".join(str(error).split()) or name
    if "Credential" in name:
        return Failure(f"{text}; set the credentials of the store in the environment", final=True)
    if isinstance(error, FileNotFoundError):
        return Failure("no such file; check the name", final=True, status=404)
    if isinstance(error, PermissionError):
        return Failure(f"{text}; check the credentials", final=True, status=403)
    status = _status_of(error)
    if status is not None and status >= 400:
        return status_failure(status, text, {})
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES:
        return Failure(text, final=isinstance(error, ValueError))
    raise error


def _status_of(error: BaseException) -> int | None:
    """HTTP status behind an exception of botocore (`response`) or gcsfs (`code`), which s3fs translates (`cause`)."""
    for source in (error, error.__cause__):
        response = getattr(source, "response", None)
        if isinstance(response, dict):
            return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) or None
        if type(source).__module__.startswith("gcsfs") and str(code := getattr(source, "code", "")).isdigit():
            return int(code)
    return None
