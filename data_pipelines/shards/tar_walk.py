"""What a tar must be to be a shard: `walk` gives its members in order, and everything that is wrong with it.

A cut or damaged tar often reads back as a shorter one without any error (`tarfile`, like webdataset, stops silently at
a bad header), so `walk` demands a clean end of archive and adjacent, complete, unrepeated samples. Behind a damage it
looks for the next block that is a valid header and goes on there. `index.scan_shard` stops at the first damage, because
a damaged shard must not be trained on; `verify` names them all. Members that are no field of any sample (hidden ones, a
README) are left out, wherever they lie. Bytes of members are not read here.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from data_pipelines.hidden import is_hidden

__all__ = ["Damage", "LeftOut", "Member", "first_fields", "walk"]

_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2048 * _BLOCK
_MAX_SAMPLE_BYTES = 0x7FFFF000  # what Linux reads at once


@dataclass(frozen=True, slots=True)
class Member:
    """One field of one sample: `size` bytes of the tar from `begin` on."""

    key: str
    field: str
    offset: int  # of its header
    begin: int
    size: int

    @property
    def end(self) -> int:
        """Where the padding behind it ends, and the next header begins."""
        return self.begin + -(-self.size // _BLOCK) * _BLOCK


@dataclass(frozen=True, slots=True)
class Damage:
    """What is wrong at a byte of the tar, and with which sample when that is known."""

    key: str | None
    offset: int
    problem: str  # and what to do about it


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A member that belongs to no sample: it is hidden, or its name is not KEY.FIELD."""

    name: str


def walk(file: BufferedReader, num_bytes: int) -> Iterator[Member | Damage | LeftOut]:
    """The members of a tar in order, and its damages between them; never raises on damaged content.

    Args:
        file: the tar, opened for reading at any position.
        num_bytes: its size.
    """
    if num_bytes == 0:
        yield Damage(None, 0, "the file is empty (0 bytes); copy or write it again")
        return
    samples = _Samples()
    at, last, clean = 0, None, False
    while not clean:
        for info, end in _headers(file, at):
            at, last = end, info.name
            if end > num_bytes:
                problem = f"member {last!r} needs the bytes up to {end}, the file ends at {num_bytes}: cut"
                yield Damage(_key(last), info.offset, f"{problem}; copy it again")
                return
            if info.isdir():
                continue
            yield LeftOut(info.name) if is_hidden(info.name) or _key(info.name) is None else samples.add(info)
        clean = _ends_here(file, at, num_bytes)
        if not clean:
            following = _next_header(file, at, num_bytes)
            yield Damage(None, at, _header_problem(file, at, num_bytes, last, following))
            if following is None:
                return
            at = following
    if samples.is_empty:
        yield Damage(None, 0, f"the tar holds no sample ({num_bytes} bytes); remove it or write it again")


def first_fields(path: Path) -> frozenset[str]:
    """Fields of the first sample of a tar, of which no more is read than that; none where it has no sound one.

    Raises:
        OSError: the file cannot be read.
    """
    fields, key = set(), None
    with open(path, "rb") as file:
        for found in walk(file, os.fstat(file.fileno()).st_size):
            if isinstance(found, LeftOut):
                continue
            if isinstance(found, Damage) or found.key != (key := key or found.key):
                break
            fields.add(found.field)
    return frozenset(fields)


class _Samples:
    """Puts members together into samples: adjacent, each key once, each field once per sample."""

    def __init__(self) -> None:
        self.is_empty = True
        self._begun: dict[str, int] = {}  # key -> offset of its first member
        self._current: str | None = None
        self._fields: set[str] = set()

    def add(self, info: tarfile.TarInfo) -> Member | Damage:
        self.is_empty = False
        key, said = str(_key(info.name)), f"member {info.name!r}"
        if not info.isreg() or info.issparse():
            return Damage(key, info.offset, f"{said} is a link or special file; shards hold regular files only")
        if not _is_text(info.name):
            return Damage(None, info.offset, f"{said} has a name that is not UTF-8; rename it")
        if key != self._current:
            if key in self._begun:
                begun = f"was begun at offset {self._begun[key]} already"
                return Damage(key, info.offset, f"sample {begun}; its members must be adjacent and keys unique")
            self._begun[key] = info.offset
            self._current, self._fields = key, set()
        member = Member(key, info.name[len(key) + 1 :].lower(), info.offset, info.offset_data, info.size)
        if member.field in self._fields:
            return Damage(key, info.offset, f"repeats field {member.field!r}; a sample has each field once")
        if member.end - self._begun[key] > _MAX_SAMPLE_BYTES:
            return Damage(key, info.offset, f"{said} makes the sample larger than 2 GiB; split it")
        self._fields.add(member.field)
        return member


def _key(name: str) -> str | None:
    """`folder/000.seg.png` -> `folder/000`: everything before the first dot of the base name."""
    folder, slash, base = name.rpartition("/")
    stem, _, field = base.partition(".")
    return f"{folder}{slash}{stem}" if stem and field else None


def _is_text(name: str) -> bool:
    """False for bytes that are no UTF-8, which tarfile keeps as surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _headers(file: BufferedReader, begin: int) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Consecutive members from `begin` on, each with the place of the next; stops at the first block that is none."""
    file.seek(begin)
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            for info in archive:
                if info.size < 0 or archive.offset < info.offset_data:  # a forged size, which leads back to here
                    return
                yield info, archive.offset
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
    after, remedy = "" if last is None else f" after member {last!r}", "copy or write it again"
    if following is not None:
        what = "zeroed" if not any(head) else "damaged"
        return f"{what} header{after}; the next readable one is at offset {following}; {remedy}"
    if end == 0:
        return f"not a plain tar: begins with {head[:16]!r} ({num_bytes} bytes); {remedy}"
    if any(head):
        return f"damaged or cut header{after}; nothing readable up to the end of the file at {num_bytes}; {remedy}"
    if num_bytes - end < 2 * _BLOCK:
        return f"no end of archive{after}: the file ends at {num_bytes}, cut; {remedy}"
    return f"zeros{after}, then content up to the end of the file at {num_bytes} that is no member; {remedy}"
