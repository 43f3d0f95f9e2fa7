"""Lists of files to pack: CSV with a header, plain lines or parquet, one path per row and perhaps a label.

    path,label            images/cat.jpg 3          images/cat.jpg
    cat.jpg,cat           images/dog.jpg 5          images/dog.jpg

Paths are relative to the folder of the list. Labels are class indices when all of them are whole numbers; otherwise
they are names, and the classes are these names in sorted order.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError, nearest
from data_pipelines.packing.inputs import Item, Listing, Piece, family_of, field_of

__all__ = ["LIST_SUFFIXES", "list_rows"]

LIST_SUFFIXES = (".csv", ".tsv", ".txt", ".lst", ".parquet")
_COLUMNS = ("path", "label")

Row = tuple[str, str | None]  # path, label


def list_rows(source: Path) -> Listing:
    """List what a file of paths names. A named file that is missing is found out when it is packed.

    Raises:
        DataError: no path in it, a path named twice, rows of several kinds of file, or labels for some rows only.
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
    labels, listing.classes = _labels(source, [label for _, label in rows])
    for (path, _), label in zip(rows, labels, strict=True):
        listing.items.append(Item(path, (Piece(field_name, path, 0, _size(listing, path)),), label))
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
        for line in lines:
            path, _, label = line.strip().partition(" ")
            if path and not path.startswith("#"):
                yield path, label.strip() or None
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


def _labels(source: Path, given: list[str | None]) -> tuple[list[int | None], tuple[str, ...] | None]:
    missing = sum(not label for label in given)
    if missing == len(given):
        return [None] * len(given), None
    if missing:
        raise DataError(f"{source}: {missing} of {len(given)} rows have no label; label all or none")
    names = [str(label).strip() for label in given]
    if all(name.isascii() and name.isdecimal() for name in names):
        return [int(name) for name in names], None
    classes = tuple(sorted(set(names)))
    index = {name: number for number, name in enumerate(classes)}
    return [index[name] for name in names], classes


def _size(listing: Listing, path: str) -> int:
    try:
        status = os.stat(os.path.join(listing.root, path))
    except OSError:
        return 0
    listing.saw(path, status.st_mtime_ns)
    return status.st_size


def _reject_repeats(source: Path, items: list[Item]) -> None:
    for before, item in pairwise(items):
        if before.name == item.name:
            raise DataError(f"{source} names {item.name!r} twice; name each file once")
