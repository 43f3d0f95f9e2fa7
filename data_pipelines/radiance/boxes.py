"""Which part of the world is fitted: a box around the object, or around the cameras of a room.

The rules, of which the first that applies holds: a bound or a box that the user declares; for a COLMAP model with
points, the box of their 1st to 99th percentiles; for cameras that look at one place, the cube around the largest ball
there that half of them see whole; else the box of the cameras' positions. Boxes of points and of cameras are made 10 %
longer at either end, as in the extraction of NeRF-RPN (Hu et al. 2023).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError
from data_pipelines.radiance.cameras import Camera
from data_pipelines.radiance.settings import FitSettings

__all__ = ["Box", "choose_box", "fitting_shape"]

_MARGIN = 0.1  # of the length, at either end
_LOOK_INWARD = 0.8  # share of the cameras that see the place nearest to all of their axes
_PERCENTILES = (1, 99)
_MIN_POINTS = 50

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Box:
    """Corners (3,) in the world with z up.

    Attributes:
        rule: they come from: `bound`, `box`, `points`, `object` or `cameras`.
    """

    low: Array
    high: Array
    rule: str


def choose_box(cameras: Sequence[Camera], settings: FitSettings, points: Array | None, where: str) -> Box:
    """The box to fit.

    Args:
        settings: whose `bound` or `box`, if there is one, decides.
        points: (n, 3) on surfaces of the scene.

    Raises:
        DataError: The cameras say too little.
    """
    if settings.bound is not None:
        return Box(np.full(3, -settings.bound), np.full(3, settings.bound), "bound")
    if settings.box is not None:
        return Box(np.array(settings.box[:3]), np.array(settings.box[3:]), "box")
    if points is not None and len(points) >= _MIN_POINTS:
        low, high = np.percentile(points, _PERCENTILES, axis=0)
        return _enlarged(low, high, "points", where)
    focus = _focus(cameras)
    if np.mean([camera.sees(focus) for camera in cameras]) >= _LOOK_INWARD:
        seen = [float(np.linalg.norm(camera.position - focus)) * math.sin(camera.half_angle) for camera in cameras]
        half = float(np.median(seen))  # the radius of the ball that a camera sees whole
        return Box(focus - half, focus + half, "object")
    positions = np.array([camera.position for camera in cameras])
    return _enlarged(positions.min(axis=0), positions.max(axis=0), "cameras", where)


def fitting_shape(box: Box, resolution: int) -> tuple[Box, tuple[int, int, int]]:
    """A grid of cubic voxels over a box: `resolution` nodes along its longest side, an even number along the others.

    The outermost nodes lie on the faces of the box that is returned, which is up to two voxels longer than the given
    one along the shorter sides.
    """
    extent = box.high - box.low
    voxel = extent.max() / (resolution - 1)
    nodes = np.ceil(extent / voxel - 1e-6).astype(int) + 1
    nodes = np.minimum(nodes + nodes % 2, resolution + resolution % 2)
    nodes[extent >= extent.max() * (1 - 1e-9)] = resolution
    center, half = (box.low + box.high) / 2, (nodes - 1) * voxel / 2
    x, y, z = (int(count) for count in nodes)
    return Box(center - half, center + half, box.rule), (x, y, z)


def _focus(cameras: Sequence[Camera]) -> Array:
    """(3,) the point with the least sum of squared distances to the cameras' axes."""
    across = [np.eye(3) - np.outer(camera.ahead, camera.ahead) for camera in cameras]
    towards = sum(projector @ camera.position for projector, camera in zip(across, cameras, strict=True))
    return np.asarray(np.linalg.lstsq(sum(across, np.zeros((3, 3))), towards, rcond=1e-6)[0], np.float64)


def _enlarged(low: Array, high: Array, rule: str, where: str) -> Box:
    extent = high - low
    if not extent.max() > 0 or extent.min() < 0.02 * extent.max():
        shown = " x ".join(f"{length:.3g}" for length in extent)
        raise DataError(
            f"{where}: the box of its {rule} is flat ({shown}); declare the part to fit with --bound or --box"
        )
    return Box(low - _MARGIN * extent, high + _MARGIN * extent, rule)
