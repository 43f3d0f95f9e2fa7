"""Existing tars to pack again: their samples by the strict scan of `index`, fields by an allow-list.

Compressed tars are unpacked to a temporary file first and scanned like plain ones. `webdataset` could read them as a
stream, but it ends silently at a damaged header and emits half a sample; gzip's own checksum and the scan do not.
Fields that only code could read (pickles) are an error, other unknown ones are left out and counted.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import shutil
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import cut_names, field_kind, is_never_read, picture_names
from data_pipelines.hidden import is_hidden
from data_pipelines.packing.inputs import FAMILIES, Item, Listing, Piece, suffix_of
from data_pipelines.parsing import parse_json
from data_pipelines.shards.index import ShardIndex, scan_shard
from data_pipelines.shards.manifest import MANIFEST_NAME, listed_shards
from data_pipelines.shards.source import require_all
from data_pipelines.split_names import split_of_tar

__all__ = ["list_tars"]

_SPLIT_NAME = re.compile(r"[A-Za-z0-9_]+")  # others make no name of a shard


def list_tars(source: Path, unpacked: Callable[[], Path], classes: Sequence[str] | None = None) -> Listing:
    """List the samples of a tar, or of every tar directly in a folder.

    Samples stay in the split that `dataset.json` beside the tars or the name of their tar says.

    Args:
        unpacked: makes a folder for plain copies of compressed tars; they must stay until all is packed.
        classes: names in index order; those that `dataset.json` states must have the same indices in it.

    Raises:
        DataError: a tar is damaged, or has a field that is never read (names shard, sample and field); only some tars
            say a split; `classes` are others than those stated.
    """
    folder = source if source.is_dir() else source.parent
    tars = [source]
    if source.is_dir():
        require_all(source)
        found = sorted(path for path in folder.iterdir() if suffix_of(path.name) in FAMILIES["tars"])
        tars = [path for path in found if not is_hidden(path.name)]
    if not tars:
        raise DataError(f"no file with suffix {' '.join(FAMILIES['tars'])} in {source}")
    listing = Listing(source.resolve().name.partition(".")[0], "tars", str(folder))
    described = _description(folder)
    splits = _splits(source, [tar.name for tar in tars], described)
    folder_of_copies = None
    for tar in tars:
        listing.saw(tar.name, tar.stat().st_mtime_ns)
        if tar.suffix == ".tar":
            plain = tar
        else:
            folder_of_copies = folder_of_copies or unpacked()
            plain = _unpack(tar, folder_of_copies)
        _list_tar(listing, tar.name, plain.absolute(), scan_shard(plain, str(tar)), splits[tar.name])
    _unify_pictures(listing)
    _describe(listing, described, classes)
    return listing


def _splits(source: Path, names: Sequence[str], described: Mapping[str, Any]) -> dict[str, str | None]:
    """The split of each tar; none where no tar but those of `train` says one."""
    listed = {name: split for name, (split, _) in listed_shards(described).items()}
    splits = {name: listed.get(name) or split_of_tar(name) for name in names}
    splits = {name: split if split and _SPLIT_NAME.fullmatch(split) else None for name, split in splits.items()}
    says_none = [name for name, split in splits.items() if split is None]
    if not says_none or not {split for split in splits.values() if split not in (None, "train")}:
        return splits if not says_none else dict.fromkeys(names)
    says_one = next(f"{name} is of {split}" for name, split in splits.items() if split not in (None, "train"))
    raise DataError(
        f"{source}: {says_one}, but {says_none[0]} says no split; call it train-{says_none[0]} or like its split, or "
        "pack it by itself"
    )


def _list_tar(listing: Listing, name: str, plain: Path, index: ShardIndex, split: str | None) -> None:
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
            listing.items.append(Item(f"{name}/{index.key(sample)}", ordered, split=split))


def _unify_pictures(listing: Listing) -> None:
    """Give pictures of several formats the name of the most frequent one.

    Where most samples have a picture, one without counts as damaged.
    """
    names = Counter(piece.field for item in listing.items for piece in item.pieces)
    pictures = {name: picture_names(name) for name in names if picture_names(name)}
    usual = {formats: max(formats, key=lambda name: names[name]) for formats in pictures.values()}
    num_pictured = sum(any(piece.field in pictures for piece in item.pieces) for item in listing.items)
    needs_picture = 2 * num_pictured > len(listing.items)
    for number, item in enumerate(listing.items):
        formats = Counter(pictures[piece.field] for piece in item.pieces if piece.field in pictures)
        renamed = [
            piece._replace(field=usual[pictures[piece.field]])
            if formats.get(pictures.get(piece.field, ())) == 1  # two formats in one sample are two fields
            else piece
            for piece in item.pieces
        ]
        problem = (
            None if formats or not needs_picture else f"has no picture as other samples have, only {_fields(item)}"
        )
        listing.items[number] = item._replace(pieces=tuple(renamed), problem=problem)
    if cut := cut_names(names):
        warnings.warn(
            f"{listing.root}: fields {', '.join(cut[:5])} look like rests of names with dots: a key ends at the first "
            "dot, so cat.0.jpg and cat.1.jpg are one sample; unless that is meant, unpack the tar and pack the folder",
            stacklevel=2,
        )


def _fields(item: Item) -> str:
    return ", ".join(piece.field for piece in item.pieces)


def _unpack(tar: Path, folder: Path) -> Path:
    plain = folder / f"{hashlib.sha256(tar.name.encode()).hexdigest()[:16]}.tar"
    try:
        with gzip.open(tar, "rb") as packed, open(plain, "wb") as file:
            shutil.copyfileobj(packed, file, 1 << 20)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{tar} is damaged: {error}; copy it again") from None
    return plain


def _description(folder: Path) -> Mapping[str, Any]:
    """The `dataset.json` beside the tars, whoever wrote it."""
    path = folder / MANIFEST_NAME
    if not path.is_file():
        return {}
    try:
        return _mapping(parse_json(path.read_bytes()))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None


def _describe(listing: Listing, described: Mapping[str, Any], given: Sequence[str] | None) -> None:
    """Classes and ignored value that a `dataset.json` beside the tars states; labels and masks in tars are indices."""
    classes, ignored = described.get("classes"), described.get("ignore_index")
    stated = tuple(map(str, classes)) if isinstance(classes, list) and classes else ()
    if given is not None and tuple(given)[: len(stated)] != stated:
        raise DataError(
            f"--classes {','.join(given)}: the labels in {listing.root} are indices into the classes "
            f"{','.join(stated)} of its {MANIFEST_NAME}; begin with these, in this order"
        )
    listing.classes = tuple(given) if given is not None else stated or None
    listing.ignore_index = ignored if isinstance(ignored, int) else None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
