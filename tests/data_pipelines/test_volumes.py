"""Volumes: one size, values untouched, labels on their voxels, the published turns and mirrors."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from data_pipelines.decode import decode_array
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.views.kinds.volumes import VolumeView, as_volume
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.specs import views_from


@pytest.fixture
def volume() -> np.ndarray:
    """(1, 5, 7, 6) whose values name their voxel; no zero, which padding has."""
    return np.arange(1, 5 * 7 * 6 + 1, dtype=np.int16).reshape(1, 5, 7, 6)


def test_cut__pads_at_the_high_end(volume: np.ndarray) -> None:
    view = VolumeView("v", (8, 7, 9), fill=-1)
    placement = view.place((5, 7, 6), ViewRandom(0))
    out = view.cut(volume, placement)
    assert out.shape == (1, 8, 7, 9) and out.dtype == np.int16
    assert np.array_equal(out[:, :5, :, :6], volume) and (out[:, 5:] == -1).all() and (out[..., 6:] == -1).all()
    assert view.shown_size(placement) == [5, 7, 6]


def test_cut__every_place_is_reached(volume: np.ndarray) -> None:
    view = VolumeView("v", (3, 7, 4))
    corners = {int(view.cut(volume, view.place((5, 7, 6), ViewRandom(seed)))[0, 0, 0, 0]) for seed in range(200)}
    assert corners == {int(volume[0, i, 0, k]) for i, k in itertools.product(range(3), range(3))}


def test_cut__turn_is_the_one_of_nerf_mae(volume: np.ndarray) -> None:
    """out[c, i, j, k] = in[c, j, L - 1 - i, k], L the size of axis 1."""
    view = VolumeView("v", (7, 5, 6), turn=1.0)
    out = view.cut(volume, view.place((5, 7, 6), ViewRandom(0)))
    for i, j, k in itertools.product(range(7), range(5), range(6)):
        assert out[0, i, j, k] == volume[0, j, 6 - i, k]
    assert view.shown_size(view.place((5, 7, 6), ViewRandom(0))) == [7, 5, 6]


def test_cut__turn_and_mirrors_reach_all_symmetries_equally() -> None:
    cube = np.arange(27).reshape(1, 3, 3, 3)
    view = VolumeView("v", (3, 3, 3), flip=(0.5, 0.5, 0.0), turn=0.5)
    found = [view.cut(cube, view.place((3, 3, 3), ViewRandom(seed))).tobytes() for seed in range(1600)]
    counts = [found.count(form) for form in set(found)]
    assert len(counts) == 8 and min(counts) > 140 and max(counts) < 260
    other = VolumeView("v", (3, 3, 3), turn=1.0, plane=(1, 2)).cut(
        cube, VolumeView("v", (3, 3, 3), turn=1.0).place((3, 3, 3), ViewRandom(0))
    )
    assert np.array_equal(other, np.rot90(cube, axes=(2, 3)))


def test_cut__window(volume: np.ndarray) -> None:
    view = VolumeView("v", (5, 7, 8), window=(11, 111), fill=0.5)
    out = view.cut(volume, view.place((5, 7, 6), ViewRandom(0)))
    assert out.dtype == np.float32 and np.allclose(out[..., :6], ((volume - 11.0) / 100).clip(0, 1))
    assert (out[..., 6:] == 0.5).all()


def test_cut__refuses_a_fill_that_the_type_lacks() -> None:
    for fill in (-1, 256, 0.5):
        view = VolumeView("v", (3, 3, 3), fill=fill)
        with pytest.raises(DataError, match=rf"fill={fill} is no value of type uint8"):
            view.cut(np.zeros((1, 2, 2, 2), np.uint8), view.place((2, 2, 2), ViewRandom(0)))


def test_cut__refuses_another_shape(volume: np.ndarray) -> None:
    view = VolumeView("v", (3, 3, 3))
    with pytest.raises(DataError, match=r"volume of shape \(5, 7, 6\) does not lie on the one of shape \(5, 7, 7\)"):
        view.cut(volume, view.place((5, 7, 7), ViewRandom(0)))
    with pytest.raises(DataError, match=r"is no volume \(X, Y, Z\) or \(C, X, Y, Z\)"):
        as_volume(np.zeros((3, 3)))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"size": 32}, "size=32 is not allowed; it is [voxels, voxels, voxels]"),
        ({"size": [32, 32]}, "size=(32, 32) is not allowed"),
        ({"size": [32, 32, 0]}, "size=0 is not allowed"),
        ({"size": [8, 8, 8], "flip": 0.5}, "flip=0.5 is not allowed; it is a probability for each of three axes"),
        ({"size": [8, 8, 8], "flip": [0, 0, 2]}, "flip=2 is not allowed"),
        ({"size": [8, 8, 8], "plane": [0, 3]}, "plane=(0, 3) is not allowed"),
        ({"size": [8, 8, 8], "window": [5, 5]}, "window=(5, 5) is not allowed; it is [low, high] with low < high"),
        ({"size": [8, 8, 8], "turns": 0.5}, "did you mean 'turn'?"),
    ],
)
def test_volume_view__refuses(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        views_from([{"kind": "volume", "name": "v", **spec}])


def test_view_maker__labels_lie_on_the_voxels_of_shared_data(shared_data: Path) -> None:
    dataset = open_dataset(shared_data / "volumes_hippocampus" / "train-000000.tar")
    shared: dict[str, Any] = {"kind": "volume", "size": [32, 48, 32], "field": "npz"}
    views = views_from(
        [
            {**shared, "name": "image", "array": "image", "count": 2, "flip": [0.5, 0.5, 0.5], "turn": 0.5}
            | {"return_size": True},
            {**shared, "name": "label", "array": "label", "same_crop_as": "image"},
            {**shared, "name": "again", "array": "image", "same_crop_as": "image", "window": [0, 255]},
        ]
    )
    maker = ViewMaker(views, dataset.fields)
    batch = maker.collate([maker(dataset.read(i), seed) for i, seed in ((0, 3), (1, 4), (2, 5))])
    assert batch["image"].shape == batch["label"].shape == (2, 3, 1, 32, 48, 32)
    assert batch["image"].dtype == torch.uint8 and batch["image.size"].shape == (2, 3, 3)
    assert torch.allclose(batch["again"], batch["image"] / 255, atol=1e-6)
    for row in range(3):  # each voxel of the label view has the label of a stored voxel of that intensity
        stored = [decode_array(dataset.read(row)["npz"], name).astype(int) for name in ("image", "label")]
        pairs = set(zip(*(part.ravel().tolist() for part in stored), strict=True))
        sizes = batch["image.size"][0, row].tolist()
        inside = tuple(slice(0, size) for size in sizes)
        shown = [batch[name][0, row, 0][inside].int().ravel().tolist() for name in ("image", "label")]
        assert set(zip(*shown, strict=True)) <= pairs


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e300])
def test_cut__voxels_that_are_not_finite_are_refused(bad: float) -> None:
    volume = np.zeros((1, 4, 4, 4))
    volume[0, 1, 2, 3] = bad
    view = VolumeView("v", (4, 4, 4))
    with pytest.raises(DataError, match="1 of 64 voxels are not finite"):
        view.cut(volume, view.place((4, 4, 4), ViewRandom(0)))


def test_cut__unit_channels_are_bytes_or_in_the_unit_interval() -> None:
    view = VolumeView("v", (4, 4, 4), unit_channels=3)
    place = view.place((4, 4, 4), ViewRandom(0))
    grid = np.random.default_rng(0).random((4, 4, 4, 4)).astype(np.float32)
    grid[3] *= 50  # a density
    for good in (grid, (grid[:3] * 255).astype(np.uint8)):
        assert np.array_equal(view.cut(good, place), good)
    for bad in (grid * 300, -grid, (grid * 65535 / 50).astype(np.uint16)):
        with pytest.raises(DataError, match=r"its first 3 channels are .*; they must be uint8, or numbers in \[0, 1\]"):
            view.cut(bad, place)
