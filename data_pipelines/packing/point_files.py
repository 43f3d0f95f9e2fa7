"""Point clouds as other programs store them, to one table: `.npy .npz .ply .off .txt .xyz` -> (n, 3 + k) float32.

Meshes give their vertices. Formats: PLY 1.0 (Turk, "The PLY polygon file format", 1994), OFF as Geomview and
ModelNet write it. Sizes that a header claims are checked against the bytes that are there before anything is allocated.

Clouds so far from the origin that float32 would blur them, as those of maps, are shifted to it; the shift is kept.

Not here: surface sampling, scaling, what training does with a cloud (`views.kinds.points`).

Legend: n points, k values per point besides x, y, z.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError

__all__ = ["PointFile", "read_points"]

_PLY_TYPES = {
    **dict.fromkeys(("char", "int8"), "i1"),
    **dict.fromkeys(("uchar", "uint8"), "u1"),
    **dict.fromkeys(("short", "int16"), "i2"),
    **dict.fromkeys(("ushort", "uint16"), "u2"),
    **dict.fromkeys(("int", "int32"), "i4"),
    **dict.fromkeys(("uint", "uint32"), "u4"),
    **dict.fromkeys(("float", "float32"), "f4"),
    **dict.fromkeys(("double", "float64"), "f8"),
}
_MOST_VALUES = 64  # of a point; a table that is wider than long, and wider than this, lies on its side
_LEAST_STEPS = 1 << 12  # of float32 that a cloud spans, else it is shifted: 13 bits are what half precision has
_PLY_ORDER = {"ascii": "", "binary_little_endian": "<", "binary_big_endian": ">"}
_OFF_HEAD = re.compile(r"(?:ST)?C?N?OFF\b\s*|(?:ST)?C?N?OFF(?=\d)")  # ModelNet has files that begin "OFF490 518 0"


class PointFile(NamedTuple):
    """A cloud, and the position in the file's coordinates that is its origin; None: that of the file."""

    points: npt.NDArray[np.float32]  # (n, 3 + k): x, y, z first, other values per point in the order of the file
    origin: tuple[float, float, float] | None


def read_points(data: bytes, suffix: str) -> PointFile:
    """Read a cloud.

    Args:
        suffix: of the file, lower case with the dot; decides the format.

    Returns:
        The cloud; OFF gives x, y, z only.

    Raises:
        DataError: damaged, of a variant that is not supported, empty, not finite, or without extent.
    """
    return _checked(_READERS[suffix](data))


def _checked(table: npt.NDArray[Any]) -> PointFile:
    if table.ndim != 2 or table.shape[1] < 3 or len(table) == 0 or table.dtype.kind not in "fiu":
        raise DataError(
            f"array of shape {table.shape} and type {table.dtype} is no cloud; it must be (n, 3 + k) numbers"
        )
    if table.shape[1] > max(len(table), _MOST_VALUES):
        raise DataError(f"array of shape {table.shape} has a row for each value; it must have one for each point")
    with np.errstate(over="ignore"):  # what overflows float32 is reported as not finite
        points = np.array(table, np.float32, order="C")
    if not np.isfinite(points).all():
        raise DataError(f"{int((~np.isfinite(points)).any(axis=1).sum())} of {len(points)} points are not finite")
    positions = table[:, :3].astype(np.float64)
    low, high = positions.min(axis=0), positions.max(axis=0)
    extent, farthest = float((high - low).max()), float(np.abs(positions).max())
    if extent == 0:
        raise DataError(f"all {len(table)} points are at one place")
    if extent >= _LEAST_STEPS * np.finfo(np.float32).eps * farthest:
        return PointFile(points, None)
    points[:, :3] = positions - (low + high) / 2
    x, y, z = (float(value) for value in (low + high) / 2)
    return PointFile(points, (x, y, z))


def _from_arrays(data: bytes) -> npt.NDArray[Any]:
    """The array `points` or `xyz`, or the only one."""
    arrays = decode_arrays(data)
    for name in ("points", "xyz", ""):
        if name in arrays:
            return arrays[name]
    if len(arrays) == 1:
        return next(iter(arrays.values()))
    raise DataError(f"npz holds {', '.join(sorted(arrays)) or 'nothing'}; name the cloud 'points'")


def _from_text(data: bytes) -> npt.NDArray[Any]:
    """Lines of numbers between spaces, commas or semicolons; `#` and `//` begin comments."""
    lines = [re.split("#|//", line)[0].replace(",", " ").replace(";", " ") for line in _decode(data).splitlines()]
    return _table([line for line in lines if line.strip()])


def _from_off(data: bytes) -> npt.NDArray[Any]:
    lines = [line for raw in _decode(data).splitlines() if (line := raw.partition("#")[0].strip())]
    head = _OFF_HEAD.match(lines[0]) if lines else None
    if head is None or "BINARY" in lines[0]:
        raise DataError(f"not an OFF text file: begins with {data[:16]!r}")
    rest = lines[0][head.end() :]
    counts = rest or (lines[1] if len(lines) > 1 else "")
    num_vertices = re.match(r"(\d+)\s+\d+", counts)
    if num_vertices is None:
        raise DataError(f"OFF counts {counts[:40]!r} are not 'vertices faces edges'")
    first = 1 if rest else 2
    return _rows(lines[first:], int(num_vertices.group(1)), columns=range(3))


