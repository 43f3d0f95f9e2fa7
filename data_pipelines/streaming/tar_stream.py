"""Shards without an index: the samples of one tar, from its first byte to its last.

`webdataset` walks the tar and groups its members into samples (`webdataset_internals`). Nothing else of it is used: it
opens, splits, shuffles and decodes nothing, since it would run commands, follow the environment, and unpickle. What it
reads is watched: like `tarfile` it takes a damaged header, or the place where a file was cut, for the end.

Not here: where the bytes come from (`stores`), which shards are read in what order (`unindexed`). Random access through
an index, with checksums, is in `shards`.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, cast

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.field_kinds import is_never_read, picture_names, under_shared_names
from data_pipelines.hidden import is_hidden
from data_pipelines.storage.locations import PIPE, is_local, redact, scheme_of
from data_pipelines.storage.stores import Store
from data_pipelines.streaming.webdataset_internals import grouped_members, split_name

__all__ = ["Sample", "read_samples"]

Sample = dict[str, Any]

_READ_BYTES = 4 << 20  # asked for at once, and fetched ahead, of a remote shard
_GZIP_MAGIC = b"\x1f\x8b"
_NO_DATA = b"123456"  # types of tar members (links, folders, devices) behind whose header no content follows


def read_samples(store: Store, location: str, fields: frozenset[str] | None) -> Iterator[Sample | CorruptSampleError]:
    """The samples of a shard, each with the wanted fields and nothing else; an error in place of one that lacks any.

    Args:
        store: what the shard is read through.
        location: of the shard, a tar or a tar packed by gzip.
        fields: names that every sample must have, a picture also in another format; None: take all that can be read
            without running code.

    Yields:
        Bytes by field, `"__key__"` and `"__url__"` (the shard as messages name it); or what is wrong with the sample.

    Raises:
        DataError: the shard cannot be read, or is not a whole tar.
    """
    name, members = redact(location), _Members(fields)
    with _opened(store, location) as file:
        tar = _WholeTar(file, name)
        try:
            for sample in grouped_members(cast(BinaryIO, tar), name, members.is_wanted):
                if fields is not None:  # a picture of another format may have been read besides the wanted one
                    sample = under_shared_names(sample, fields)
                    sample = {name: sample[name] for name in sample if name in fields or name.startswith("__")}
                lacking = (fields or frozenset()) - sample.keys()
                yield _lacks(name, sample["__key__"], lacking) if lacking else sample
            tar.require_end()
        except (ValueError, OSError, tarfile.TarError) as error:  # to whose text webdataset may add a signed URL
            raise DataError(tar.problem or f"shard {name}: {redact(str(error.args[0]))}") from None
    for sample_key in members.passed_over():
        yield _lacks(name, sample_key, fields or frozenset())


def _lacks(shard: str, sample_key: str, fields: frozenset[str]) -> CorruptSampleError:
    return CorruptSampleError(
        f"shard {shard}, sample {sample_key!r}: no {', '.join(sorted(fields))}; "
        "a view needs it in every sample, next to the sample's other members"
    )


class _Members:
    """Chooses the members of a shard that are read, and notes the samples of which it chose none."""

    def __init__(self, fields: frozenset[str] | None) -> None:
        self._fields = fields and fields.union(*map(picture_names, fields))
        self._chosen: dict[str, bool] = {}  # samples so far -> whether any member is read

    def is_wanted(self, name: str) -> bool:
        sample_key, field = split_name(name)
        if sample_key is None or field is None or is_hidden(name):
            return False
        field = field.lower()
        wanted = not is_never_read(field) and (self._fields is None or field in self._fields)
        self._chosen[sample_key] = wanted or self._chosen.get(sample_key, False)
        return wanted

    def passed_over(self) -> list[str]:
        return [sample_key for sample_key, chosen in self._chosen.items() if not chosen]


class _WholeTar:
    """The bytes of a tar, passed on to `tarfile`; raises where that would end in silence."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self._name = file, name
        self._at = 0  # bytes passed on
        self._header = 0  # offset of the next header
        self._end: int | None = None  # offset of the zeros that end the archive
        self.problem: str | None = None

    def read(self, size: int) -> bytes:
        try:
            content = self._file.read(size)
            self._check(content)
        except DataError as error:  # of the store
            self.problem = str(error)
        except (_Damage, OSError, EOFError, zlib.error) as error:
            self.problem = f"shard {self._name}: {error}; copy it again"
        if self.problem:
            raise DataError(self.problem)
        return content

    def require_end(self) -> None:
        """Read what `tarfile` left: nothing but zeros."""
        while self.read(_READ_BYTES):
            pass

    def _check(self, content: bytes) -> None:
        begin, self._at = self._at, self._at + len(content)
        if not content and (self._end is None or begin - self._end < 2 * tarfile.BLOCKSIZE):
            raise _Damage(f"no clean end of archive, the file ends at {begin}: cut")
        while self._end is None and self._header < self._at:
            block = content[self._header - begin : self._header - begin + tarfile.BLOCKSIZE]
            if not any(block):
                self._end = self._header
                break
            try:
                info = tarfile.TarInfo.frombuf(block, tarfile.ENCODING, "surrogateescape")
            except (tarfile.TarError, ValueError) as error:
                raise _Damage(f"no tar header at offset {self._header} but {block[:16]!r} ({error})") from None
            if info.size < 0:
                raise _Damage(f"member {info.name!r} at offset {self._header} has size {info.size}")
            num_blocks = 0 if info.type in _NO_DATA else -(-info.size // tarfile.BLOCKSIZE)
            self._header += (1 + num_blocks) * tarfile.BLOCKSIZE
        if self._end is not None and any(content[max(self._end - begin, 0) :]):
            raise _Damage(f"content behind the end of archive at offset {self._end}")


class _Damage(Exception):
    """What is wrong with the bytes of a tar."""


@contextmanager
def _opened(store: Store, location: str) -> Iterator[BinaryIO]:
    """The bytes of a shard from front to back, unpacked if they are packed by gzip."""
    if is_local(location) or scheme_of(location) == PIPE:
        try:
            file = io.BufferedReader(io.FileIO(store.local_copy(location)))
        except OSError as error:
            raise DataError(f"cannot open shard {redact(location)}: {error.strerror}") from None
    else:
        file = io.BufferedReader(cast(Any, _RemoteFile(store, location)), _READ_BYTES)
    with file:
        is_packed = file.peek(2)[:2] == _GZIP_MAGIC
        yield cast(BinaryIO, gzip.GzipFile(fileobj=file)) if is_packed else file


class _RemoteFile(io.RawIOBase):
    """A remote shard read in order through the store, the next piece being fetched meanwhile."""

    def __init__(self, store: Store, location: str) -> None:
        self._store, self._location = store, location
        self._at, self._size = 0, store.size(location)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), self._size - self._at)
        if self._at and size:  # who reads only the beginning starts no threads
            self._store.prefetch([(self._location, self._at, min(2 * size, self._size - self._at))])
        buffer[:size] = self._store.read(self._location, self._at, size) if size else b""
        self._at += size
        return size
