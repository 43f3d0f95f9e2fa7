"""Existing tars to pack again: their samples by the strict scan of `index`, fields by an allow-list.

Compressed tars are unpacked to a temporary file first and scanned like plain ones. `webdataset` could read them as a
stream, but it ends silently at a damaged header and emits half a sample; gzip's own checksum and the scan do not.
Fields that only code could read (pickles) are an error, other unknown ones are left out and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import field_kind, is_never_read
from data_pipelines.packing.inputs import FAMILIES, Item, Listing, Piece, suffix_of
from data_pipelines.shards.index import ShardIndex, scan_shard
from data_pipelines.shards.manifest import MANIFEST_NAME

__all__ = ["list_tars"]


def list_tars(source: Path, unpacked: Callable[[], Path]) -> Listing:
    """List the samples of a tar, or of every tar directly in a folder.

    Args:
        unpacked: makes a folder for plain copies of compressed tars; they must stay until all is packed.

    Raises:
        DataError: a tar is damaged, or has a field that is never read; names shard, sample and field.
    """
    folder = source if source.is_dir() else source.parent
    tars = sorted(path for path in folder.iterdir() if suffix_of(path.name) in FAMILIES["tars"])
    if not source.is_dir():
        tars = [source]
    if not tars:
        raise DataError(f"no file with suffix {' '.join(FAMILIES['tars'])} in {source}")
    listing = Listing(source.resolve().name.partition(".")[0], "tars", str(folder))
    folder_of_copies = None
    for tar in tars:
        listing.saw(tar.name, tar.stat().st_mtime_ns)
        if tar.suffix == ".tar":
            plain = tar
        else:
            folder_of_copies = folder_of_copies or unpacked()
            plain = _unpack(tar, folder_of_copies)
        _list_tar(listing, tar.name, plain.absolute(), scan_shard(plain, str(tar)))
    _describe(listing, folder)
    return listing


def _list_tar(listing: Listing, name: str, plain: Path, index: ShardIndex) -> None:
    for sample in range(index.num_samples):
        start, pieces = int(index.start[sample]), []
        for field_name, (begin, end) in index.field_ranges(sample).items():
            if is_never_read(field_name):
                raise DataError(
                    f"{name}: sample {index.key(sample)!r} has a field {field_name!r}, which only running code could "
                    "read; remove it, or store its content as json, npy or npz"
                )
            kind = field_kind(field_name)
            if kind is None:
                listing.skipped[f"field {field_name}"] += 1
                continue
            pieces.append((kind != "image", Piece(field_name, str(plain), start + begin, end - begin)))
        if pieces:
            ordered = tuple(piece for _, piece in sorted(pieces))  # images first: what de-duplication compares
            listing.items.append(Item(f"{name}/{index.key(sample)}", ordered))


def _unpack(tar: Path, folder: Path) -> Path:
    plain = folder / f"{hashlib.sha256(tar.name.encode()).hexdigest()[:16]}.tar"
    try:
        with gzip.open(tar, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{tar} is damaged: {error}; copy it again") from None
    return plain


def _describe(listing: Listing, folder: Path) -> None:
    """Classes and ignored value that a `dataset.json` beside the tars states, whoever wrote it."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return
    try:
        described = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if isinstance(described, dict):
        classes, ignored = described.get("classes"), described.get("ignore_index")
        listing.classes = tuple(map(str, classes)) if isinstance(classes, list) and classes else None
        listing.ignore_index = ignored if isinstance(ignored, int) else None
