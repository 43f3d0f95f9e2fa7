"""Single requests through fsspec: `HttpLink` for web servers, `BucketLink` for s3 and gs.

Both say what a file is (`Facts`) and refuse to mix two versions of it: HTTP answers are compared with what the file was
when it was opened, S3 is asked for that ETag, GCS for that generation. Credentials come from where the libraries look
for them (environment, configuration files), never from a recipe.

Not here: retries (`fetch`).
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import fsspec
import yarl

from data_pipelines.errors import DataError
from data_pipelines.storage.failures import Failure, RangesIgnored, is_absent, status_failure
from data_pipelines.storage.fsspec_internals import (
    answer_of_s3,
    http_session,
    info_of,
    matches_of,
    part_of_gcs,
    path_in,
    without_retries,
)
from data_pipelines.storage.locations import redact
from data_pipelines.storage.request import Facts, FetchOptions, too_large

__all__ = ["BucketLink", "HttpLink"]

_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)")


class HttpLink:
    """Requests to web servers, over the session of fsspec's HTTP file system."""

    def __init__(self, options: FetchOptions) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=options.timeout_s, sock_read=options.timeout_s)
        configured = fsspec.config.conf.get("http", {}).get("client_kwargs", {})
        self.filesystem = fsspec.filesystem(
            "http", skip_instance_cache=True, client_kwargs={"trust_env": True, **configured, "timeout": timeout}
        )

    async def facts(self, location: str) -> Facts:
        # Not HEAD: signed URLs are good for GET only, and this answer tells whether ranges work.
        async with self._get(location, "bytes=0-0") as response:
            if response.status == 416:  # an empty file has no first byte
                return Facts(_total(response), _version(response), ranges=True)
            _reject(response, location)
            return _facts(response)

    async def copy(
        self, location: str, begin: int, end: int | None, facts: Facts, write: Callable[[bytes], None], *, whole: bool
    ) -> None:
        everything = begin == 0 and end == facts.size
        wanted = None if everything else f"bytes={begin}-{'' if end is None else end - 1}"
        async with self._get(location, wanted) as response:
            _reject(response, location)
            if response.status != 206 and not (whole or everything):
                raise RangesIgnored
            _same_file(facts, _facts(response), location)
            position = _first_byte(response)
            if position > begin:
                raise Failure(f"the server sent bytes from {position} on instead of {begin}")
            async for piece in response.content.iter_any():
                fresh = piece[max(begin - position, 0) :]
                position += len(piece)
                if end is not None and position > end:
                    raise Failure(f"the server sent more than the {end - begin} bytes asked for")
                if fresh:
                    write(fresh)
        if end is not None and position < end:
            raise Failure(f"the answer ended at byte {position}, expected {end}")

    async def content(self, location: str, limit: int) -> bytes | None:
        async with self._get(location, None) as response:
            if response.content_type == "text/html":  # a page that says "not found" without the status
                return None
            if is_absent(status_failure(response.status, "", {})):
                return None
            _reject(response, location)
            if (response.content_length or 0) > limit:
                raise too_large(location, limit)
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > limit:
                    raise too_large(location, limit)
            if response.content_length not in (None, len(body)):
                raise Failure(f"the answer has {len(body)} bytes, announced were {response.content_length}")
            return bytes(body)

    async def glob(self, pattern: str) -> list[str]:
        raise DataError(f"{redact(pattern)}: a web server cannot be listed; name the shards")

    @asynccontextmanager
    async def _get(self, location: str, wanted: str | None) -> AsyncIterator[aiohttp.ClientResponse]:
        session = await http_session(self.filesystem)
        headers = {"Accept-Encoding": "identity", **({"Range": wanted} if wanted else {})}
        url = yarl.URL(location, encoded="%" in location)  # escapes that are there may be part of a signature
        try:
            async with session.get(url, headers=headers) as response:
                yield response
        except aiohttp.ClientPayloadError:
            raise Failure("the answer broke off") from None


def _reject(response: aiohttp.ClientResponse, location: str) -> None:
    if response.status not in (200, 206):
        raise status_failure(response.status, response.reason or "", response.headers)
    if response.content_type == "text/html":
        raise Failure("the server answered with an HTML page instead of a shard; open the URL to see it", final=True)


def _facts(response: aiohttp.ClientResponse) -> Facts:
    size = _total(response) if response.status == 206 else response.content_length
    return Facts(size, _version(response), ranges=response.status == 206)


