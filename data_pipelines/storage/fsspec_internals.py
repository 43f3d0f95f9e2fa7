"""The names of fsspec, s3fs and gcsfs in use that their documentation does not promise, in one place.

Their public methods are synchronous, repeat requests by themselves and cannot pin a version; single requests that we
repeat need what lies below. A test touches every name, so that an upgrade that moves one fails there.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

__all__ = [
    "answer_of_s3",
    "http_session",
    "info_of",
    "matches_of",
    "part_of_gcs",
    "path_in",
    "run_on",
    "without_retries",
]

Result = TypeVar("Result")


def run_on(filesystem: Any, function: Callable[..., Awaitable[Result]], *arguments: Any) -> Result:
    """Run a coroutine on the event loop of a file system and wait for it in this thread."""
    from fsspec.asyn import sync

    result: Result = sync(filesystem.loop, function, *arguments)
    return result


def without_retries(filesystem: Any) -> Any:
    """The file system, making each request once."""
    filesystem.retries = 1  # s3fs repeats by this number; the others have no such attribute and do not look at it
    return filesystem


def path_in(filesystem: Any, location: str) -> str:
    """`bucket/key` of a URL."""
    return str(filesystem._strip_protocol(location))


async def http_session(filesystem: Any) -> Any:
    """The aiohttp session of the HTTP file system."""
    return await filesystem.set_session()


async def info_of(filesystem: Any, path: str) -> dict[str, Any]:
    """What the store says about an object, not what it said earlier."""
    return dict(await filesystem._info(path, refresh=True))


async def matches_of(filesystem: Any, pattern: str) -> list[str]:
    """Paths that match a glob."""
    return list(await filesystem._glob(pattern))


async def part_of_gcs(filesystem: Any, path: str, start: int, stop: int, generation: str) -> bytes:
    """Bytes `start..stop` of one generation of an object on GCS."""
    return bytes(await filesystem._cat_file(path, start, stop, generation=generation))


async def answer_of_s3(filesystem: Any, path: str, **arguments: str) -> dict[str, Any]:
    """What `GetObject` of S3 answers; its `Body` is still to be read."""
    bucket, key, _ = filesystem.split_path(path)
    return dict(await filesystem._call_s3("get_object", Bucket=bucket, Key=key, **arguments))
