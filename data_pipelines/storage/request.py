"""One request to a remote store: how it may be made, what is asked, what the answer says about the file.

Not here: what goes wrong (`failures`), making requests (`links`), repeating them (`fetch`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from data_pipelines.errors import DataError, TooLargeError
from data_pipelines.files import cache_root, expanded
from data_pipelines.storage.locations import redact

__all__ = ["Facts", "FetchOptions", "Link", "too_large"]


def too_large(location: str, limit: int) -> TooLargeError:
    """For a file of which `limit` bytes are the most that would be read."""
    return TooLargeError(
        f"{redact(location)}: has more than {limit} bytes, which such a file cannot have; it is not read"
    )


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
            return expanded(self.cache_dir)
        return cache_root() / "shards"


@dataclass(frozen=True)
class Facts:
    """What a server says about a file."""

    size: int | None  # bytes; None: it does not say
    version: str  # ETag, generation or date; "" if it gives none
    ranges: bool  # whether parts of the file can be asked for


class Link(Protocol):
    """Single requests to one kind of store; failures raise `Failure` or an exception of the library behind."""

    filesystem: Any

    async def facts(self, location: str) -> Facts: ...

    async def copy(
        self, location: str, begin: int, end: int | None, facts: Facts, write: Callable[[bytes], None], *, whole: bool
    ) -> None: ...

    async def content(self, location: str, limit: int) -> bytes | None: ...

    async def glob(self, pattern: str) -> list[str]: ...
