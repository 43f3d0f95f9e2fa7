"""What there is to pack: a folder, a list or tars become a `Listing` of items, without reading what the files hold.

An item is one future sample: its name (relative to the source, unique), the byte ranges its fields come from, its label
and its sequence. An item costs about 0.4 kB of memory, so ten million files take 4 GB.

Not here: how the bytes become fields (`conversion`), lists of paths (`lists`), tars (`tars`).
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.decode import decode_arrays
from data_pipelines.errors import DataError
from data_pipelines.hidden import is_hidden
from data_pipelines.packing.layout import number_classes, places, require_all_classes, same_text

__all__ = [
    "FAMILIES",
    "Entry",
    "Item",
    "Listing",
    "Piece",
    "family_of",
    "field_of",
    "holds",
    "list_folder",
    "natural_order",
    "suffix_of",
    "walk",
]

FAMILIES = {
    "images": (".jpg", ".jpeg", ".png", ".webp"),
    "points": (".npy", ".npz", ".ply", ".off", ".txt", ".xyz"),
    "volumes": (".nii", ".nii.gz", ".npy", ".npz"),
    "tars": (".tar", ".tar.gz", ".tgz"),
}
_FIELDS = {"points": "points.npy", "volumes": "volume.npy"}
_TELLS_NOTHING = (".txt", ".npy", ".npz")  # beside images these are labels, captions or features as a rule
_MASKS = {"images": ("seg.png", (".png",)), "volumes": ("seg.npy", FAMILIES["volumes"])}  # field, suffixes
_NOTE = re.compile(r"(readme|licen[cs]e|notice|copying|changelog)\b.*\.txt$", re.IGNORECASE)  # no cloud, though .txt
_DIGITS = re.compile(r"(\d+)")


class Piece(NamedTuple):
    """`size` bytes of a file that become one field."""

    field: str
    path: str  # relative to `Listing.root`, or absolute
    begin: int
    size: int


class Item(NamedTuple):
    """One future sample."""

    name: str
    pieces: tuple[Piece, ...]  # the first is what de-duplication compares
    label: int | None = None
    sequence: str | None = None
    split: str | None = None  # that the source puts it in
    problem: str | None = None  # what is wrong with it, as far as listing can tell
    key: str | None = None  # of the sample, without dots; None: its number in the data set


class Entry(NamedTuple):
    """A file of a folder."""

    path: str  # relative, with slashes
    size: int
    modified_ns: int
    real: str = ""  # where it lies, if a link led to it


@dataclass
class Listing:
    """Everything a source holds, sorted by name; frames of a sequence in their order."""

    name: str  # of the source, without its folder
    family: str  # of `FAMILIES`
    root: str
    items: list[Item] = field(default_factory=list)
    classes: tuple[str, ...] | None = None
    ignore_index: int | None = None
    skipped: Counter[str] = field(default_factory=Counter)  # suffix or field -> files that are left out
    newest: tuple[int, str] = (0, "")  # modification time of the file changed last, and its path
    _times: Any = field(default_factory=hashlib.sha256, repr=False)

    def digest(self) -> str:
        """SHA-256 over names, fields, sizes, labels, sequences and splits; independent of where the source lies."""
        sha = hashlib.sha256(f"{self.family} {self.classes} {self.ignore_index}\n".encode())
        for item in self.items:
            sizes = [(piece.field, piece.size) for piece in item.pieces]
            text = f"{item.name}\0{sizes}\0{item.label}\0{item.sequence}\0{item.split}\n"
            sha.update(text.encode("utf-8", "surrogateescape"))
        return sha.hexdigest()

    def state(self) -> str:
        """As `digest`, and over the modification time of every file that was seen: who changes one changes this."""
        return hashlib.sha256(f"{self.digest()} {self._times.hexdigest()}".encode()).hexdigest()

    def saw(self, path: str, modified_ns: int) -> None:
        self.newest = max(self.newest, (modified_ns, path))
        self._times.update(f"{path}\0{modified_ns}\n".encode("utf-8", "surrogateescape"))


def list_folder(source: Path, *, kind: str, masks: Path | None = None, classes: Sequence[str] | None = None) -> Listing:
    """List a folder.

    Args:
        kind: `auto`, `images`, `pairs`, `sequences`, `points` or `volumes`; `auto` takes the family that most files
            belong to, images where there are any beside files that may be anything (`.txt`, `.npy`).
        masks: folder with one mask (PNG) or label volume per file, of the same relative path but for the suffix; it
            may lie inside the source.
        classes: names in index order; the folders are looked up in it.

    Raises:
        DataError: nothing of that kind is there, a file has no mask, a folder is none of the classes, it cannot be told
            whether the folders are splits, or links put one file into two splits or classes.
    """
    if masks is not None and not masks.is_dir():
        raise DataError(f"no such folder of masks: {masks}")
    entries = [entry for entry in walk(source) if not _is_inside(masks, source / entry.path)]
    family = _family(source, entries) if kind == "auto" else {"pairs": "images", "sequences": "images"}.get(kind, kind)
    if family == "tars":
        raise DataError(f"{source} has its tars in sub-folders; pack one folder that directly holds the tars")
    listing = Listing(source.resolve().name, family, str(source))
    chosen = _choose(entries, FAMILIES[family], listing)
    if not chosen:
        raise DataError(f"no file with suffix {' '.join(FAMILIES[family])} in {source}{_instead(listing.skipped)}")
    field_name = field_of(family, (entry.path for entry in chosen))
    if masks is not None:
        _list_pairs(listing, chosen, field_name, masks)
    elif kind == "sequences":
        _list_sequences(listing, chosen, field_name)
    else:
        _list_classes(listing, chosen, field_name, classes)
    _keep_files_once(listing, {entry.path: entry.real for entry in chosen if entry.real})
    return listing


def suffix_of(path: str) -> str:
    """The lower-case suffix, `.nii.gz` and `.tar.gz` in one piece."""
    stem, suffix = os.path.splitext(path.lower())
    return f"{os.path.splitext(stem)[1]}{suffix}" if suffix == ".gz" else suffix


def family_of(path: str) -> str | None:
    """The first family with this suffix; `.npy`, `.npz` and `.txt` count as points here."""
    suffix = suffix_of(path)
    return next((family for family, suffixes in FAMILIES.items() if suffix in suffixes), None)


def holds(folder: Path, *families: str) -> bool:
    """Whether a file of one of the families lies below a folder. What `walk` refuses is passed over."""
    seen = set[str]()
    for here, folders, files in os.walk(folder, followlinks=True):
        if any(family_of(name) in families and not is_hidden(name) for name in files):
            return True
        seen.add(os.path.realpath(here))
        folders[:] = [
            name for name in folders if not is_hidden(name) and os.path.realpath(os.path.join(here, name)) not in seen
        ]
    return False


def field_of(family: str, paths: Iterator[str]) -> str:
    """The one field that holds the files of all samples.

    Where several image formats are mixed, the most frequent one names the field, since a field that only some samples
    have is of no use to training; decoders choose the codec by content.
    """
    if family != "images":
        return _FIELDS[family]
    names = Counter(suffix_of(path)[1:].replace("jpeg", "jpg") for path in paths)
    return max(sorted(names), key=names.__getitem__)


def natural_order(path: str) -> list[str | int]:
    """Sort key that puts `frame_10` behind `frame_9`."""
    return [int(part) if part.isdecimal() else part for part in _DIGITS.split(path)]


def walk(
    folder: Path, prefix: str = "", above: frozenset[tuple[int, int]] = frozenset(), real: str = ""
) -> Iterator[Entry]:
    """Every file below `folder` in sorted order, hidden ones left out, symbolic links followed.

    Args:
        prefix, above: of the folders that were walked through on the way here.
        real: where `folder` lies, if a link led to it.

    Raises:
        DataError: a link that leads in a circle or to nothing, or what cannot be read.
    """
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        link = next((path for path in (folder, *folder.parents) if path.is_symlink()), folder)
        raise DataError(f"symbolic link {link} leads to a folder that it lies in; remove the link")
    try:
        with os.scandir(folder) as found:
            inside = sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"folder {folder} cannot be read: {error.strerror}") from None
    for entry in inside:
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError as error:  # of a link to itself, or in a folder that may only be listed
            raise DataError(f"{folder / entry.name} cannot be read: {error.strerror}; remove it") from None
        lies = os.path.realpath(entry.path) if entry.is_symlink() else real and os.path.join(real, entry.name)
        if is_folder:
            yield from walk(folder / entry.name, f"{prefix}{entry.name}/", above | {here}, lies)
        elif is_file:
            status = entry.stat()
            yield Entry(prefix + entry.name, status.st_size, status.st_mtime_ns, lies)
        else:
            raise DataError(f"{folder / entry.name} is neither a file nor a folder (a broken link?); remove it")


def _family(source: Path, entries: list[Entry]) -> str:
    votes = Counter(family for entry in entries if (family := family_of(entry.path)))
    if votes["images"]:
        votes["points"] -= sum(suffix_of(entry.path) in _TELLS_NOTHING for entry in entries)
    if not votes:
        raise DataError(f"nothing to pack in {source}{_instead(Counter(suffix_of(entry.path) for entry in entries))}")
    family = max(FAMILIES, key=votes.__getitem__)
    arrays = [entry.path for entry in entries if suffix_of(entry.path) in (".npy", ".npz")]
    if family == "points" and len(arrays) == votes[family]:
        return _family_of_arrays([source / path for path in arrays])
    return family


def _family_of_arrays(paths: list[Path]) -> str:
    """A cloud is a table, a volume is a block; the first file that can be read tells, whatever is damaged before it.

    Raises:
        DataError: none can be read.
    """
    problem = ""
    for path in paths:
        try:
            dimensions = [array.ndim for array in decode_arrays(path.read_bytes()).values()]
        except DataError as error:
            problem = problem or f"{path}: {error}"
        except OSError as error:
            problem = problem or f"{path}: cannot be read: {error.strerror or error}"
        else:
            return "points" if max(dimensions, default=0) == 2 else "volumes"
    raise DataError(f"none of {len(paths)} arrays can be read, so nothing says what they are; the first: {problem}")


def _is_inside(folder: Path | None, path: Path) -> bool:
    return folder is not None and path.absolute().is_relative_to(folder.absolute())


def _choose(entries: list[Entry], suffixes: tuple[str, ...], listing: Listing) -> list[Entry]:
    chosen = []
    for entry in entries:
        suffix = suffix_of(entry.path)
        if suffix in suffixes and not _NOTE.match(entry.path.rpartition("/")[2]):
            chosen.append(entry)
            listing.saw(entry.path, entry.modified_ns)
        else:
            listing.skipped[suffix or entry.path.rpartition("/")[2]] += 1
    return chosen


def _instead(found: Counter[str]) -> str:
    if not found:
        return ": there is no file in it"
    return "; it has " + ", ".join(f"{count} {suffix or '(no suffix)'}" for suffix, count in found.most_common(5))


def _keep_files_once(listing: Listing, linked: dict[str, str]) -> None:
    """Leave one sample of each file: where it lies if that is in the listing, else by the first of the links to it.

    Args:
        linked: names of samples that links lead to -> where their files lie.

    Raises:
        DataError: links put a file into two splits or classes.
    """
    if not linked:
        return
    root = os.path.realpath(listing.root)
    first = {os.path.join(root, item.name): item for item in listing.items if item.name not in linked}
    for item in listing.items:
        if item.name in linked:
            first.setdefault(linked[item.name], item)
    kept = []
    for item in listing.items:
        other = first[linked.get(item.name) or os.path.join(root, item.name)]
        if (item.split, item.label) != (other.split, other.label):
            what = "splits" if item.split != other.split else "classes"
            raise DataError(
                f"{listing.root}: {other.name!r} and {item.name!r} are one file by a link, in two {what}; keep one"
            )
        if item is other:
            kept.append(item)
    if len(kept) < len(listing.items):
        listing.skipped["(links to files that are packed already)"] = len(listing.items) - len(kept)
        listing.items = kept


def _list_classes(listing: Listing, entries: list[Entry], field_name: str, classes: Sequence[str] | None) -> None:
    entries = sorted(entries)
    found = places([entry.path for entry in entries], listing.root, single_class=classes is not None)
    names = {place.class_name for place in found if place.class_name is not None}
    index = dict[str, int]()
    if names:
        listing.classes, index = number_classes(names, classes, listing.root)
        if classes is None:
            require_all_classes(Path(listing.root), listing.classes)
    elif classes is not None and listing.family != "volumes":  # volumes may hold masks themselves
        raise DataError(f"{listing.root} has no folders of classes for --classes to number; leave it out")
    for entry, place in zip(entries, found, strict=True):
        label = None if place.class_name is None else index[place.class_name]
        piece = Piece(field_name, entry.path, 0, entry.size)
        listing.items.append(Item(entry.path, (piece,), label, split=place.split))


def _list_sequences(listing: Listing, entries: list[Entry], field_name: str) -> None:
    """Each folder that directly holds frames is a sequence."""
    entries = sorted(entries, key=lambda entry: natural_order(entry.path))
    found = places([entry.path for entry in entries], listing.root, with_classes=False)
    for entry, place in zip(entries, found, strict=True):
        sequence, slash, _ = entry.path.rpartition("/")
        if not slash:
            raise DataError(f"{listing.root}: frame {entry.path!r} lies in no sequence; give each sequence a folder")
        piece = Piece(field_name, entry.path, 0, entry.size)
        listing.items.append(Item(entry.path, (piece,), None, sequence, place.split))


def _list_pairs(listing: Listing, entries: list[Entry], field_name: str, masks: Path) -> None:
    if listing.family not in _MASKS:
        raise DataError(f"masks belong to images or volumes, {listing.root} holds {listing.family}; leave masks out")
    mask_field, suffixes = _MASKS[listing.family]
    found = _choose(list(walk(masks)), suffixes, listing)
    by_stem = _by_stem(masks, found)
    missing = [entry.path for entry in entries if _stem(entry.path) not in by_stem]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(entries)} files of {listing.root} have no mask ({' '.join(suffixes)}) of the same "
            f"stem in {masks}, first {missing[0]!r}; add or remove them"
        )
    _by_stem(Path(listing.root), entries)
    if len(found) > len(entries):
        listing.skipped["(masks without image)"] = len(found) - len(entries)
    entries = sorted(entries)
    found_places = places([entry.path for entry in entries], listing.root, with_classes=False)
    for entry, place in zip(entries, found_places, strict=True):
        mask = by_stem[_stem(entry.path)]
        pieces = (
            Piece(field_name, entry.path, 0, entry.size),
            Piece(mask_field, os.path.join(os.path.abspath(masks), mask.path), 0, mask.size),
        )
        listing.items.append(Item(entry.path, pieces, split=place.split))


def _by_stem(folder: Path, entries: list[Entry]) -> dict[str, Entry]:
    stems: dict[str, Entry] = {}
    for entry in entries:
        other = stems.setdefault(_stem(entry.path), entry)
        if other is not entry:
            what = "the suffix or in how accents are written"
            raise DataError(f"{folder}: {other.path!r} and {entry.path!r} differ in {what} only; keep one of them")
    return stems


def _stem(path: str) -> str:
    return same_text(path[: len(path) - len(suffix_of(path))])
