"""Pinhole cameras: which ray belongs to a pixel, which pixel to a point.

One convention inside this room, that of OpenGL, Blender and NeRF (Mildenhall et al. 2020): a pose is camera-to-world,
the camera's x axis points right in the picture, y up, and it looks along -z. Readers turn what they find into it.
Pixel (column i, row j) has its center at (i + 0.5, j + 0.5), so a picture of width W spans 0..W.

Not here: files that describe cameras (`transforms`, `colmap`, `scenes`), rays of many pixels at once (`rays`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError

__all__ = ["Camera", "as_pose", "focal_of_angle", "nearest_up", "up_turn"]

_ROTATION_TOLERANCE = 1e-3
_FLIP_YZ = np.diag([1.0, -1.0, -1.0, 1.0])  # between axes of OpenCV (y down, looks along +z) and OpenGL

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Camera:
    """A pinhole and where it stands; lengths in pixels, without distortion."""

    width: int
    height: int
    fx: float
    fy: float
    cx: float  # of the point straight ahead, from the left edge
    cy: float  # from the upper edge
    pose: Array  # (4, 4) camera-to-world, OpenGL axes

    @property
    def position(self) -> Array:
        """(3,) in the world."""
        return self.pose[:3, 3]

    @property
    def ahead(self) -> Array:
        """(3,) unit vector that the camera looks along."""
        return -self.pose[:3, 2]

    @property
    def half_angle(self) -> float:
        """Half the smaller angle of view, radians."""
        return math.atan(min(self.width / self.fx, self.height / self.fy) / 2)

    def project(self, points: Array) -> tuple[Array, Array]:
        """Where points (n, 3) of the world appear: (n, 2) column and row in pixels, and (n,) depth along `ahead`."""
        x, y, z = ((points - self.position) @ self.pose[:3, :3]).T
        with np.errstate(divide="ignore", invalid="ignore"):
            column, row = self.cx - self.fx * x / z, self.cy + self.fy * y / z
        return np.stack([column, row], axis=1), -z

    def sees(self, point: Array) -> bool:
        """Whether a point (3,) lies in front of the camera and inside the picture."""
        (pixel,), (depth,) = self.project(point[None])
        return bool(depth > 0 and 0 <= pixel[0] <= self.width and 0 <= pixel[1] <= self.height)

    def resized(self, width: int, height: int) -> Camera:
        """The camera of the same picture with other pixels."""
        across, down = width / self.width, height / self.height
        fx, cx, fy, cy = self.fx * across, self.cx * across, self.fy * down, self.cy * down
        return Camera(width, height, fx, fy, cx, cy, self.pose)

    def turned(self, rotation: Array) -> Camera:
        """The camera in a world turned by `rotation` (3, 3) about its origin."""
        pose = self.pose.copy()
        pose[:3] = rotation @ pose[:3]
        return replace(self, pose=pose)


def focal_of_angle(angle: float, width: int) -> float:
    """Focal length in pixels of a horizontal angle of view in radians."""
    return 0.5 * width / math.tan(0.5 * angle)


def as_pose(values: Any, axes: str, where: str) -> Array:
    """A camera-to-world matrix in OpenGL axes from numbers of a file.

    Args:
        values: (4, 4), or (3, 4) without the last row.
        axes: of the camera, one of `settings.AXES`.
        where: file and frame, for the message.

    Raises:
        DataError: not such a matrix, or its rotation is none (scaled, mirrored).
    """
    try:
        pose = np.asarray(values, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{where}: the pose is no matrix of numbers; give 4 rows of 4 numbers") from None
    if pose.shape == (3, 4):
        pose = np.vstack([pose, [0.0, 0.0, 0.0, 1.0]])
    if pose.shape != (4, 4) or not np.isfinite(pose).all():
        what = f"shape {pose.shape}" if pose.shape != (4, 4) else "numbers that are not finite"
        raise DataError(f"{where}: the pose has {what}; give a camera-to-world matrix of 4 rows of 4 numbers")
    if not np.allclose(pose[3], (0, 0, 0, 1), atol=1e-6):
        raise DataError(
            f"{where}: the last row of the pose is {_shown(pose[3])}; in a camera-to-world matrix it is 0 0 0 1"
        )
    rotation = pose[:3, :3]
    determinant = float(np.linalg.det(rotation))
    if abs(determinant - 1) > _ROTATION_TOLERANCE:
        raise DataError(
            f"{where}: the rotation of the pose has the determinant {determinant:.4g}, that of a rotation is 1 within "
            f"{_ROTATION_TOLERANCE}; write it without scale, and without mirrored axes"
        )
    if not np.allclose(rotation.T @ rotation, np.eye(3), atol=10 * _ROTATION_TOLERANCE):
        raise DataError(f"{where}: the axes of the pose are not at right angles; write a rotation, without shear")
    return pose @ _FLIP_YZ if axes == "opencv" else pose


def nearest_up(cameras: Sequence[Camera]) -> str:
    """The axis of the world, `z` or `-y` and the like, that the upper edges of the pictures point to on average."""
    mean = np.mean([camera.pose[:3, 1] for camera in cameras], axis=0)
    axis = int(np.abs(mean).argmax())
    return f"{'-' if mean[axis] < 0 else ''}{'xyz'[axis]}"


def up_turn(up: str) -> Array:
    """(3, 3) the rotation by whole quarter turns that brings the axis `up`, such as `-y`, to +z."""
    axis, sign = "xyz".index(up[-1]), -1.0 if up.startswith("-") else 1.0
    turn = np.zeros((3, 3))
    turn[2, axis] = sign
    turn[0, (axis + 1) % 3] = 1.0
    turn[1, (axis + 2) % 3] = sign  # keeps the determinant at 1
    return turn


def _shown(values: Array) -> str:
    return " ".join(f"{value:g}" for value in values)
