"""Numbers about one field, collected sample by sample and added up over shards.

Every tally has `add(data)` for the bytes of one more member, `merge(other)` for the same field of another shard, and
`summary()` as plain data for JSON. Sums over 8 bit images and masks are whole numbers, hence exact; moments of arrays
are float64, combined with Chan, Golub and LeVeque's update, which does not lose digits to a large mean.

Legend: C channels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.decode import decode_arrays, decode_label, open_image
from data_pipelines.field_kinds import has_channels
from data_pipelines.fields import decode_field
from data_pipelines.pixel_sums import PixelSums

__all__ = ["ArrayTally", "ImageTally", "LabelTally", "MaskTally", "balance", "spread"]


def spread(values: Iterable[int]) -> dict[str, int]:
    """Quantiles of some whole numbers; each is one of the numbers."""
    quantiles = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}
    found = np.percentile(np.fromiter(values, np.int64), list(quantiles.values()), method="inverted_cdf")
    return dict(zip(quantiles, found.tolist(), strict=True))


def balance(counts: Sequence[int]) -> dict[str, Any]:
    """How evenly something is spread over classes: smallest and largest count, entropy and the most it could be."""
    total = sum(counts)
    shares = [count / total for count in counts if count]
    return {
        "min": min(counts),
        "max": max(counts),
        "entropy_bits": -sum(share * math.log2(share) for share in shares) + 0.0,  # no -0.0
        "entropy_bits_max": math.log2(len(counts)),
    }


@dataclass
class LabelTally:
    """How many samples each class has."""

    counts: Counter[int] = field(default_factory=Counter)

    def add(self, data: bytes) -> None:
        self.counts[decode_label(data)] += 1

    def merge(self, other: LabelTally) -> None:
        self.counts += other.counts

    def summary(self) -> dict[str, Any]:
        return {"classes": dict(sorted(self.counts.items()))}


@dataclass
class MaskTally:
    """How many pixels (or voxels) each class has, and the shapes of the masks."""

    counts: Counter[int] = field(default_factory=Counter)
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)

    def add(self, data: bytes) -> None:
        mask = decode_field("mask", data)
        self.counts.update(_histogram(mask))
        self.shapes[mask.shape] += 1

    def merge(self, other: MaskTally) -> None:
        self.counts += other.counts
        self.shapes += other.shapes

    def summary(self) -> dict[str, Any]:
        return {"shape": _axes(self.shapes), "classes": dict(sorted(self.counts.items()))}


def _histogram(mask: npt.NDArray[Any]) -> dict[int, int]:
    if mask.dtype in (np.uint8, np.uint16):  # counting is ten times as fast as the sort of `unique`
        found = np.bincount(mask.ravel())
        values = np.flatnonzero(found)
        counts = found[values]
    else:
        values, counts = np.unique(mask, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


@dataclass
class ImageTally:
    """Sizes of photos, mean and deviation of their values."""

    sizes: Counter[tuple[int, ...]] = field(default_factory=Counter)  # (width, height) -> images
    sums: PixelSums = field(default_factory=PixelSums)

    def add(self, data: bytes) -> None:
        image = open_image(data)
        self.sizes[image.size] += 1
        self.sums.add_image(image)

    def merge(self, other: ImageTally) -> None:
        self.sizes += other.sizes
        self.sums.add(other.sums)

    def summary(self) -> dict[str, Any]:
        width, height = _axes(self.sizes)
        sums = self.sums
        return {"width": width, "height": height, "pixels": sums.pixels, "mean": sums.mean, "std": sums.std}


def _axes(shapes: Counter[tuple[int, ...]]) -> list[dict[str, int]]:
    """Quantiles of the length of each axis; empty when the arrays do not have the same number of axes."""
    same_rank = len({len(shape) for shape in shapes}) == 1
    return [spread(axis) for axis in zip(*shapes.elements(), strict=True)] if same_rank else []


@dataclass
class _Moments:
    """Count, mean and sum of squared deviations per channel, non-finite values left out."""

    count: npt.NDArray[np.int64]  # (C,)
    mean: npt.NDArray[np.float64]  # (C,)
    squares: npt.NDArray[np.float64]  # (C,)

    @classmethod
    def of(cls, values: npt.NDArray[np.float64], is_finite: npt.NDArray[np.bool_]) -> _Moments:
        """Of (C, n) values."""
        count = is_finite.sum(axis=1)
        mean = np.where(is_finite, values, 0).sum(axis=1) / np.maximum(count, 1)
        deviation = np.where(is_finite, values - mean[:, None], 0)
        return cls(count, mean, (deviation * deviation).sum(axis=1))

    def merge(self, other: _Moments) -> None:
        count = self.count + other.count
        step = other.mean - self.mean
        share = other.count / np.maximum(count, 1)
        self.squares += other.squares + step * step * self.count * share
        self.mean += step * share
        self.count = count


@dataclass
class _Values:
    """One array per sample, such as `image` of an npz."""

    kind: str
    shapes: Counter[tuple[int, ...]] = field(default_factory=Counter)
    dtypes: Counter[str] = field(default_factory=Counter)
    moments: dict[int, _Moments] = field(default_factory=dict)  # number of channels -> of the arrays that have it
    least: float = math.inf
    most: float = -math.inf
    num_not_finite: int = 0

    def add(self, array: npt.NDArray[Any]) -> None:
        self.shapes[array.shape] += 1
        self.dtypes[str(array.dtype)] += 1
        if array.size == 0 or array.dtype.kind not in "biuf":
            return
        channels = array.shape[0] if has_channels(self.kind, array.shape) else 1
        values = array.reshape(channels, -1).astype(np.float64)  # (C, n)
        is_finite = np.isfinite(values)
        self.num_not_finite += int(values.size - is_finite.sum())
        if is_finite.any():
            self.least = min(self.least, float(values[is_finite].min()))
            self.most = max(self.most, float(values[is_finite].max()))
        self._merge_moments({len(values): _Moments.of(values, is_finite)})

    def merge(self, other: _Values) -> None:
        self.shapes += other.shapes
        self.dtypes += other.dtypes
        self.least, self.most = min(self.least, other.least), max(self.most, other.most)
        self.num_not_finite += other.num_not_finite
        self._merge_moments(other.moments)

    def _merge_moments(self, moments: dict[int, _Moments]) -> None:
        for channels, moment in moments.items():
            if channels in self.moments:
                self.moments[channels].merge(moment)
            else:
                self.moments[channels] = moment

    def summary(self) -> dict[str, Any]:
        found: dict[str, Any] = {"dtypes": sorted(self.dtypes), "shape": _axes(self.shapes)}
        if self.least <= self.most:
            moment = max(self.moments.values(), key=lambda moment: int(moment.count.sum()))
            std = np.sqrt(moment.squares / np.maximum(moment.count, 1))
            found |= {"min": self.least, "max": self.most, "mean": moment.mean.tolist(), "std": std.tolist()}
        return found | {"not_finite": self.num_not_finite}


@dataclass
class ArrayTally:
    """Shapes and values of arrays (an npz has several), depth maps, point clouds and volumes."""

    kind: str
    arrays: dict[str, _Values] = field(default_factory=dict)  # name inside the npz, "" for npy and depth

    def add(self, data: bytes) -> None:
        arrays = {"": decode_field("depth", data)} if self.kind == "depth" else decode_arrays(data)
        for name, array in arrays.items():
            self._of(name).add(array)

    def merge(self, other: ArrayTally) -> None:
        for name, values in other.arrays.items():
            self._of(name).merge(values)

    def _of(self, name: str) -> _Values:
        return self.arrays.setdefault(name, _Values(self.kind))

    def summary(self) -> dict[str, Any]:
        return {"arrays": {name: values.summary() for name, values in self.arrays.items()}}
