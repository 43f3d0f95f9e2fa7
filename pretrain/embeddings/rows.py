"""Rows of embeddings on disk: appended in order, kept over a kill, and put in their place when all are there.

    .NAME.embedding/    beside DEST, while the work is under way
        request.json    what is embedded by what: another request does not go on here
        progress.json   how many rows are whole, and how many bytes their keys take
        cls.npy, patch_mean.npy, keys.jsonl, lock
        done/           becomes DEST by one rename

Arrays are written by appending to a file whose header says the final shape, so that a full disk is an error of a write,
memory stays small, and what a killed process wrote beyond the last whole row is cut off.

Not here: what a row is (`embed`).
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import numpy as np
import numpy.typing as npt

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from pretrain.errors import RequestError
from pretrain.record.lock import hold

__all__ = ["DESCRIPTION", "Rows", "require_same"]

DESCRIPTION = "_embedding.json"  # readers of Parquet folders pass over what begins with _
GROUP = 8192  # rows that are converted at once
DTYPE = np.dtype("<f4")

Vectors = npt.NDArray[np.float32]


class Rows:
    """Rows of one request, from `num_done` on; holds the lock of its place while it is open.

    Attributes:
        num_done: rows that are there.
    """

    def __init__(self, dest: Path, request: Mapping[str, Any], num_rows: int, widths: Mapping[str, int]) -> None:
        """`widths` has the length of a row for each array, by its name."""
        self._dest, self._request, self._num_rows, self._widths = dest, dict(request), num_rows, dict(widths)
        self._work = place_of_work(dest)
        self.num_done = 0

    def __enter__(self) -> Self:
        """Raises:
        RequestError: Unfinished rows of another request are there, or another process is at work.
        """
        self._work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as opened:
            lock = hold(self._work / "lock")
            if lock is None:
                raise RequestError(f"{self._dest}: another process is embedding into it; wait for it")
            opened.enter_context(lock)
            self._begin()
            mode = "r+b" if self.num_done else "wb"
            self._files = {name: opened.enter_context(open(self._work / f"{name}.npy", mode)) for name in self._widths}
            for name, file in self._files.items():
                self._cut(file, self._widths[name])
            self._keys = opened.enter_context(open(self._work / "keys.jsonl", mode))
            self._keys.truncate(self._key_bytes)
            self._keys.seek(0, os.SEEK_END)
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._opened.close()
        if self.num_done == 0:
            shutil.rmtree(self._work, ignore_errors=True)

    def append(self, keys: Sequence[str], vectors: Mapping[str, Vectors]) -> None:
        """Write the next rows; they count when `save` has been called."""
        for name, file in self._files.items():
            file.write(np.ascontiguousarray(vectors[name], DTYPE).data)
        self._keys.write("".join(f"{json.dumps(key)}\n" for key in keys).encode())
        self.num_done += len(keys)

    def save(self) -> None:
        """Have all rows so far survive the end of this process, and of the machine."""
        for file in (*self._files.values(), self._keys):
            file.flush()
            os.fsync(file.fileno())
        progress = {"rows": self.num_done, "key_bytes": self._keys.tell()}
        write_atomically(self._work / "progress.json", json.dumps(progress).encode())

    def finish(self, form: str, description: Mapping[str, Any], parts: Iterator[tuple[str, int, int]]) -> None:
        """Make DEST of the rows, which are all there: it appears whole.

        Args:
            form: `parquet` or `npy`.
            description: What is told of them in `_embedding.json`.
            parts: (name of a shard, its first row, the row behind its last).
        """
        self.save()
        done = self._work / "done"
        shutil.rmtree(done, ignore_errors=True)  # of a process that was killed while it made it
        done.mkdir()
        if form == "npy":
            self._write_npy(done)
        else:
            self._write_parquet(done / "embeddings.parquet", parts)
        for file in done.iterdir():
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
        write_atomically(done / DESCRIPTION, json.dumps(description, indent=1).encode())
        done.rename(self._dest)  # refused by the system if there is something by now
        shutil.rmtree(self._work, ignore_errors=True)

    def _begin(self) -> None:
        written = self._work / "request.json"
        self._key_bytes = 0
        if not written.exists():
            write_atomically(written, json.dumps(self._request).encode())
            return
        require_same(parse_json(written.read_bytes()), self._request, self._dest, f"unfinished in {self._work}")
        progress = self._work / "progress.json"
        if progress.exists():
            found = parse_json(progress.read_bytes())
            self.num_done, self._key_bytes = int(found["rows"]), int(found["key_bytes"])

    def _cut(self, file: IO[bytes], width: int) -> None:
        """Leave an array at the end of its last whole row."""
        if self.num_done:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
        else:
            layout = {"descr": DTYPE.str, "fortran_order": False, "shape": (self._num_rows, width)}
            np.lib.format.write_array_header_1_0(file, layout)
        file.truncate(file.tell() + self.num_done * width * DTYPE.itemsize)
        file.seek(0, os.SEEK_END)

    def _read_keys(self) -> Iterator[str]:
        with open(self._work / "keys.jsonl", encoding="ascii") as lines:
            yield from map(json.loads, lines)

    def _write_npy(self, done: Path) -> None:
        longest = max(map(len, self._read_keys()), default=0)
        keys = np.lib.format.open_memmap(
            done / "keys.npy", mode="w+", dtype=f"<U{max(1, longest)}", shape=(self._num_rows,)
        )
        for row, key in enumerate(self._read_keys()):
            keys[row] = key
        keys.flush()
        for name in self._widths:
            os.link(self._work / f"{name}.npy", done / f"{name}.npy")

    def _write_parquet(self, file: Path, parts: Iterator[tuple[str, int, int]]) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        columns = [pa.field("shard", pa.string()), pa.field("key", pa.string())]
        columns += [pa.field(name, pa.list_(pa.float32(), width)) for name, width in self._widths.items()]
        arrays = {name: np.load(self._work / f"{name}.npy", mmap_mode="r") for name in self._widths}
        keys = self._read_keys()
        with parquet.ParquetWriter(file, pa.schema(columns)) as writer:
            for shard, begin, end in parts:
                for first in range(begin, end, GROUP):
                    rows = slice(first, min(first + GROUP, end))
                    texts = [_as_text(next(keys)) for _ in range(rows.stop - rows.start)]
                    values = [
                        pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(array[rows]).reshape(-1)), array.shape[1])
                        for array in arrays.values()
                    ]
                    named = [pa.array([_as_text(shard)] * len(texts)), pa.array(texts), *values]
                    writer.write_table(pa.Table.from_arrays(named, schema=writer.schema))


def place_of_work(dest: Path) -> Path:
    """The folder in which rows are collected."""
    return dest.parent / f".{dest.name}.embedding"


def require_same(held: Any, request: Mapping[str, Any], dest: Path, where: str) -> None:
    """Refuse to mix two requests.

    Raises:
        RequestError: Names what differs.
    """
    held = held if isinstance(held, dict) else {}
    what = {
        "weights": "of another checkpoint",
        "data": "of other data",
        "features": "by another version of this package",
        "form": f"with --format {held.get('form')}",
        "tokens": f"with --tokens {held.get('tokens')}",
    }
    for key, said in what.items():
        if held.get(key) != request.get(key):
            raise RequestError(f"{dest}: holds an embedding {said} ({where}); choose another destination or remove it")


def _as_text(name: str) -> str:
    """Names of files may hold bytes that are no text, which Parquet does not."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
