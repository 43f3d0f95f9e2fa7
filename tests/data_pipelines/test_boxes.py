"""Which part of the world is fitted."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.radiance.boxes import Box, choose_box, fitting_shape
from data_pipelines.radiance.cameras import Camera
from data_pipelines.radiance.settings import FitSettings
from tests.analytic_scene import photographs

AUTO = FitSettings()
LENS = (100, 80, 125.0, 125.0, 50.0, 40.0)
INWARD = [Camera(*LENS, photo.opengl) for photo in photographs(12, size=8)]


def outward() -> list[Camera]:
    """Cameras in a room of 4 x 2 x 1, each looking away from the middle."""
    cameras = []
    for photo, place in zip(photographs(12, size=8), np.random.default_rng(0).uniform(-1, 1, (12, 3)), strict=True):
        pose = photo.opengl @ np.diag([-1.0, 1, -1, 1])
        pose[:3, 3] = place * (2, 1, 0.5)
        cameras.append(Camera(*LENS, pose))
    return cameras


def test_choose_box__a_declared_bound_wins() -> None:
    box = choose_box(INWARD, FitSettings(bound=1.2), np.zeros((99, 3)), "a")
    assert box.rule == "bound" and box.low.tolist() == [-1.2] * 3 and box.high.tolist() == [1.2] * 3
    box = choose_box(INWARD, FitSettings(box=(0, -1, 2, 3, 4, 5)), np.zeros((99, 3)), "a")
    assert box.rule == "box" and box.low.tolist() == [0, -1, 2] and box.high.tolist() == [3, 4, 5]


def test_choose_box__around_what_the_cameras_look_at() -> None:
    box = choose_box(INWARD, AUTO, None, "a")
    radius = 4 * np.sin(np.arctan(40 / 125))  # of the ball that each sees whole: 4 away, 80 pixels high
    assert box.rule == "object"
    np.testing.assert_allclose([box.low, box.high], [[-radius] * 3, [radius] * 3], atol=1e-9)


def test_choose_box__around_the_cameras_of_a_room() -> None:
    cameras = outward()
    box = choose_box(cameras, AUTO, None, "a")
    positions = np.array([camera.position for camera in cameras])
    extent = positions.max(0) - positions.min(0)
    assert box.rule == "cameras"
    np.testing.assert_allclose(box.low, positions.min(0) - 0.1 * extent)
    np.testing.assert_allclose(box.high, positions.max(0) + 0.1 * extent)


def test_choose_box__around_points_without_the_outermost() -> None:
    points = np.random.default_rng(0).uniform(0, 1, (1000, 3)) * (1, 2, 3)
    points[0] = 1000
    box = choose_box(INWARD, AUTO, points, "a")
    assert box.rule == "points"
    np.testing.assert_allclose(box.high, [1.09, 2.18, 3.27], atol=0.05)


def test_choose_box__cameras_that_say_too_little_are_refused() -> None:
    with pytest.raises(DataError, match=r"a: the box of its cameras is flat .*declare the part to fit with --bound"):
        choose_box([Camera(*LENS, np.eye(4)), Camera(*LENS, np.diag([-1.0, 1, -1, 1]))], AUTO, None, "a")


def test_fitting_shape__cubic_voxels_and_even_sides() -> None:
    box, shape = fitting_shape(Box(np.array([0.0, 0, 0]), np.array([4.0, 2, 1]), "points"), 64)
    assert shape == (64, 34, 18)
    voxels = (box.high - box.low) / (np.array(shape) - 1)
    np.testing.assert_allclose(voxels, 4 / 63)
    np.testing.assert_allclose((box.low + box.high) / 2, [2, 1, 0.5])
    assert (box.low <= 0).all() and (box.high >= [4, 2, 1]).all()
    assert fitting_shape(Box(np.full(3, -1.0), np.full(3, 1.0), "bound"), 33)[1] == (33, 33, 33)
