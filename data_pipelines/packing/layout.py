"""What the folders and names of a set say about its samples: in which split they are, and of which class.

    train/cat/1.jpg  val/cat/2.jpg        a split, then a class           (image folders)
    chair/train/1.off  chair/test/2.off   a class, then a split           (ModelNet)
    images/train2017/1.jpg                a split below a common folder   (COCO, YOLO)
    cat/1.jpg  dog/2.jpg                  classes

A folder counts as a split only where every file lies in one. Classes are numbered over all splits together, so a class
that one split lacks moves no other.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

from data_pipelines.errors import DataError, suggest
from data_pipelines.hidden import is_hidden
from data_pipelines.split_names import split_and_rest, split_named

__all__ = ["Place", "number_classes", "places", "require_all_classes", "same_text"]

_ALMOST = re.compile(r"(?:train|val|valid|test)[-_ ]?[A-Z0-9]", re.I)  # trainA, testB
_DEEPEST = 3  # folders that are looked at for splits
_NAMED = 12  # classes that a message lists


class Place(NamedTuple):
    """What the folders of one file say."""

    split: str | None
    class_name: str | None


def same_text(text: str) -> str:
    """The form in which names are compared: accents composed, since old Macs and their zips write them apart."""
    return normalize("NFC", text)


def places(paths: Sequence[str], owner: str, *, with_classes: bool = True, single_class: bool = False) -> list[Place]:
    """Split and class of each file.

    Args:
        paths: relative, with slashes.
        owner: the folder, for messages.
        with_classes: whether folders can be classes; otherwise splits are looked for only.
        single_class: whether one folder alone is a class too; otherwise it takes two to tell classes apart.

    Raises:
        DataError: some folders look like splits and others beside them do not, or only some splits have classes.
    """
    names = [path.rpartition("/")[0] for path in paths]
    distinct = sorted(set(names))  # ten million files lie in few folders
    folders = [tuple(map(same_text, name.split("/"))) if name else () for name in distinct]
    found = dict(zip(distinct, _places(folders, owner, with_classes, single_class), strict=True))
    return [found[name] for name in names]


def _places(folders: Sequence[tuple[str, ...]], owner: str, with_classes: bool, single_class: bool) -> list[Place]:
    level = next((n for n in range(_DEEPEST) if all(len(f) > n and split_named(f[n]) for f in folders)), None)
    splits: list[str | None] = [None] * len(folders)
    if level is None:
        _refuse_some_splits(folders, owner)
    else:
        splits = [split_named(f[level]) for f in folders]
        above = {f[:level] for f in folders}
        kept = 0 if len(above) > 1 else level  # a folder that all files share says nothing
        folders = [f[kept:level] + f[level + 1 :] for f in folders]
    if not with_classes:
        return [Place(split, None) for split in splits]
    return _with_classes(splits, folders, owner, single_class)


def _with_classes(
    splits: Sequence[str | None], folders: Sequence[tuple[str, ...]], owner: str, single_class: bool
) -> list[Place]:
    """Folders of the first level are classes, when there are two or more and no file lies beside them."""
    names = defaultdict[str | None, set[str]](set)
    for split, folder in zip(splits, folders, strict=True):
        names[split].add(folder[0] if folder else "")
    labelled = [split for split, found in names.items() if "" not in found]
    if len(set[str]().union(*(names[split] for split in labelled))) <= (0 if single_class else 1):
        return [Place(split, None) for split in splits]
    if len(labelled) < len(names):
        lacking = next(split for split in names if split not in labelled)
        if lacking is None:
            return [Place(None, None) for _ in splits]
        raise DataError(
            f"{owner}: split {labelled[0]} has folders of classes, split {lacking} has files beside or without them; "
            "pack the splits one by one, or sort the files into the folders of their classes"
        )
    return [Place(split, folder[0]) for split, folder in zip(splits, folders, strict=True)]


def _refuse_some_splits(folders: Sequence[tuple[str, ...]], owner: str) -> None:
    """Folders called train and val among others are no classes, but what the others are nobody can know."""
    tops = defaultdict[str, set[str]](set)
    for folder in folders:
        tops[folder[0] if folder else ""].add(folder[1] if len(folder) > 1 else "")
    alike = sorted(top for top in tops if split_named(top) or _ALMOST.fullmatch(top))
    has_folders = any(split_named(top) and len(tops[top] - {""}) > 1 for top in alike)
    if len({split_named(top) or top for top in alike}) > 1 or has_folders:
        others = sorted(top for top in tops if top not in alike or not split_named(top))
        rest = ", ".join(f"{top!r}" if top else "files beside them" for top in others[:3])
        named = ", ".join(repr(top) for top in alike[:3])
        raise DataError(
            f"{owner} holds folders that look like splits ({named}) and others that do not ({rest}); pack each split "
            "by itself, move the others away, or write a list with the columns path,label"
        )


def number_classes(
    found: Iterable[str], given: Sequence[str] | None, owner: str
) -> tuple[tuple[str, ...], dict[str, int]]:
    """The classes in the order of their indices, and the index of each: as given, else by sorted name.

    Raises:
        DataError: a class that is not among those given.
    """
    names = {same_text(name) for name in found}
    classes = tuple(sorted(names)) if given is None else tuple(map(same_text, given))
    if unknown := sorted(names.difference(classes)):
        raise DataError(
            f"{owner} has the class {unknown[0]!r}, which is none of --classes {_listed(classes)}"
            f"{suggest(unknown[0], classes)}; name every class there is, in the order of the indices"
        )
    return classes, {name: index for index, name in enumerate(classes)}


def require_all_classes(source: Path, classes: Collection[str]) -> None:
    """A split that is packed by itself must have every class that the splits beside it have, or be told the classes.

    Raises:
        DataError: it lacks one, so its indices would differ from theirs.
    """
    here = source.resolve()
    split, rest = split_and_rest(here.name)
    if split is None:
        return
    for beside in _folders_in(here.parent):
        other, other_rest = split_and_rest(beside)
        if other in (None, split) or other_rest != rest:
            continue
        theirs = set(map(same_text, _folders_in(here.parent / beside)))
        if len(theirs) > 1 and (missing := sorted(theirs.difference(classes))):
            everything = _listed(sorted(theirs.union(classes)))
            whole = "" if rest else f"pack {here.parent} as a whole, or "
            raise DataError(
                f"{source} has no folder {missing[0]!r}, which {beside} beside it has: packed by itself, its "
                f"classes would have other indices; {whole}give --classes {everything}"
            )


def _folders_in(folder: Path) -> list[str]:
    """Names of the folders in one, if it may be read; hidden ones are left out."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if os.path.isdir(entry) and not is_hidden(entry.name))


def _listed(names: Sequence[str]) -> str:
    return ",".join(names) if len(names) <= _NAMED else f"{','.join(names[:_NAMED])},... ({len(names)} in all)"
