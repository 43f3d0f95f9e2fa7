"""Everything that can still be read of a tar, and everything that is wrong with it.

`index.scan_shard` stops at the first damage, because a damaged shard must not be trained on. `walk` goes on behind it:
it looks for the next block that is a valid header and continues there, so that `verify` can name all damages of a
shard at once. Bytes of members are not read here.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader

__all__ = ["Damage", "Member", "walk"]

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK


@dataclass(frozen=True)
class Member:
    """One field of one sample: `size` bytes of the tar from `begin` on."""

    key: str
    field: str
    offset: int  # of its header
    begin: int
    size: int


@dataclass(frozen=True)
class Damage:
    """What is wrong at a byte of the tar, and with which sample when that is known."""

    key: str | None
    offset: int
    problem: str


def walk(file: BufferedReader, num_bytes: int) -> Iterator[Member | Damage]:
    """The members of a tar in order, and its damages between them; never raises on damaged content.

    Args:
        file: the tar, opened for reading at any position.
        num_bytes: its size.
    """
    if num_bytes == 0:
        yield Damage(None, 0, "the file is empty (0 bytes)")
        return
    samples = _Samples()
    end, last, clean = 0, None, False
    while not clean:
        for info in _headers(file, end):
            end, last = info.offset_data + -(-info.size // _BLOCK) * _BLOCK, info.name
            if end > num_bytes:
                problem = f"member {info.name!r} needs the bytes up to {end}, the file ends at {num_bytes}: cut"
                yield Damage(_key(info.name), info.offset, problem)
                return
            if not info.isdir():
                yield samples.add(info)
        clean = _ends_here(file, end, num_bytes)
        if not clean:
            following = _next_header(file, end, num_bytes)
            yield Damage(None, end, _header_problem(file, end, num_bytes, last, following))
            if following is None:
                return
            end = following


class _Samples:
    """Puts members together into samples: adjacent, each key once, each field once per sample."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}  # key -> offset of its first member
        self._current: str | None = None
        self._fields: set[str] = set()

    def add(self, info: tarfile.TarInfo) -> Member | Damage:
        key = _key(info.name)
        if not info.isreg() or info.issparse():
            kind = "is a link or special file; shards hold regular files only"
            return Damage(key, info.offset, f"member {info.name!r} {kind}")
        if key is None:
            return Damage(None, info.offset, f"member {info.name!r} has no KEY.FIELD name")
        if key != self._current:
            if key in self._begun:
                begun = f"was begun at offset {self._begun[key]} already"
                return Damage(key, info.offset, f"sample {begun}; its members must be adjacent and keys unique")
            self._begun[key] = info.offset
            self._current, self._fields = key, set()
        field = info.name[len(key) + 1 :].lower()
        if field in self._fields:
            return Damage(key, info.offset, f"repeats field {field!r}; a sample has each field once")
        self._fields.add(field)
        return Member(key, field, info.offset, info.offset_data, info.size)


def _key(name: str) -> str | None:
    """`folder/000.seg.png` -> `folder/000`: everything before the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}{slash}{stem}" if stem and field else None


def _headers(file: BufferedReader, begin: int) -> Iterator[tarfile.TarInfo]:
    """Consecutive members from `begin` on; ends at the first block that is no header, whatever it is."""
    file.seek(begin)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.size < 0:  # a valid checksum over a forged size
                    return
                yield info
    except (tarfile.TarError, ValueError, OverflowError, EOFError):
        return  # `walk` sees that this is not the end of the archive and says so


def _ends_here(file: BufferedReader, end: int, num_bytes: int) -> bool:
    """A tar ends with two zero blocks at least, and nothing but zeros after them."""
    if num_bytes - end < 2 * _BLOCK:
        return False
    file.seek(end)
    while chunk := file.read(_CHUNK):
        if any(chunk):
            return False
    return True


def _next_header(file: BufferedReader, end: int, num_bytes: int) -> int | None:
    """Offset of the first valid header behind the block at `end`."""
    for begin in range(end + _BLOCK, num_bytes - _BLOCK + 1, _CHUNK):
        file.seek(begin)
        chunk = file.read(_CHUNK)
        for at in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            try:
                tarfile.TarInfo.frombuf(chunk[at : at + _BLOCK], tarfile.ENCODING, "surrogateescape")
            except (tarfile.TarError, ValueError, OverflowError):
                continue
            return begin + at
    return None


def _header_problem(file: BufferedReader, end: int, num_bytes: int, last: str | None, following: int | None) -> str:
    file.seek(end)
    head = file.read(_BLOCK)
    after = "" if last is None else f" after member {last!r}"
    if following is not None:
        what = "zeroed" if not any(head) else "damaged"
        return f"{what} header{after}; the next readable one is at offset {following}"
    if last is None and len(head) > 0:
        return f"not a plain tar: begins with {head[:16]!r} ({num_bytes} bytes)"
    if not any(head):
        return f"no end of archive{after}: the file ends at {num_bytes}, cut"
    return f"damaged or cut header{after}; nothing readable up to the end of the file at {num_bytes}"
