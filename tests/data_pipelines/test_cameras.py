"""Pinhole cameras and their poses."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.radiance.cameras import Camera, as_pose, focal_of_angle, nearest_up, up_turn
from data_pipelines.radiance.settings import UPS
from tests.analytic_scene import photographs


def camera(pose: object = None) -> Camera:
    return Camera(40, 30, 50.0, 60.0, 21.0, 14.0, np.eye(4) if pose is None else np.asarray(pose, np.float64))


def test_project__looks_along_minus_z_with_y_up() -> None:
    pixels, depth = camera().project(np.array([[0.0, 0, -2], [0.4, 0, -2], [0, 0.5, -2], [0, 0, 2]]))
    assert depth.tolist() == [2, 2, 2, -2]
    np.testing.assert_allclose(pixels[:3], [[21, 14], [31, 14], [21, -1]])


def test_sees__in_front_and_inside_of_the_picture() -> None:
    assert camera().sees(np.array([0.0, 0, -1]))
    assert not camera().sees(np.array([0.0, 0, 1]))
    assert not camera().sees(np.array([1.0, 0, -1]))


def test_resized__a_point_keeps_its_place_in_the_picture() -> None:
    point = np.array([[0.2, -0.1, -3.0]])
    before, after = camera().project(point)[0], camera().resized(20, 10).project(point)[0]
    np.testing.assert_allclose(after, before * [20 / 40, 10 / 30])


def test_focal_of_angle__of_a_right_angle_is_half_the_width() -> None:
    assert focal_of_angle(np.pi / 2, 160) == pytest.approx(80)


@pytest.mark.parametrize("up", UPS[1:])
def test_up_turn__is_a_rotation_that_brings_the_axis_to_z(up: str) -> None:
    turn, axis = up_turn(up), np.zeros(3)
    axis["xyz".index(up[-1])] = -1 if up.startswith("-") else 1
    assert np.linalg.det(turn) == pytest.approx(1) and (turn @ axis).tolist() == [0, 0, 1]
    if up == "z":
        np.testing.assert_array_equal(turn, np.eye(3))


@pytest.mark.parametrize("up", UPS[1:])
def test_nearest_up__finds_the_axis_that_a_world_was_turned_to(up: str) -> None:
    level = [Camera(8, 8, 8, 8, 4, 4, photo.opengl) for photo in photographs(8, size=8)]
    assert nearest_up(level) == "z"
    assert nearest_up([one.turned(up_turn(up).T) for one in level]) == up


def test_turned__points_that_turn_as_well_stay_on_their_pixels() -> None:
    points = np.random.default_rng(0).normal(size=(5, 3))
    photo = photographs(1, size=8)[0]
    first = Camera(8, 8, 8, 8, 4, 4, photo.opengl)
    turn = up_turn("-y")
    np.testing.assert_allclose(first.turned(turn).project(points @ turn.T)[0], first.project(points)[0])


SCALED, MIRRORED, SHEARED = np.diag([2.0, 2, 2, 1]), np.diag([1.0, -1, 1, 1]), np.eye(4)
SHEARED[0, 1] = 0.1
WRONG = {
    "no matrix": ("up", "no matrix of numbers"),
    "shape": (np.eye(3), "the pose has shape (3, 3)"),
    "not finite": (np.full((4, 4), np.nan), "not finite"),
    "last row": (np.ones((4, 4)), "the last row of the pose is 1 1 1 1"),
    "scaled": (SCALED, "determinant 8, that of a rotation is 1 within 0.001"),
    "mirrored": (MIRRORED, "determinant -1,"),
    "sheared": (SHEARED, "not at right angles"),
}


@pytest.mark.parametrize("case", WRONG)
def test_as_pose__refuses_what_is_no_pose(case: str) -> None:
    values, said = WRONG[case]
    with pytest.raises(DataError) as refused:
        as_pose(values, "opengl", "a.json: frame 3")
    assert str(refused.value).startswith("a.json: frame 3: ") and said in str(refused.value)


def test_as_pose__without_last_row_and_in_axes_of_opencv() -> None:
    photo = photographs(1, size=8)[0]
    np.testing.assert_array_equal(as_pose(photo.opengl[:3].tolist(), "opengl", ""), photo.opengl)
    np.testing.assert_allclose(as_pose(photo.opencv, "opencv", ""), photo.opengl, atol=1e-15)
