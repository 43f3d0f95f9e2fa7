"""Volumes and voxel grids: turned, mirrored and cut to one size at random, in the loader worker.

A view of kind `volume` reads an array (X, Y, Z) or (C, X, Y, Z) and gives (C, *size). Axes are numbered as stored.
Steps: a quarter turn, mirrors, then each axis is cut at random where it is longer than asked for and padded at its high
end where it is shorter. Values are never resampled, so class ids keep their meaning. NeRF-MAE's augmentation (Irshad et
al. 2024) is `flip: [0.5, 0.5, 0], turn: 0.5`: all symmetries of a square in the plane of axes 0 and 1.

Not here: masks over voxel patches (objectives, on the device).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import INPUT_FIELDS
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import is_number, is_range, refuse, require_count, require_integers, require_probabilities
from data_pipelines.views.base import ARRAY_FIELDS, ArrayReading, Decoding, Reading, View

__all__ = ["Placement", "VolumeView", "as_volume"]

Array = npt.NDArray[Any]

_TOLERANCE = 1e-3  # by which rounding may leave the unit interval


class Placement(NamedTuple):
    """Which part of a volume is shown, and how it is turned: shared by the views of one sample that belong together."""

    shape: tuple[int, ...]  # (X, Y, Z) of the volume it was drawn for
    turned_shape: tuple[int, ...]
    is_turned: bool
    flipped_axes: tuple[int, ...]
    start: tuple[int, ...]  # first voxel of the cut, after turn and mirrors


@dataclass(frozen=True)
class VolumeReading(ArrayReading):
    """An array (X, Y, Z) or (C, X, Y, Z)."""

    def decode(self, data: bytes, decoding: Decoding) -> Array:
        return as_volume(super().decode(data, decoding))


@dataclass(frozen=True)
class VolumeView(View):
    """One kind of volume.

    Attributes:
        name: entry of the batch.
        size: voxels along each axis of the result.
        count: cuts of this kind per sample, which get a first dimension; without it there is one cut and none.
        field: npy or npz to read.
        array: which array of an npz.
        flip: probability of a mirror along each axis.
        turn: probability of a quarter turn.
        plane: the two axes of the turn.
        window: values [low, high] that become 0 and 1, clipped, as float32; without it values and type stay.
        fill: value of padding, in units of the result.
        same_crop_as: an earlier volume view whose turns and cuts this one shows too (of labels, say); its count, flip,
            turn and plane hold here.
        unit_channels: this many channels, from the first, hold values in [0, 1], or bytes; others are refused.
        return_size: also give `<name>.size`, int64 (3,): voxels along each axis that are not padding.
    """

    kind: ClassVar[str] = "volume"
    relations: ClassVar[tuple[str, ...]] = ("same_crop_as",)
    led_keys: ClassVar[tuple[str, ...]] = ("count", "flip", "turn", "plane")

    size: tuple[int, int, int]
    count: int | None = None
    field: str | None = None
    array: str | None = None
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    turn: float = 0.0
    plane: tuple[int, int] = (0, 1)
    window: tuple[float, float] | None = None
    fill: float = 0.0
    same_crop_as: str | None = None
    unit_channels: int = 0
    return_size: bool = False

    @property
    def extent(self) -> str:
        return f"{' x '.join(map(str, self.size))} voxels"

    def reads(self, fields: frozenset[str]) -> Reading:
        field = self.chosen_field(self.field, INPUT_FIELDS["volume"], fields)
        self.require_suffix(field, ARRAY_FIELDS)
        return VolumeReading(field, self.array)

    def shapes(self, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Without a window, types are those of the data: then as the widest of them, 32 bits."""
        shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {self.name: ((channels, *self.size), torch.float32)}
        return shapes | ({f"{self.name}.size": ((3,), torch.int64)} if self.return_size else {})

    def draw(self, content: Array, rng: ViewRandom, led: Mapping[str, Any]) -> list[Placement]:
        if self.same_crop_as is not None:
            return list(led[self.same_crop_as])
        return [self.place(content.shape[1:], rng) for _ in range(self.count or 1)]

    def entries(self, content: Array, rng: ViewRandom, drawn: Sequence[Placement]) -> dict[str, Tensor]:
        entries = {self.name: self.stacked([self.cut(content, placement) for placement in drawn])}
        if self.return_size:
            entries[f"{self.name}.size"] = self.stacked(np.array([self.shown_size(placement) for placement in drawn]))
        return entries

    def require_leader(self, relation: str, leader: Self) -> None:
        super().require_leader(relation, leader)
        if self.size != leader.size:
            raise DataError(f"view {self.name!r}: size={self.size} differs from {leader.size} of {leader.name!r}")

    def _check(self, where: str) -> None:
        require_count(where, self.count)
        if not isinstance(self.size, tuple) or len(self.size) != 3:
            refuse(where, "size", self.size, "[voxels, voxels, voxels]")
        for side in self.size:
            require_integers(where, 1, size=side)
        require_integers(where, 0, unit_channels=self.unit_channels)
        if not isinstance(self.flip, tuple) or len(self.flip) != 3:
            refuse(where, "flip", self.flip, "a probability for each of three axes")
        for chance in self.flip:
            require_probabilities(where, flip=chance)
        require_probabilities(where, turn=self.turn)
        if self.plane not in ((0, 1), (0, 2), (1, 2)):
            refuse(where, "plane", self.plane, "[0, 1], [0, 2] or [1, 2]")
        if self.window is not None and not (is_range(self.window) and self.window[0] < self.window[1]):
            refuse(where, "window", self.window, "[low, high] with low < high")
        if not is_number(self.fill) or not -math.inf < self.fill < math.inf:
            refuse(where, "fill", self.fill, "a number")

    def place(self, shape: tuple[int, ...], rng: ViewRandom) -> Placement:
        """Draw what is shown of a volume.

        Args:
            shape: (X, Y, Z) of the volume.
            rng: advanced by the draws made.
        """
        is_turned = rng.uniform(0.0, 1.0) < self.turn
        flipped = tuple(axis for axis, chance in enumerate(self.flip) if rng.uniform(0.0, 1.0) < chance)
        turned = list(shape)
        if is_turned:
            first, second = self.plane
            turned[first], turned[second] = turned[second], turned[first]
        start = tuple(rng.below(max(0, have - want) + 1) for have, want in zip(turned, self.size, strict=True))
        return Placement(tuple(shape), tuple(turned), is_turned, flipped, start)

    def cut(self, volume: Array, placement: Placement) -> Array:
        """The part of a volume (C, X, Y, Z) that a placement shows.

        Returns:
            (C, *size), float32 with a window, else as stored.

        Raises:
            DataError: the placement was drawn for a volume of another shape, `fill` is no value of its type, or what
                is shown is not finite in float32 or not in the unit interval where it has to be.
        """
        if volume.shape[1:] != placement.shape:
            raise DataError(f"volume of shape {volume.shape[1:]} does not lie on the one of shape {placement.shape}")
        if placement.is_turned:
            first, second = (axis + 1 for axis in self.plane)
            volume = np.rot90(volume, axes=(first, second))
        volume = np.flip(volume, tuple(axis + 1 for axis in placement.flipped_axes))
        ranges = zip(placement.start, self.size, strict=True)
        part = volume[(slice(None), *(slice(start, start + length) for start, length in ranges))]
        self._require_values(part)
        if self.window is not None:
            low, high = self.window
            part = ((part.astype(np.float32) - low) / (high - low)).clip(0.0, 1.0)
        if part.dtype.kind in "iu" and not _fits(self.fill, part.dtype):
            raise DataError(f"fill={self.fill} is no value of type {part.dtype}; give another, or a window")
        out = np.full((len(volume), *self.size), self.fill, part.dtype)
        out[(slice(None), *map(slice, part.shape[1:]))] = part
        return out

    def _require_values(self, part: Array) -> None:
        if part.dtype.kind == "f":
            with np.errstate(over="ignore"):
                num_wrong = int((~np.isfinite(part.astype(np.float32, copy=False))).sum())
            if num_wrong:
                raise DataError(f"{num_wrong} of {part.size} voxels are not finite")
        unit = part[: self.unit_channels]
        if unit.size and unit.dtype != np.uint8 and not (unit.min() >= -_TOLERANCE and unit.max() <= 1 + _TOLERANCE):
            values = f"{unit.dtype} in [{unit.min():g}, {unit.max():g}]"
            what = f"its first {self.unit_channels} channels are {values}"
            raise DataError(f"{what}; they must be uint8, or numbers in [0, 1]")

    def shown_size(self, placement: Placement) -> list[int]:
        """Voxels along each axis of the result that are not padding."""
        return [min(have, want) for have, want in zip(placement.turned_shape, self.size, strict=True)]


def _fits(value: float, dtype: np.dtype[Any]) -> bool:
    limits = np.iinfo(dtype)
    return value == int(value) and limits.min <= value <= limits.max


def as_volume(values: Array) -> Array:
    """(C, X, Y, Z) of an array of three or four dimensions.

    Raises:
        DataError: another number of dimensions.
    """
    if values.ndim not in (3, 4):
        raise DataError(f"array of shape {values.shape} is no volume (X, Y, Z) or (C, X, Y, Z)")
    return values[None] if values.ndim == 3 else values
