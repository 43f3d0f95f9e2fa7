"""Label maps as dense protocols need them: at another size, counted by patch, and the majority of a data set.

Not here: reading them (`evaluation.data`), heads on tokens (`evaluation.protocols.linear_maps`).

Legend: S... label map (H, W) or (X, Y, Z), (h, w) patch grid, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from evaluation.data import IGNORED, LabelMaps
from evaluation.metrics import confusion_matrix

__all__ = ["MajorityMap", "nearest", "patch_counts", "small"]


Value = TypeVar("Value", bound=np.generic)


def nearest(labels: npt.NDArray[Value], size: Sequence[int]) -> npt.NDArray[Value]:
    """A map at another size by nearest pixel or voxel; the same map when the size fits."""
    places = [(np.arange(target) * source) // target for target, source in zip(size, labels.shape, strict=True)]
    return labels[np.ix_(*places)]


def small(maps: Sequence[npt.NDArray[np.int64]], most_px: int) -> Tensor:
    """Label maps as one array (n, h, w) int32 by nearest pixel, all of the size of the first.

    Args:
        maps: (H, W) each, one at least; those of another size lie over the whole input as well.
        most_px: of the longer side; a first map with fewer pixels keeps its size.
    """
    shape = maps[0].shape
    scale = min(1.0, most_px / max(shape))
    size = [max(1, round(side * scale)) for side in shape]
    return torch.from_numpy(np.stack([nearest(labels, size) for labels in maps]).astype(np.int32))


def patch_counts(labels: npt.NDArray[np.int64], grid: Sequence[int], num_classes: int) -> Tensor:
    """How many pixels of each class a patch has, and how many that are ignored.

    Args:
        labels: (H, W), `IGNORED` where ignored. A map that is smaller than the grid is enlarged first. A pixel on the
            border of two patches counts in the one that has its center.
        grid: (h, w).

    Returns:
        (h, w, 1 + C) int64, the ignored ones first.
    """
    labels = nearest(labels, [max(side, cells) for side, cells in zip(labels.shape, grid, strict=True)])
    row, column = (
        ((2 * np.arange(side) + 1) * cells) // (2 * side) for side, cells in zip(labels.shape, grid, strict=True)
    )
    patch = row[:, None] * grid[1] + column[None, :]  # (H, W)
    slots = 1 + num_classes
    counted = np.bincount((patch * slots + labels - IGNORED).ravel(), minlength=grid[0] * grid[1] * slots)
    return torch.from_numpy(counted).view(*grid, slots)


class MajorityMap:
    """The most frequent class per position over label maps: what is known without a look at any image."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        self._counts: npt.NDArray[np.int32] | None = None  # (C, S...)

    def add(self, labels: npt.NDArray[np.int64]) -> None:
        """Count a map (S...); those of another size are brought to the size of the first."""
        if self._counts is None:
            self._counts = np.zeros((self._num_classes, *labels.shape), np.int32)
        at_size = nearest(labels, self._counts.shape[1:])
        where = np.nonzero(at_size != IGNORED)
        self._counts[(at_size[where], *where)] += 1

    def at(self, size: Sequence[int]) -> npt.NDArray[np.int64]:
        """The classes (S...) at a size; class 0 where all was ignored. At least one map was added."""
        assert self._counts is not None
        return nearest(self._counts.argmax(axis=0), size)

    def tested(self, maps: LabelMaps) -> tuple[Tensor, list[str | None]]:
        """Confusion of the majorities with the labels that a head is to be tested on, and the sequences of these.

        Ask for it before anything is trained: labels that cannot be read, or are none of the classes, end it here.

        Returns:
            (n, C, C) int64 of the n maps, and a name or None of each.

        Raises:
            EvaluationError, DataError: As `LabelMaps.read`.
        """
        counts, sequences = [], []
        for sample_idx in range(len(maps)):
            labels, sequence = maps.read(sample_idx)
            prior, truth = (torch.from_numpy(values).flatten() for values in (self.at(labels.shape), labels))
            counts.append(confusion_matrix(prior, truth, self._num_classes))
            sequences.append(sequence)
        return torch.stack(counts), sequences
