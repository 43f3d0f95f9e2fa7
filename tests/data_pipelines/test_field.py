"""Voxel fields: interpolation, compositing and the rays of pixels, against sums written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_pipelines.radiance.boxes import Box
from data_pipelines.radiance.cameras import Camera
from data_pipelines.radiance.field import VoxelField
from data_pipelines.radiance.rays import PixelRays
from tests.analytic_scene import photographs

BOX = Box(np.array([-1.0, -0.5, 0.0]), np.array([1.0, 0.5, 0.6]), "bound")


def linear_field() -> VoxelField:
    """Raw values that are linear in x, y and z, so that interpolation is exact everywhere."""
    x, y, z = np.meshgrid(*(np.linspace(BOX.low[a], BOX.high[a], n) for a, n in enumerate((11, 6, 4))), indexing="ij")
    values = np.stack([x, 2 * y, 3 * z, 6 + x + 10 * y - z])
    return VoxelField(BOX, torch.tensor(values, dtype=torch.float32))


def test_render__is_the_sum_along_the_ray() -> None:
    field, voxel, shift = linear_field(), 0.2, math.log(1 / (1 - 1e-3) - 1)
    origin, target = np.array([-3.0, 0.3, 0.9]), np.array([0.2, -0.1, 0.2])
    direction = (target - origin) / np.linalg.norm(target - origin)
    rendered = field.render(
        torch.tensor(origin[None], dtype=torch.float32),
        torch.tensor(direction[None], dtype=torch.float32),
        1.0,
        torch.tensor([0.25]),
    )
    enter = max(
        min((low - o) / d, (high - o) / d) for low, high, o, d in zip(BOX.low, BOX.high, origin, direction, strict=True)
    )
    leave = min(
        max((low - o) / d, (high - o) / d) for low, high, o, d in zip(BOX.low, BOX.high, origin, direction, strict=True)
    )
    light, color, count = 1.0, np.zeros(3), 0
    depth = enter + 0.25 * voxel / 2
    while depth < leave:
        x, y, z = origin + depth * direction
        density = math.log1p(math.exp(6 + x + 10 * y - z + shift))
        alpha = 1 - math.exp(-density / 2)  # half a voxel
        color += light * alpha / (1 + np.exp(-np.array([x, 2 * y, 3 * z])))
        light *= 1 - alpha
        depth, count = depth + voxel / 2, count + 1
    assert 5 < count == len(rendered.weights)
    assert 0.01 < light < 0.99
    np.testing.assert_allclose(rendered.colors[0].numpy(), color + light, atol=1e-5)
    assert float(rendered.weights.sum()) == pytest.approx(1 - light, abs=1e-5)


def test_render__rays_that_miss_and_empty_fields_show_the_background() -> None:
    origins = torch.tensor([[-3.0, 0, 0.3], [-3.0, 0, 0.3], [0.0, 0, 0.3]])
    directions = torch.tensor([[-1.0, 0, 0], [0.0, 0, 1], [1.0, 0, 0]])
    field = linear_field()
    assert field.meets(origins, directions).tolist() == [False, False, True]
    colors = field.render(origins, directions, 0.25, torch.zeros(3)).colors
    assert colors[:2].tolist() == [[0.25] * 3] * 2 and (colors[2] != 0.25).all()
    nothing = VoxelField(BOX, field.values, torch.zeros(field.shape, dtype=torch.bool))
    assert nothing.render(origins, directions, 0.25, torch.zeros(3)).colors.tolist() == [[0.25] * 3] * 3


def test_refined__keeps_values_and_opacity_per_voxel() -> None:
    field = linear_field()
    finer = field.refined((21, 11, 7))
    assert finer.shape == (21, 11, 7)
    torch.testing.assert_close(finer.values[:, ::2, ::2, ::2], field.values)
    torch.testing.assert_close(finer.alpha()[::2, ::2, ::2], field.alpha())


def test_pruned__looks_at_what_is_opaque_and_its_neighbors_only() -> None:
    values = torch.zeros(4, 9, 9, 9)
    values[3, 4, 4, 4] = 5.0
    occupied = VoxelField(BOX, values).pruned().is_occupied
    assert occupied.sum() == 27 and occupied[3:6, 3:6, 3:6].all()
    assert VoxelField.empty(BOX, (3, 3, 3)).pruned().is_occupied.all()  # what is not fitted yet is not given up
    assert VoxelField.empty(BOX, (3, 3, 3)).alpha().unique().tolist() == [pytest.approx(1e-3, rel=1e-3)]


def test_render__passing_over_empty_cells_changes_little() -> None:
    values = torch.zeros(4, 17, 17, 17)
    values[3], values[3, 6:10, 6:10, 6:10] = -4.0, 12.0
    whole = VoxelField(Box(np.full(3, -1.0), np.full(3, 1.0), "bound"), values)
    origins = torch.tensor([[-3.0, 0.02, 0.01]]).repeat(5, 1)
    directions = torch.nn.functional.normalize(torch.tensor([[3.0, y, 0.1] for y in (-0.4, -0.2, 0, 0.2, 0.4)]), dim=1)
    colors = [field.render(origins, directions, 1.0, torch.full((5,), 0.5)).colors for field in (whole, whole.pruned())]
    torch.testing.assert_close(colors[0], colors[1], atol=2e-3, rtol=0)
    assert colors[0][2, 0] < 0.6 < colors[0][0, 0]


def test_rays__pass_through_the_centers_of_their_pixels() -> None:
    taken = photographs(3, size=8)
    sizes = ((8, 8), (12, 6), (5, 9))
    cameras = [Camera(w, h, 11.0, 9.0, 4.2, 3.1, photo.opengl) for photo, (w, h) in zip(taken, sizes, strict=True)]
    pictures = [np.random.default_rng(0).integers(0, 256, (h, w, 4), np.uint8) for w, h in sizes]
    rays = PixelRays(pictures, cameras, background=1.0)
    assert len(rays) == 64 + 72 + 45
    for number, (camera, picture) in enumerate(zip(cameras, pictures, strict=True)):
        origins, directions, colors = rays.rays(rays.of_picture(number))
        pixels, depth = camera.project((origins + 2 * directions).double().numpy())
        rows, columns = np.mgrid[: camera.height, : camera.width] + 0.5
        np.testing.assert_allclose(pixels, np.stack([columns.ravel(), rows.ravel()], axis=1), atol=1e-4)
        assert (depth > 0).all() and torch.allclose(directions.norm(dim=1), torch.ones(1))
        alpha = picture[..., 3:] / 255
        expected = picture[..., :3] / 255 * alpha + 1 - alpha
        np.testing.assert_allclose(colors.numpy(), expected.reshape(-1, 3), atol=1e-6)
