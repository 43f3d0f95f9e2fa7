"""Copies: samples that are told to be the same by the bytes of their picture, cloud, volume or array.

Not here: whose bytes are compared where (`pack`, `verify`, `stats`, and evaluation while it reads).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from data_pipelines.field_kinds import kind_of_field

__all__ = ["COMPARED", "Copies", "compared_field", "content_hash", "copies_between"]

COMPARED = ("image", "points", "volume", "array", "depth", "mask")  # kinds of fields that tell copies, the best first


class Copies(NamedTuple):
    """Samples of one split whose content a sample of another split has."""

    split: str
    other: str
    num_samples: int  # of `split`
    first: int  # number of the first of them in `split`

    def __str__(self) -> str:
        one = self.num_samples == 1
        verb = "sample of {0} has" if one else "samples of {0} have"
        return f"{self.num_samples} {verb.format(self.split)} the content of {'one' if one else 'some'} of {self.other}"


def content_hash(data: bytes) -> int:
    """64 bits; among ten million samples two different ones agree with a chance of 3 in a million."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def compared_field(names: Iterable[str], declared: Any) -> str | None:
    """The field of a sample by which it is compared; None if it has none of these kinds.

    Args:
        names: of its fields.
        declared: see `kind_of_field`.
    """
    kinds = {name: kind_of_field(name, declared) for name in sorted(names)}
    return min(
        (name for name, kind in kinds.items() if kind in COMPARED),
        key=lambda name: COMPARED.index(str(kinds[name])),
        default=None,
    )


def copies_between(contents: Mapping[str, npt.NDArray[np.uint64]]) -> list[Copies]:
    """For each two splits that share content, what the smaller one has of the larger one.

    Args:
        contents: by split, (n,) the hash of each sample; 0 for samples that are not compared.
    """
    found = []
    for first, second in combinations(contents, 2):
        split, other = sorted((first, second), key=lambda name: len(contents[name]))
        shared = np.isin(contents[split], contents[other][contents[other] != 0])
        if shared.any():
            found.append(Copies(split, other, int(shared.sum()), int(shared.argmax())))
    return found