def _version(response: aiohttp.ClientResponse) -> str:
    return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _total(response: aiohttp.ClientResponse) -> int | None:
    found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    return int(found.group(2)) if found and found.group(2) != "*" else None


def _first_byte(response: aiohttp.ClientResponse) -> int:
    """Where in the file the body begins."""
    if response.status == 200:
        return 0
    found = _CONTENT_RANGE.match(response.headers.get("Content-Range", ""))
    if found is None or found.group(1) is None:
        raise Failure("the server answers a range request without saying which bytes it sends")
    return int(found.group(1))


def _same_file(before: Facts, now: Facts, location: str) -> None:
    """What one of the two answers does not tell is not compared."""
    sizes = None not in (before.size, now.size) and before.size != now.size
    versions = before.version and now.version and before.version != now.version
    if sizes or versions:
        raise _replaced(f"{before.size} bytes {before.version} when it was opened, now {now.size} bytes {now.version}")


def _replaced(how: str) -> Failure:
    return Failure(f"the shard was replaced while it was in use ({how}); start again with the new one", final=True)


class BucketLink:
    """Requests to an object store, over s3fs or gcsfs."""

    def __init__(self, kind: str, options: FetchOptions) -> None:
        self._kind = kind
        self._piece_bytes = options.block_bytes
        settings: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if kind == "s3":
            times = {"connect_timeout": options.timeout_s, "read_timeout": options.timeout_s}
            configured = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            settings["config_kwargs"] = {**configured, **times, "retries": {"total_max_attempts": 1}}
        package, extra = ("s3fs", "s3") if kind == "s3" else ("gcsfs", "gcs")
        try:
            self.filesystem = without_retries(fsspec.filesystem("s3" if kind == "s3" else "gcs", **settings))
        except ImportError:
            raise DataError(f"{kind}:// needs the package {package}: pip install 'pretrain[{extra}]'") from None

    async def facts(self, location: str) -> Facts:
        info = await info_of(self.filesystem, path_in(self.filesystem, location))
        if info["type"] != "file":
            raise FileNotFoundError(location)
        version = info.get("generation") or info.get("ETag") or info.get("LastModified") or ""
        return Facts(int(info["size"]), str(version), ranges=True)

    async def copy(
        self, location: str, begin: int, end: int | None, facts: Facts, write: Callable[[bytes], None], *, whole: bool
    ) -> None:
        path = path_in(self.filesystem, location)
        last = facts.size if end is None else end
        assert last is not None  # object stores always tell the size
        read = self._read_s3 if self._kind == "s3" else self._read_gcs
        for start in range(begin, last, self._piece_bytes):
            stop = min(start + self._piece_bytes, last)
            piece = await read(path, start, stop, facts.version)
            if len(piece) != stop - start:
                raise Failure(f"the answer has {len(piece)} bytes, expected {stop - start}")
            write(piece)

    async def _read_s3(self, path: str, start: int, stop: int, version: str) -> bytes:
        pinned = {"IfMatch": version} if version else {}
        try:
            answer = await answer_of_s3(self.filesystem, path, Range=f"bytes={start}-{stop - 1}", **pinned)
        except Exception as error:
            if "PreconditionFailed" in f"{error} {error.__cause__}" or "InvalidRange" in f"{error} {error.__cause__}":
                raise _replaced(f"its ETag was {version}") from None
            raise
        try:
            return bytes(await answer["Body"].read())
        finally:
            answer["Body"].close()

    async def _read_gcs(self, path: str, start: int, stop: int, version: str) -> bytes:
        try:
            return await part_of_gcs(self.filesystem, path, start, stop, version)
        except FileNotFoundError:
            raise _replaced(f"its generation was {version}") from None

    async def content(self, location: str, limit: int) -> bytes | None:
        body = bytearray()
        try:
            facts = await self.facts(location)
            assert facts.size is not None  # object stores always tell the size
            if facts.size > limit:
                raise too_large(location, limit)
            await self.copy(location, 0, facts.size, facts, body.extend, whole=True)
            return bytes(body)
        except Exception as error:
            if is_absent(error):
                return None
            raise

    async def glob(self, pattern: str) -> list[str]:
        paths = await matches_of(self.filesystem, path_in(self.filesystem, pattern))
        return [f"{pattern.partition('://')[0]}://{path}" for path in sorted(paths)]
