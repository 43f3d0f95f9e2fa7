"""Several data sets read side by side: every sample of the stream is one of each.

What an objective of two kinds of data needs that trains on both in each step, such as images and volumes that have
nothing to do with each other. Each part runs through epochs and an order of its own; an epoch of the whole is one of
the largest part. So it is a pure function of the position like the order of one data set (`order`), and resumes at any
position as exactly.

A sample id is one number for the samples of all parts: of parts of N_0, N_1, ... samples, (i_0 N_1 + i_1) N_2 ...

Not here: data sets of which each sample is of one (`mixture`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import under_shared_names
from data_pipelines.order import Ids, SampleOrder
from data_pipelines.purposes import Purpose
from data_pipelines.shards.dataset import first_field
from data_pipelines.streaming.mixture import Part, Parts

__all__ = ["Joined", "JoinedOrder"]

_MOST_IDS = 2**62


class Joined(Parts):
    """Parts of which each sample has one of each. It is read like a `Dataset`.

    Fields of a sample are those of all parts; one that several have is that of the first of these.

    Args:
        parts: at least one; their weights and repeats are not used.

    Raises:
        DataError: no part, a name used twice, or more combinations than there are numbers for.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__(parts)
        names = [part.name for part in self.parts]
        if not names or len(set(names)) < len(names):
            raise DataError(f"joined parts ({', '.join(names)}): give at least one, each with a name of its own")
        sizes = [part.dataset.num_samples for part in self.parts]
        if math.prod(sizes) > _MOST_IDS:
            raise DataError(f"parts of {' x '.join(map(str, sizes))} samples are too many to be numbered together")
        self.fields: frozenset[str] = frozenset().union(*(part.dataset.fields for part in self.parts))
        self.num_samples = max(sizes)
        self._sizes = sizes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the content of the parts, in their order."""
        return self._digest(b"pretrain-joined 1\n")

    def read(self, sample_id: int) -> dict[str, Any]:
        """The fields of one sample of each part, see `Dataset.read`; `__key__` is that of the first."""
        sample: dict[str, Any] = {}
        for part, inside in self._located(sample_id):
            own = under_shared_names(part.dataset.read(inside), part.dataset.fields)
            sample = {**own, **sample}
        return sample

    def prefetch(self, sample_ids: Iterable[int]) -> None:
        """Have remote samples fetched together, see `Dataset.prefetch`."""
        located = [self._located(sample_id) for sample_id in sample_ids]
        for number, part in enumerate(self.parts):
            part.dataset.prefetch([one[number][1] for one in located])

    def where(self, sample_id: int) -> str:
        """Part, shard and key of the samples of all parts, as error messages name them."""
        return " with ".join(f"{part.name}: {part.dataset.where(inside)}" for part, inside in self._located(sample_id))

    def require_field(self, *candidates: str) -> str:
        """The first of `candidates` that every sample has.

        Raises:
            DataError: there is none; names what there is.
        """
        return first_field(candidates, self.fields, " with ".join(part.name for part in self.parts))

    def sample_order(self, *, seed: int, block_size: int, window: int, num_streams: int) -> JoinedOrder:
        """Global positions -> (epochs of the largest part, sample ids)."""
        layout = {"block_size": block_size, "window": window, "num_streams": num_streams}
        return JoinedOrder(self._orders(Purpose.SIDE, seed, layout), self._sizes)

    def _located(self, sample_id: int) -> list[tuple[Part, int]]:
        """Each part with the id of its sample."""
        inside = []
        for size in reversed(self._sizes):
            sample_id, own = divmod(sample_id, size)
            inside.append(own)
        return list(zip(self.parts, reversed(inside), strict=True))


class JoinedOrder:
    """Global position -> (epoch of the largest part, sample id).

    Args:
        orders: of each part.
        sizes: samples of each part.
    """

    def __init__(self, orders: Sequence[SampleOrder], sizes: Sequence[int]) -> None:
        self._orders, self._sizes = tuple(orders), tuple(sizes)
        self._largest = max(range(len(sizes)), key=lambda number: sizes[number])

    def __call__(self, positions: Iterable[int] | Ids) -> tuple[Ids, Ids]:
        """Epochs and sample ids, both of the length of `positions`."""
        places = np.asarray(positions, np.int64)
        epochs, ids = np.empty_like(places), np.zeros_like(places)
        for number, (order, size) in enumerate(zip(self._orders, self._sizes, strict=True)):
            own_epochs, own = order(places)
            ids = ids * size + own
            if number == self._largest:
                epochs = own_epochs
        return epochs, ids
