"""Splits by name: of folders and of shards.

Not here: what folders say together (`packing.layout`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

__all__ = ["held_out", "in_order", "split_and_rest", "split_named", "split_of_tar"]

_SPLIT = re.compile(r"(?:(train)(?:ing)?|(val)(?:id(?:ation)?)?|(test)(?:ing)?|(dev))(?:[-_ ]?(?:set|\d+))?", re.I)
_SUFFIX_OF_TAR = re.compile(r"\.(tar|tar\.gz|tgz)$")


def split_named(name: str) -> str | None:
    """`train`, `val`, `test` or `dev` for the usual names of these (`training`, `Val`, `test2017`), else None."""
    found = _SPLIT.fullmatch(name)
    return next(filter(None, found.groups())).lower() if found else None


def split_of_tar(name: str) -> str | None:
    """The split that the name of a shard says: `train-000000.tar`, `imagenet-validation-01.tar.gz`."""
    split, _ = split_and_rest(_SUFFIX_OF_TAR.sub("", name))
    return split


def split_and_rest(name: str) -> tuple[str | None, str]:
    """The split that a part of a name says, and the other parts: `photos_val` is (`val`, `photos`)."""
    parts = re.split(r"[-_. ]", name)
    found = {split for part in parts if (split := split_named(part))}
    if len(found) != 1:
        return None, name
    return found.pop(), " ".join(part for part in parts if not split_named(part))


def held_out(folder: Path) -> str:
    """What is tested on in a folder of shards: `test`, or `val` where a data set has no other, as image folders do."""
    return "val" if any(folder.glob("val-*.tar")) and not any(folder.glob("test-*.tar")) else "test"


def in_order(splits: Collection[str]) -> list[str]:
    """Splits as people list them: train, val, test, then the others."""
    usual = ("train", "val", "test")
    return sorted(splits, key=lambda split: (usual.index(split) if split in usual else len(usual), split))
