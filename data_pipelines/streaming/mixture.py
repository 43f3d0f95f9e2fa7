"""Several data sets read as one stream in fixed shares.

A pattern of length L says which part every position takes, and repeats for ever: position P belongs to part
`pattern[P % L]` and is that part's sample number `P // L * (slots of the part) + (its slots before P % L)`. So a
mixture is a pure function of the position like the order of one part (`order`), and resumes at any position as
exactly. Inside its share each part runs through epochs of its own, in each of which every sample of it comes once,
however many samples the other parts have.

The slots of a part are spread evenly over the pattern, so any stretch of positions holds every part in nearly its
share.

Not here: the recipe keys that describe parts (`pretrain.config.load`), what batches look like (`stream`). Every part
has the fields that the views ask for; samples are not converted from one part's fields to another's.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import shared_names, under_shared_names
from data_pipelines.order import Ids, SampleOrder, key
from data_pipelines.purposes import Purpose
from data_pipelines.shards.dataset import Dataset, first_field, locate

__all__ = ["MAX_PATTERN", "Mixture", "MixtureOrder", "Part", "Parts", "pattern_of"]

MAX_PATTERN = 1 << 16  # slots; shares are realized to within 1 / 65536, and exactly where a shorter pattern can


@dataclass(frozen=True)
class Part:
    """One data set of a mixture.

    Attributes:
        name: what messages call it.
        dataset: its samples.
        weight: share of the positions, relative to the weights of the other parts.
        repeat: instead of a weight: how often this part is read while a part with repeat 1 is read once.
    """

    name: str
    dataset: Dataset
    weight: float | None = None
    repeat: float | None = None


class Parts:
    """Several data sets behind one, which says how they are read.

    Attributes:
        parts: as given.
        num_samples: positions of one pass.
    """

    num_samples: int

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = tuple(parts)

    def __len__(self) -> int:
        return self.num_samples

    def first_without(self, names: Sequence[str]) -> str:
        """The first sample of any part that has none of these fields, see `Dataset.first_without`."""
        return next((found for part in self.parts if (found := part.dataset.first_without(names))), "")

    def close(self) -> None:
        """Close the shard files of all parts."""
        for part in self.parts:
            part.dataset.close()

    def _digest(self, how: bytes) -> str:
        """SHA-256 of how the parts are read and of their content, in their order."""
        sha = hashlib.sha256(how)
        for part in self.parts:
            sha.update(part.dataset.digest.encode())
        return sha.hexdigest()

    def _orders(self, purpose: Purpose, seed: int, layout: dict[str, int]) -> list[SampleOrder]:
        """The order of each part, drawn from a seed of its own; `layout` as of `Dataset.sample_order`."""
        return [
            part.dataset.sample_order(seed=key(seed, purpose, number), **layout)
            for number, part in enumerate(self.parts)
        ]


class Mixture(Parts):
    """Parts as one array of samples: the ids of a part follow those of the part before.

    It is read like a `Dataset`; `sample_order` deals the positions to the parts. One pass (`num_samples` positions)
    does not hold each sample once: parts are repeated by their shares.

    Args:
        parts: at least one; all have a weight, or none has one (then `repeat` counts, 1 where it is not given).

    Raises:
        DataError: no part, a name used twice, a share that is not positive or below 1 / 65536.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        self.pattern = pattern_of(_shares(self.parts))
        self.fields = shared_names(part.dataset.fields for part in self.parts)
        self._begins = [0, *accumulate(part.dataset.num_samples for part in self.parts)]
        self.num_samples = self._begins[-1]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of the parts and of how they are mixed."""
        return self._digest(b"pretrain-mixture 1\n" + self.pattern.astype("<u4").tobytes())

    def read(self, sample_id: int) -> dict[str, Any]:
        """The fields of one sample, see `Dataset.read`."""
        part, inside = self._locate(sample_id)
        return under_shared_names(part.dataset.read(inside), self.fields)

    def prefetch(self, sample_ids: Iterable[int]) -> None:
        """Have remote samples fetched together, see `Dataset.prefetch`."""
        wanted: dict[str, list[int]] = {part.name: [] for part in self.parts}
        for part, inside in map(self._locate, sample_ids):
            wanted[part.name].append(inside)
        for part in self.parts:
            part.dataset.prefetch(wanted[part.name])

    def where(self, sample_id: int) -> str:
        """Part, shard and key of a sample, as error messages name it."""
        part, inside = self._locate(sample_id)
        return f"{part.name}: {part.dataset.where(inside)}"

    def require_field(self, *candidates: str) -> str:
        """The first of `candidates` that every sample of every part has.

        Raises:
            DataError: there is none; names what there is.
        """
        return first_field(candidates, self.fields, f"mixture of {', '.join(part.name for part in self.parts)}")

    def sample_order(self, *, seed: int, block_size: int, window: int, num_streams: int) -> MixtureOrder:
        """Global positions -> (epochs, sample ids); an epoch is the one of the sample's own part."""
        layout = {"block_size": block_size, "window": window, "num_streams": num_streams}
        return MixtureOrder(self.pattern, self._orders(Purpose.PART, seed, layout), self._begins[:-1])

    def _locate(self, sample_id: int) -> tuple[Part, int]:
        number, inside = locate(sample_id, self._begins)
        return self.parts[number], inside


