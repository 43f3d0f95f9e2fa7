"""Point clouds to fixed numbers of points: chosen, normalised and moved at random, in the loader worker.

A view of kind `points` reads an array (N, 3 + F) of positions and features and gives float32 (num_points, 3 +
features). Steps, in this order: choose points; centre and scale into the unit sphere; rotate; scale; translate; jitter;
drop.
Point-MAE's pretraining (Pang et al. 2022) is `normalize: unit_sphere, scale: [0.667, 1.5], translate: 0.2`.

Not here: grouping into patches, and masks over the groups (objectives, on the device).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipelines.errors import DataError
from data_pipelines.field_kinds import INPUT_FIELDS
from data_pipelines.order import permutation
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import (
    is_number,
    is_range,
    refuse,
    require_choice,
    require_count,
    require_integers,
    require_probabilities,
)
from data_pipelines.views.base import ARRAY_FIELDS, ArrayReading, Reading, View

__all__ = ["PointsView", "choose_points", "farthest_points", "random_rotation", "shape_in_float32"]

Cloud = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

_CHOICES = ("random", "replace", "farthest")
_NORMALIZATIONS = ("none", "unit_sphere")
_ROTATIONS = ("none", "x", "y", "z", "any")
_JITTER_LIMIT = 5.0  # standard deviations
# Steps of the stored type that a cloud spans at least: with fewer its points lie on a visible lattice.
_LEAST_STEPS = 64
_FINE_STEPS = 1 << 12  # of float32: a cloud of a wide type that spans fewer is shifted to its mean
_SMALL_TYPES = ("float16", "float32", "int8", "uint8", "int16", "uint16", "bool")  # whose values float32 holds exactly


@dataclass(frozen=True)
class PointsView(View):
    """One kind of cloud.

    Attributes:
        name: entry of the batch.
        num_points: points of the result.
        count: clouds of this kind per sample, which get a first dimension; without it there is one cloud and none.
        field: npy or npz to read.
        array: which array of an npz.
        min_points: a cloud with fewer is refused.
        features: columns behind the three of the position to keep; never changed, also not by a rotation.
        choose: `random` without replacement (of a smaller cloud every point, and some again), `replace`, or
            `farthest`: farthest-point sampling from a random start.
        normalize: `none`, or `unit_sphere`: subtract the mean, divide by the largest distance to it.
        rotate: about axis `x`, `y` or `z`, `any` (all rotations equally likely), or `none`.
        scale: least and greatest factor.
        per_axis: a factor for each axis (as Point-MAE) instead of one for all.
        translate: the cloud moves by up to this along each axis.
        jitter: standard deviation of Gaussian noise on each coordinate, cut off at five times that.
        drop: up to this share of the points, drawn anew for each cloud, is replaced by the first point.
    """

    kind: ClassVar[str] = "points"

    num_points: int
    count: int | None = None
    field: str | None = None
    array: str | None = None
    min_points: int = 1
    features: int = 0
    choose: str = "random"
    normalize: str = "none"
    rotate: str = "none"
    scale: tuple[float, float] = (1.0, 1.0)
    per_axis: bool = True
    translate: float = 0.0
    jitter: float = 0.0
    drop: float = 0.0

    @property
    def extent(self) -> str:
        return f"{self.num_points} points"

    def reads(self, fields: frozenset[str]) -> Reading:
        field = self.chosen_field(self.field, INPUT_FIELDS["points"], fields)
        self.require_suffix(field, ARRAY_FIELDS)
        return ArrayReading(field, self.array)

    def shapes(self, channels: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {self.name: ((self.num_points, 3 + self.features), torch.float32)}

    def entries(self, content: npt.NDArray[Any], rng: ViewRandom, drawn: None) -> dict[str, Tensor]:
        return {self.name: self.stacked([self.make(content, rng) for _ in range(self.count or 1)])}

    def _check(self, where: str) -> None:
        require_integers(where, 1, num_points=self.num_points, min_points=self.min_points)
        require_count(where, self.count)
        require_integers(where, 0, features=self.features)
        require_choice(where, "choose", self.choose, _CHOICES)
        require_choice(where, "normalize", self.normalize, _NORMALIZATIONS)
        require_choice(where, "rotate", self.rotate, _ROTATIONS)
        require_probabilities(where, drop=self.drop)
        if not is_range(self.scale) or self.scale[0] <= 0:
            refuse(where, "scale", self.scale, "[low, high] with 0 < low <= high")
        for key, value in (("translate", self.translate), ("jitter", self.jitter)):
            if not is_number(value) or not 0 <= value < math.inf:
                refuse(where, key, value, "a number from 0")

    def make(self, values: npt.NDArray[Any], rng: ViewRandom) -> Cloud:
        """One cloud.

        Args:
            values: (N, at least 3 + features) numbers.
            rng: advanced by the draws made.

        Returns:
            (num_points, 3 + features) float32.

        Raises:
            DataError: another shape, too few points, a position that is not finite, or no extent to normalize.
        """
        if values.ndim != 2 or values.shape[1] < 3 + self.features:
            raise DataError(f"array of shape {values.shape} is no cloud (N, {3 + self.features} or more columns)")
        if len(values) < self.min_points:
            raise DataError(f"the cloud has {len(values)} points; {self.min_points} or more are needed")
        with np.errstate(over="ignore"):  # what overflows float32 is reported as not finite
            cloud = values[:, : 3 + self.features].astype(np.float32)
        if self.normalize == "unit_sphere":
            cloud[:, :3] = shape_in_float32(values[:, :3])
        if not np.isfinite(cloud).all():
            raise DataError(
                f"the cloud has {'features' if np.isfinite(cloud[:, :3]).all() else 'positions'} that are not finite"
            )
        cloud = cloud[choose_points(cloud[:, :3], self.num_points, self.choose, rng)]
        cloud[:, :3] = self._moved(cloud[:, :3], rng)
        if self.drop:
            num_dropped = int(rng.uniform(0.0, self.drop) * len(cloud))
            cloud[permutation(len(cloud), rng.below(1 << 64))[:num_dropped]] = cloud[0]
        return cloud

    def _moved(self, xyz: Cloud, rng: ViewRandom) -> Cloud:
        if self.normalize == "unit_sphere":
            xyz = xyz - xyz.mean(0)
            radius = math.sqrt((xyz**2).sum(1).max())
            xyz = xyz / np.float32(max(radius, 1e-9))  # points chosen of one place stay at the origin
        if self.rotate != "none":
            xyz = xyz @ random_rotation(self.rotate, rng).T
        if self.scale != (1.0, 1.0):
            xyz = xyz * np.array([rng.uniform(*self.scale) for _ in range(3 if self.per_axis else 1)], np.float32)
        if self.translate:
            xyz = xyz + np.array([rng.uniform(-self.translate, self.translate) for _ in range(3)], np.float32)
        if self.jitter:
            noise = torch.randn(xyz.shape, generator=rng.generator()).clamp_(-_JITTER_LIMIT, _JITTER_LIMIT)
            xyz = xyz + (self.jitter * noise).numpy()
        return xyz


def shape_in_float32(xyz: npt.NDArray[Any]) -> Cloud:
    """The positions of a cloud in float32, up to a shift and a factor, so that its shape survives normalization.

    The factor is a power of two, which changes no digit: squares of the largest numbers would overflow. Wide types are
    shifted to their mean where coordinates, as those of a map, have few digits left for the shape in float32.

    Args:
        xyz: (N, 3) numbers.

    Raises:
        DataError: a number is not finite, all points are at one place, or the stored type has too few digits for the
            shape so far from the origin.
    """
    wide = xyz.astype(np.float64)
    if not np.isfinite(wide).all():
        raise DataError("the cloud has positions that are not finite")
    exponent = int(np.frexp(np.abs(wide).max())[1])
    wide = np.ldexp(wide, -exponent)  # in [-1, 1]
    extent = float((wide.max(0) - wide.min(0)).max())
    step = float(np.finfo(xyz.dtype).eps) if xyz.dtype.kind == "f" else 0.0
    if extent <= 0:
        raise DataError(f"all {len(xyz)} points of the cloud are at one place; leave it out")
    if extent < _LEAST_STEPS * step:
        raise DataError(
            f"the cloud is {extent / step:.0f} steps of {xyz.dtype} wide, so far from the origin does it lie; subtract "
            "an offset before it is stored, or store float64"
        )
    if xyz.dtype.name not in _SMALL_TYPES and extent < _FINE_STEPS * np.finfo(np.float32).eps:
        wide = wide - wide.mean(0)
        wide = np.ldexp(wide, -int(np.frexp(np.abs(wide).max())[1]))
    return wide.astype(np.float32)


def choose_points(xyz: Cloud, num_points: int, how: str, rng: ViewRandom) -> Ids:
    """Indices (num_points,) into a cloud (N, 3); `how` as in `PointsView.choose`."""
    if how == "farthest" and num_points <= len(xyz):
        return farthest_points(xyz, num_points, rng.below(len(xyz)))
    if how == "replace":
        return np.array([rng.below(len(xyz)) for _ in range(num_points)])
    rounds = -(-num_points // len(xyz))  # more than one for a cloud with too few points
    chosen = [permutation(len(xyz), rng.below(1 << 64)) for _ in range(rounds)]
    return np.concatenate(chosen)[:num_points]


def farthest_points(xyz: Cloud, num_points: int, first: int) -> Ids:
    """Indices (num_points,): each next point is the one farthest from all before it; N * num_points distances."""
    columns = np.ascontiguousarray(xyz.T)  # (3, N): three long rows are faster than N short ones
    chosen = np.empty(num_points, np.int64)
    nearest = np.full(len(xyz), np.inf, np.float32)
    for i in range(num_points):
        chosen[i] = first
        away = columns - columns[:, first, None]
        np.minimum(nearest, np.einsum("cn,cn->n", away, away), out=nearest)
        first = int(nearest.argmax())
    return chosen


def random_rotation(axis: str, rng: ViewRandom) -> npt.NDArray[np.float32]:
    """(3, 3) rotation by a uniform angle about `x`, `y` or `z`, or uniform over all rotations for `any`."""
    if axis == "any":  # a uniform unit quaternion, Shoemake 1992
        share, first, second = rng.uniform(0, 1), rng.uniform(0, 2 * math.pi), rng.uniform(0, 2 * math.pi)
        a, b = math.sqrt(1 - share), math.sqrt(share)
        x, y, z, w = a * math.sin(first), a * math.cos(first), b * math.sin(second), b * math.cos(second)
    else:
        half = rng.uniform(0, math.pi)
        x, y, z = (math.sin(half) if name == axis else 0.0 for name in "xyz")
        w = math.cos(half)
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ],
        np.float32,
    )
