"""Clouds: the asked number of points, geometry that is what it says, the same for the same key."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipelines.decode import decode_array
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.views.kinds.points import (
    PointsView,
    choose_points,
    farthest_points,
    random_rotation,
    shape_in_float32,
)
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.specs import views_from


@pytest.fixture
def cloud() -> np.ndarray:
    return np.random.default_rng(0).normal(2.0, 3.0, (200, 5)).astype(np.float32)


def rows_of(values: np.ndarray) -> set[bytes]:
    return {np.ascontiguousarray(row).tobytes() for row in values}


def test_make__subset_without_replacement(cloud: np.ndarray) -> None:
    view = PointsView("p", 64, features=2)
    first, again, other = (view.make(cloud, ViewRandom(k)) for k in (1, 1, 2))
    assert first.shape == (64, 5) and first.dtype == np.float32
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(rows_of(first)) == 64 and rows_of(first) <= rows_of(cloud)
    assert rows_of(view.make(cloud[:, :5], ViewRandom(1))) == rows_of(first)
    assert PointsView("p", 64).make(cloud, ViewRandom(1)).shape == (64, 3)


def test_choose_points__every_point_equally_often() -> None:
    xyz = np.zeros((20, 3), np.float32)
    for how in ("random", "replace"):
        counts = np.bincount(
            np.concatenate([choose_points(xyz, 5, how, ViewRandom(k)) for k in range(2000)]), minlength=20
        )
        assert np.abs(counts - 500).max() < 90


def test_choose_points__small_clouds_repeat_points() -> None:
    xyz = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
    for how in ("random", "farthest"):
        counts = np.bincount(choose_points(xyz, 20, how, ViewRandom(0)), minlength=7)
        assert counts.sum() == 20 and counts.min() >= 2 and counts.max() <= 3
    assert len(choose_points(xyz, 20, "replace", ViewRandom(0))) == 20


def test_farthest_points__equals_the_plain_definition() -> None:
    xyz = np.random.default_rng(1).normal(size=(60, 3)).astype(np.float32)
    chosen = farthest_points(xyz, 12, 5)
    expected = [5]
    for _ in range(11):
        distance = [min(float(((p - xyz[c]) ** 2).sum()) for c in expected) for p in xyz]
        expected.append(int(np.argmax(distance)))
    assert chosen.tolist() == expected


def test_make__unit_sphere(cloud: np.ndarray) -> None:
    made = PointsView("p", 128, normalize="unit_sphere").make(cloud, ViewRandom(0))
    assert np.abs(made.mean(0)).max() < 1e-6 and np.linalg.norm(made, axis=1).max() == pytest.approx(1.0)
    copies = np.concatenate([np.zeros((999, 3)), np.ones((1, 3))])  # of which four are drawn, all at one place
    assert (PointsView("p", 4, normalize="unit_sphere").make(copies, ViewRandom(0)) == 0).all()


@pytest.mark.parametrize("axis", ["x", "y", "z", "any"])
def test_random_rotation__is_a_rotation(axis: str) -> None:
    for k in range(30):
        matrix = random_rotation(axis, ViewRandom(k)).astype(np.float64)
        assert np.allclose(matrix @ matrix.T, np.eye(3), atol=1e-6) and np.linalg.det(matrix) == pytest.approx(1.0)
        if axis != "any":
            unit = np.eye(3)["xyz".index(axis)]
            assert np.allclose(matrix @ unit, unit, atol=1e-6)


def test_random_rotation__is_uniform() -> None:
    """Where a rotation takes any fixed vector is uniform on the sphere: each coordinate uniform in [-1, 1]."""
    ends = np.stack([random_rotation("any", ViewRandom(k)) @ np.array([0.6, 0.0, 0.8]) for k in range(3000)])
    assert np.abs(ends.mean(0)).max() < 0.04 and np.abs((ends**2).mean(0) - 1 / 3).max() < 0.025
    turns = np.array([random_rotation("z", ViewRandom(k))[0] for k in range(2000)])
    assert np.abs(turns.mean(0)).max() < 0.05 and np.abs(np.sign(turns[:, 1]).mean()) < 0.08


def test_make__scale_and_translate_of_point_mae(cloud: np.ndarray) -> None:
    plain = PointsView("p", 200)
    moved = PointsView("p", 200, scale=(2 / 3, 1.5), translate=0.2)
    factors, shifts = [], []
    for k in range(200):
        before, after = plain.make(cloud, ViewRandom(k)), moved.make(cloud, ViewRandom(k))
        factor = after.std(0) / before.std(0)
        factors.append(factor)
        shifts.append((after - before * factor).mean(0))
    assert np.min(factors) > 0.66 and np.max(factors) < 1.51 and np.ptp(factors[0]) > 0.01
    assert np.abs(shifts).max() < 0.21 and np.abs(np.mean(shifts, 0)).max() < 0.03
    whole = PointsView("p", 200, scale=(0.5, 2.0), per_axis=False).make(cloud, ViewRandom(3))
    assert np.ptp(whole.std(0) / plain.make(cloud, ViewRandom(3)).std(0)) < 1e-5


def test_make__jitter_and_drop(cloud: np.ndarray) -> None:
    plain = PointsView("p", 200).make(cloud, ViewRandom(4))
    noise = PointsView("p", 200, jitter=0.05).make(cloud, ViewRandom(4)) - plain
    assert noise.std() == pytest.approx(0.05, rel=0.1) and np.abs(noise).max() <= 0.25 + 1e-5
    shares = []
    for k in range(100):
        made = PointsView("p", 200, drop=0.6).make(cloud, ViewRandom(k))
        shares.append((made == made[0]).all(1).sum() / 200)
    assert max(shares) <= 0.61 and min(shares) < 0.1 and np.mean(shares) == pytest.approx(0.3, abs=0.06)


def test_make__refuses() -> None:
    for shape in [(5,), (5, 2), (2, 5, 3)]:
        with pytest.raises(DataError, match=r"is no cloud \(N, 3 or more columns\)"):
            PointsView("p", 4).make(np.zeros(shape), ViewRandom(0))
    with pytest.raises(DataError, match="not finite"):
        PointsView("p", 4).make(np.full((5, 3), np.nan), ViewRandom(0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"num_point": 5}, "did you mean 'num_points'?"),
        ({}, "'num_points' is missing"),
        ({"num_points": 0}, "num_points=0 is not allowed; it is an integer from 1"),
        ({"num_points": 5, "features": -1}, "features=-1 is not allowed"),
        ({"num_points": 5, "choose": "fps"}, "choose='fps' is not allowed; it is one of random, replace, farthest"),
        ({"num_points": 5, "normalize": "unit_spere"}, "did you mean 'unit_sphere'?"),
        ({"num_points": 5, "rotate": "w"}, "rotate='w' is not allowed"),
        ({"num_points": 5, "scale": [0, 1]}, "scale=(0, 1) is not allowed"),
        ({"num_points": 5, "translate": -1}, "translate=-1 is not allowed; it is a number from 0"),
        ({"num_points": 5, "jitter": float("nan")}, "jitter=nan is not allowed"),
        ({"num_points": 5, "drop": 2}, "drop=2 is not allowed"),
    ],
)
def test_points_view__refuses(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        views_from([{"kind": "points", "name": "cloud", **spec}])


def test_view_maker__clouds_of_shared_data(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "points_psb" / "train-000000.tar")
    views = views_from(
        [
            {"kind": "points", "name": "cloud", "num_points": 512, "count": 2, "normalize": "unit_sphere"},
            {"kind": "label", "name": "label"},
        ]
    )
    maker = ViewMaker(views, dataset.fields)
    batch = maker.collate([maker(dataset.read(i), i) for i in range(4)])
    assert batch["cloud"].shape == (2, 4, 512, 3) and batch["cloud"].is_contiguous()
    assert batch["label"].tolist() == [int(dataset.read(i)["cls"]) for i in range(4)]
    stored = decode_array(dataset.read(1)["points.npy"]).astype(np.float32)
    one = ViewMaker(views_from([{"kind": "points", "name": "c", "num_points": 512}]), dataset.fields)
    assert rows_of(one(dataset.read(1), 1)["c"].numpy()) <= rows_of(stored)


def test_view_maker__broken_cloud_is_named() -> None:
    file = io.BytesIO()
    np.save(file, np.zeros((4, 2)))
    maker = ViewMaker((PointsView("c", 4),), frozenset({"points.npy"}))
    with pytest.raises(DataError, match=r"^field points.npy: array of shape \(4, 2\) is no cloud"):
        maker({"points.npy": file.getvalue()}, 0)


def test_make__shape_survives_any_scale_and_place(cloud: np.ndarray) -> None:
    view = PointsView("p", 64, normalize="unit_sphere", choose="farthest")
    xyz = cloud[:, :3].astype(np.float64)
    expected = view.make(xyz, ViewRandom(3))
    for moved in (xyz * 2.0**90, xyz * 2.0**900, xyz * 2.0**-90, (xyz * 2.0**100).astype(np.float32)):
        np.testing.assert_allclose(view.make(moved, ViewRandom(3)), expected, atol=1e-5)
    np.testing.assert_allclose(view.make(xyz + np.array([4.5e6, 6e5, 0]), ViewRandom(3)), expected, atol=1e-5)


def test_shape_in_float32__of_small_types_only_the_exponent_changes(cloud: np.ndarray) -> None:
    for dtype in (np.float16, np.float32):
        xyz = cloud[:, :3].astype(dtype)
        shaped = shape_in_float32(xyz)
        factors = np.unique(xyz.astype(np.float64) / shaped)
        assert shaped.dtype == np.float32 and len(factors) == 1 and np.frexp(factors[0])[0] == 0.5


def test_make__clouds_without_a_shape_are_refused(cloud: np.ndarray) -> None:
    view = PointsView("p", 64, normalize="unit_sphere", min_points=8, features=2)
    not_finite = cloud.copy()
    not_finite[0, 4] = np.nan
    for values, said in (
        (np.ones((100, 5), np.float32), "all 100 points of the cloud are at one place"),
        (cloud[:7], "the cloud has 7 points; 8 or more are needed"),
        (not_finite, "the cloud has features that are not finite"),
        (cloud[:, ::-1] * np.inf, "the cloud has positions that are not finite"),
        (cloud + np.float32(4.5e6), r"steps of float32 wide, so far from the origin does it lie; subtract an offset"),
    ):
        with np.errstate(all="ignore"), pytest.raises(DataError, match=said):
            view.make(values, ViewRandom(0))