class MixtureOrder:
    """Global position -> (epoch of the part, sample id).

    Args:
        pattern: (L,) number of the part that takes each slot.
        orders: of each part.
        first_ids: of each part.
    """

    def __init__(self, pattern: npt.NDArray[np.int64], orders: Sequence[SampleOrder], first_ids: Sequence[int]) -> None:
        self._pattern, self._orders, self._first_ids = pattern, tuple(orders), tuple(first_ids)
        self._slots = np.bincount(pattern, minlength=len(orders))  # (parts,)
        self._earlier = np.empty(len(pattern), np.int64)  # (L,) slots of the same part before each slot
        for part, slots in enumerate(self._slots):
            self._earlier[pattern == part] = np.arange(slots)

    def places(self, positions: Iterable[int] | Ids) -> tuple[Ids, Ids]:
        """Number of the part at each position, and how many positions of that part come before."""
        rounds, slot = np.divmod(np.asarray(positions, np.int64), len(self._pattern))
        parts = self._pattern[slot]
        return parts, rounds * self._slots[parts] + self._earlier[slot]

    def __call__(self, positions: Iterable[int] | Ids) -> tuple[Ids, Ids]:
        """Epochs and sample ids, both of the length of `positions`."""
        parts, inside = self.places(positions)
        epochs, ids = np.empty_like(inside), np.empty_like(inside)
        for part in np.unique(parts):
            here = parts == part
            epochs[here], own = self._orders[part](inside[here])
            ids[here] = own + self._first_ids[part]
        return epochs, ids


def pattern_of(shares: Sequence[float]) -> npt.NDArray[np.int64]:
    """The part of each slot of the repeating pattern, as evenly spread as shares allow.

    The length is the smallest up to `MAX_PATTERN` in which all shares are whole numbers of slots, else `MAX_PATTERN`
    with shares rounded to within one slot.

    Args:
        shares: of each part, positive.

    Returns:
        (L,) part numbers; each part has a slot.

    Raises:
        DataError: a share is too small to get a slot.
    """
    slots = _slots(np.asarray(shares, np.float64) / math.fsum(shares))
    parts = np.repeat(np.arange(len(slots)), slots)  # (L,)
    number = np.concatenate([np.arange(count) for count in slots])
    middle = (2 * number + 1) / (2 * slots[parts])  # of the stretch that a slot stands for, in (0, 1)
    return parts[np.argsort(middle, kind="stable")]  # ties: the part named first


def _slots(shares: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Whole slots of each part; `shares` sum to 1."""
    lengths = np.arange(1, MAX_PATTERN + 1)
    exact = shares[:, None] * lengths  # (parts, L)
    fits = (np.abs(exact - np.rint(exact)).max(axis=0) < 1e-9 * lengths) & (np.rint(exact).min(axis=0) >= 1)
    if fits.any():
        return np.rint(exact[:, np.argmax(fits)]).astype(np.int64)
    wanted = exact[:, -1]
    if wanted.min() < 1:
        raise DataError(
            f"a mixture share of {shares.min():.2g} is too small; it is at least 1 / {MAX_PATTERN} = "
            f"{1 / MAX_PATTERN:.2g}: raise the weight or repeat of that part, or leave it out"
        )
    slots = np.floor(wanted).astype(np.int64)
    rest = MAX_PATTERN - int(slots.sum())
    slots[np.argsort(slots - wanted, kind="stable")[:rest]] += 1  # the largest remainders
    return slots


def _shares(parts: Sequence[Part]) -> list[float]:
    """What each part's share is proportional to."""
    if not parts:
        raise DataError("a mixture of no parts; give at least one")
    for name, times in Counter(part.name for part in parts).items():
        if times > 1:
            raise DataError(f"mixture part {name!r} is named {times} times; give each part a name of its own")
    for part in parts:
        for what, value in (("weight", part.weight), ("repeat", part.repeat)):
            if value is not None and not 0 < value < math.inf:
                raise DataError(f"mixture part {part.name!r}: {what}={value} is not allowed; it is a positive number")
        if part.weight is not None and part.repeat is not None:
            raise DataError(f"mixture part {part.name!r} has a weight and a repeat; give one of them")
    weights = [part.weight for part in parts if part.weight is not None]
    if not weights:
        return [(1.0 if part.repeat is None else part.repeat) * part.dataset.num_samples for part in parts]
    if len(weights) < len(parts):
        lacking = next(part.name for part in parts if part.weight is None)
        raise DataError(f"mixture part {lacking!r} has no weight, others have; give a weight to all parts or to none")
    return weights