class _Element(NamedTuple):
    """One kind of record of a PLY file, with the name and type of each property; None for the type of a list."""

    name: str
    size: int  # records
    properties: list[tuple[str, str | None]]


def _from_ply(data: bytes) -> npt.NDArray[Any]:
    head, mark, _ = data.partition(b"end_header")
    body_begin = data.find(b"\n", len(head)) + 1
    if not data.startswith(b"ply") or not mark or not body_begin:
        raise DataError(f"not a PLY file: begins with {data[:16]!r}, or its header has no end")
    order, elements = _ply_header(_decode(head))
    names = [element.name for element in elements]
    if "vertex" not in names:
        raise DataError(f"PLY file has no vertices, only {', '.join(names) or 'nothing'}")
    before, vertex = elements[: names.index("vertex")], elements[names.index("vertex")]
    unusable = [element.name for element in (*before, vertex) if any(kind is None for _, kind in element.properties)]
    if unusable and (order or vertex.name in unusable):
        raise DataError(f"PLY element {unusable[0]!r} at or before the vertices has list properties; not supported")
    columns = _ply_columns([name for name, _ in vertex.properties])
    if not order:
        lines = _decode(data[body_begin:]).splitlines()
        return _rows(lines[sum(element.size for element in before) :], vertex.size, columns)
    skipped = sum(element.size * _ply_record(element, order).itemsize for element in before)
    record = _ply_record(vertex, order)
    available = len(data) - body_begin - skipped
    if vertex.size * record.itemsize > available:
        raise DataError(f"PLY file is cut: {vertex.size} vertices need {vertex.size * record.itemsize} bytes, "
                        f"{max(available, 0)} are there")  # fmt: skip
    table = np.frombuffer(data, record, vertex.size, body_begin + skipped)
    return np.stack([table[f"p{column}"].astype(np.float64) for column in columns], axis=1)  # (n, 3 + k)


def _ply_header(text: str) -> tuple[str, list[_Element]]:
    """Byte order (empty for text) and the elements in the order of the file."""
    order, elements = None, list[_Element]()
    for line in text.splitlines()[1:]:
        match line.split():
            case ["format", name, _] if name in _PLY_ORDER:
                order = _PLY_ORDER[name]
            case ["element", name, count] if count.isdecimal():
                elements.append(_Element(name, int(count), []))
            case ["property", "list", _, _, name] if elements:
                elements[-1].properties.append((name, None))
            case ["property", kind, name] if elements and kind in _PLY_TYPES:
                elements[-1].properties.append((name, _PLY_TYPES[kind]))
            case [] | ["comment" | "obj_info", *_]:
                continue
            case _:
                raise DataError(f"cannot read PLY header line {line[:60]!r}")
    if order is None:
        raise DataError(f"PLY header names no format; known are {', '.join(_PLY_ORDER)}")
    return order, elements


def _ply_record(element: _Element, order: str) -> np.dtype[Any]:
    return np.dtype([(f"p{column}", order + str(kind)) for column, (_, kind) in enumerate(element.properties)])


def _ply_columns(names: list[str]) -> list[int]:
    """x, y, z first, then the rest as in the file."""
    if not {"x", "y", "z"} <= set(names):
        raise DataError(f"PLY vertices have {', '.join(names) or 'no properties'}; x, y and z are needed")
    position = [names.index(axis) for axis in "xyz"]
    return position + [column for column in range(len(names)) if column not in position]


def _rows(lines: list[str], count: int, columns: Sequence[int]) -> npt.NDArray[Any]:
    """The first `count` lines as a table of the chosen columns."""
    rows = list(islice((line for line in lines if line.strip()), min(count, len(lines))))
    if len(rows) < count:
        raise DataError(f"file is cut: {count} vertices announced, {len(rows)} lines there")
    return _table(rows, columns)


def _table(lines: list[str], columns: Sequence[int] | None = None) -> npt.NDArray[Any]:
    if not lines:
        raise DataError("file holds no points")
    try:
        return np.loadtxt(lines, np.float64, comments=None, ndmin=2, usecols=columns)
    except (ValueError, IndexError) as error:
        raise DataError(f"not a table of numbers: {str(error).splitlines()[0]}") from None


def _decode(data: bytes) -> str:
    return data.decode("utf-8", "replace")  # comments may be of any encoding; numbers are ASCII


_READERS: dict[str, Callable[[bytes], npt.NDArray[Any]]] = {
    ".npy": _from_arrays,
    ".npz": _from_arrays,
    ".txt": _from_text,
    ".xyz": _from_text,
    ".off": _from_off,
    ".ply": _from_ply,
}
