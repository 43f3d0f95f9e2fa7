"""Grids as they are stored, and cuts of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_pipelines.radiance.boxes import Box
from data_pipelines.radiance.field import VoxelField
from data_pipelines.radiance.grids import Cut, cut_grid, draw_cuts, grid_of, stored

BOX = Box(np.full(3, -1.0), np.full(3, 1.0), "bound")


def test_grid_of__alpha_is_that_of_1_6_voxels() -> None:
    values = torch.randn(4, 5, 6, 7, generator=torch.Generator().manual_seed(0)) * 4
    field = VoxelField(BOX, values)
    grid = grid_of(field)
    assert grid.shape == (4, 5, 6, 7) and grid.dtype == np.float16
    np.testing.assert_allclose(grid[:3], 1 / (1 + np.exp(-values[:3].numpy())), atol=1e-3)
    np.testing.assert_allclose(grid[3], 1 - (1 - field.alpha().numpy()) ** 1.6, atol=1e-3)


def test_stored__bytes_are_0_where_alpha_is_below_3() -> None:
    grid = np.full((4, 1, 1, 4), 0.5, np.float16)
    grid[3, 0, 0] = (0, 2.4 / 255, 3 / 255, 1)
    kept = stored(grid, "uint8")
    assert kept.dtype == np.uint8
    assert kept[3].ravel().tolist() == [0, 0, 3, 255] and kept[0].ravel().tolist() == [0, 0, 128, 128]
    assert stored(grid, "float16") is grid


def ball(side: int = 24) -> np.ndarray:
    grid = np.random.default_rng(0).random((4, side, side, side)).astype(np.float16)
    nodes = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing="ij"))
    grid[3] *= np.linalg.norm(nodes - side / 3, axis=0) < side / 4
    return grid


def test_draw_cuts__have_something_in_them_and_differ() -> None:
    grid = ball()
    cuts = draw_cuts(grid, 40, 8, np.random.default_rng(1))
    shares = [(cut_grid(grid, cut)[3] >= 0.01).mean() for cut in cuts]
    assert min(shares) >= 0.05 and len({cut.origin for cut in cuts}) > 30
    assert {cut.quarter_turns for cut in cuts} == {0, 1, 2, 3} and {cut.flip_x for cut in cuts} == {True, False}
    assert cuts == draw_cuts(grid, 40, 8, np.random.default_rng(1))
    assert all(origin + 8 <= 24 for cut in cuts for origin in cut.origin)


def test_draw_cuts__of_an_almost_empty_grid_come_all_the_same() -> None:
    grid = np.zeros((4, 16, 16, 16), np.float16)
    assert len(draw_cuts(grid, 3, 16, np.random.default_rng(0))) == 3


@pytest.mark.parametrize("turns", [0, 1, 2, 3])
def test_cut_grid__turns_and_mirrors_about_z(turns: int) -> None:
    grid = ball(12)
    plain = cut_grid(grid, Cut((1, 2, 3), 6, 0, False, False))
    np.testing.assert_array_equal(plain, grid[:, 1:7, 2:8, 3:9])
    turned = cut_grid(grid, Cut((1, 2, 3), 6, turns, True, False))
    for _ in range(turns):  # NeRF-MAE: out[c, i, j, k] = in[c, j, L - 1 - i, k], four of which are none
        plain = np.flip(plain.transpose(0, 2, 1, 3), 1)
    np.testing.assert_array_equal(turned, np.flip(plain, 1))
    assert turned.flags.c_contiguous
