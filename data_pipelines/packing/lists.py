"""Lists of files to pack: CSV with a header, plain lines or parquet, one path per row and perhaps a label.

    path,label            images/cat.jpg 3          images/cat.jpg
    cat.jpg,cat           images/my dog.jpg 5       images/my dog.jpg

Paths are relative to the folder of the list. In plain lines a path ends with the last suffix of a kind that is packed;
what follows it after a space is the label. Lines that begin with `#` are comments, unless a file of that name is there.
Labels are class indices when all of them are whole numbers; otherwise they are names, numbered in the order of the
classes given, else in sorted order.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from unicodedata import normalize

from data_pipelines.errors import DataError, nearest
from data_pipelines.packing.inputs import FAMILIES, Item, Listing, Piece, family_of, field_of
from data_pipelines.packing.layout import number_classes, same_text

__all__ = ["LIST_SUFFIXES", "list_rows"]

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".parquet")
_COLUMNS = ("path", "label")
_SUFFIXES = "|".join(re.escape(suffix) for suffixes in FAMILIES.values() for suffix in suffixes)
_LINE = re.compile(rf"(.*(?:{_SUFFIXES}))(?:\s+(\S.*))?", re.IGNORECASE)  # the path, to its last suffix, and a label

Row = tuple[str, str | None]  # path, label


def list_rows(source: Path, classes: Sequence[str] | None = None) -> Listing:
    """List what a file of paths names. A named file that is missing is found out when it is packed.

    Args:
        classes: names in index order, for labels that are names.

    Raises:
        DataError: no path in it, a file named twice, rows of several kinds of file, labels for some rows only, or a
            label that is none of the classes.
    """
    rows = list(_rows(source))
    if not rows:
        raise DataError(f"{source} names no file; write one path per line, or columns path,label")
    families = {family_of(path): path for path, _ in rows}
    if len(families) > 1 or families.keys() & {None, "tars"}:
        raise DataError(
            f"{source} names files of several or unknown kinds, such as {', '.join(sorted(families.values())[:3])}; "
            "list images, point clouds or volumes, one kind per list"
        )
    family = str(next(iter(families)))
    listing = Listing(source.name.partition(".")[0], family, str(source.parent))
    field_name = field_of(family, (path for path, _ in rows))
    labels, listing.classes = _labels(source, [label for _, label in rows], classes)
    files: dict[tuple[int, int], str] = {}  # device and number on it
    for (path, _), label in zip(rows, labels, strict=True):
        found, status = _on_disk(listing, path)
        if status is not None:
            other = files.setdefault((status.st_dev, status.st_ino), found)
            if other != found and _is_one_file(listing.root, other, found):
                raise DataError(f"{source} names one file as {other!r} and as {path!r}; name each file once")
        listing.items.append(Item(path, (Piece(field_name, found, 0, 0 if status is None else status.st_size),), label))
    listing.items.sort(key=lambda item: item.name)
    _reject_repeats(source, listing.items)
    return listing


def _rows(source: Path) -> Iterator[Row]:
    if source.suffix == ".parquet":
        yield from _parquet_rows(source)
        return
    try:
        with open(source, encoding="utf-8-sig", newline="") as file:
            yield from _text_rows(source, file)
    except UnicodeDecodeError as error:
        raise DataError(f"{source} is not UTF-8 text: {error.reason} at byte {error.start}") from None


def _text_rows(source: Path, lines: Iterable[str]) -> Iterator[Row]:
    separator = {".csv": ",", ".tsv": "\t"}.get(source.suffix)
    if separator is None:
        for line in map(str.strip, lines):
            path, label = found.groups() if (found := _LINE.fullmatch(line)) else (line, None)
            if path and (not path.startswith("#") or (found and (source.parent / path).is_file())):
                yield path, label
        return
    table = csv.reader(lines, delimiter=separator)
    columns = dict[str, int]()
    for row in table:
        if not any(row):
            continue
        if not columns:
            columns, is_header = _columns(source, row)
            if is_header:
                continue
        if len(row) <= max(columns.values()):
            raise DataError(f"{source} line {table.line_num}: {len(row)} columns, {len(columns)} are needed")
        yield row[columns["path"]], row[columns["label"]] if "label" in columns else None


def _columns(source: Path, first: list[str]) -> tuple[dict[str, int], bool]:
    """Where path and label stand, and whether the first row is a header; without one they are the first columns."""
    names = [name.strip().lower() for name in first]
    if "path" in names:
        return {name: names.index(name) for name in _COLUMNS if name in names}, True
    if family_of(first[0]) is None:
        near = nearest("path", names, cutoff=0.4)
        hint = f"; is {near!r} the column of paths?" if near else ""
        raise DataError(f"{source} begins with {','.join(first)!r}: no column 'path' and no path of a known kind{hint}")
    return {name: number for number, name in enumerate(_COLUMNS[: len(first)])}, False


def _parquet_rows(source: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError("parquet lists need the package pyarrow: pip install pyarrow") from None
    try:
        file = parquet.ParquetFile(source)
        names = file.schema_arrow.names
        if "path" not in names:
            raise DataError(f"{source} has columns {', '.join(names)}; a column 'path' is needed")
        for batch in file.iter_batches(columns=[name for name in _COLUMNS if name in names]):
            for row in batch.to_pylist():
                yield _text(row["path"]) or "", _text(row.get("label"))
    except (ArrowException, OSError) as error:
        raise DataError(f"cannot read {source}: {str(error).splitlines()[0]}") from None


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _labels(
    source: Path, given: list[str | None], classes: Sequence[str] | None
) -> tuple[list[int | None], tuple[str, ...] | None]:
    missing = sum(not label for label in given)
    if missing == len(given):
        if classes is not None:
            raise DataError(f"{source} has no labels for --classes to number; leave it out")
        return [None] * len(given), None
    if missing:
        raise DataError(f"{source}: {missing} of {len(given)} rows have no label; label all or none")
    names = [same_text(str(label).strip()) for label in given]
    if all(name.isascii() and name.isdecimal() for name in names) and not set(names).intersection(classes or ()):
        return [int(name) for name in names], None if classes is None else tuple(classes)
    ordered, index = number_classes(names, classes, str(source))
    return [index[name] for name in names], ordered


def _on_disk(listing: Listing, path: str) -> tuple[str, os.stat_result | None]:
    """The path as the disk writes its accents, and what the disk says of it; as listed and None where it is not."""
    for written in dict.fromkeys((path, normalize("NFC", path), normalize("NFD", path))):
        try:
            status = os.stat(os.path.join(listing.root, written))
        except (OSError, ValueError):  # a null in the name
            continue
        listing.saw(written, status.st_mtime_ns)
        return written, status
    return path, None


def _is_one_file(root: str, *paths: str) -> bool:
    """Whether paths lead to one place; hard links, of which none is the original, are files of their own."""
    return len({os.path.realpath(os.path.join(root, path)) for path in paths}) == 1


def _reject_repeats(source: Path, items: list[Item]) -> None:
    for before, item in pairwise(items):
        if before.name == item.name:
            raise DataError(f"{source} names {item.name!r} twice; name each file once")
