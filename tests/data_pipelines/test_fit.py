"""Fitting a scene of spheres: as good as it should be, the same each time, and lines for what cannot be fitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.radiance.fit import Fit, fit_scene, psnr
from data_pipelines.radiance.grids import grid_of
from data_pipelines.radiance.scenes import Scene, read_scene
from data_pipelines.radiance.settings import FitSettings
from tests.analytic_scene import SPHERES, photographs, write_nerfstudio

SMALL = FitSettings(resolution=32, steps=300, rays=512, bound=1.2)


@pytest.fixture(scope="module")
def spheres(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return read_scene(write_nerfstudio(tmp_path_factory.mktemp("scene") / "spheres", photographs()))


@pytest.fixture(scope="module")
def fitted(spheres: Scene) -> tuple[Fit, list[int]]:
    told: list[int] = []
    return fit_scene(spheres, SMALL, told.append), told


def test_fit_scene__is_good_on_views_it_has_not_seen(fitted: tuple[Fit, list[int]]) -> None:
    fit, told = fitted
    assert fit.psnr >= 27 and sum(told) == 300 and fit.field.shape == (32, 32, 32)


def test_fit_scene__matter_is_where_the_spheres_are(fitted: tuple[Fit, list[int]]) -> None:
    """Nodes well inside of a surface's shell are opaque and of its color, nodes well outside of all spheres are not."""
    grid = grid_of(fitted[0].field).astype(np.float32)
    nodes = np.stack(np.meshgrid(*[np.linspace(-1.2, 1.2, 32)] * 3, indexing="ij"), axis=-1)
    from_surface = np.stack([np.linalg.norm(nodes - center, axis=-1) - radius for center, radius, _ in SPHERES])
    outside = from_surface.min(axis=0) > 0.15
    assert grid[3][outside].mean() < 0.02
    shell = np.abs(from_surface.min(axis=0)) < 0.04
    assert grid[3][shell].mean() > 0.3
    for number, (_, _, color) in enumerate(SPHERES):
        of_one = shell & (from_surface.argmin(axis=0) == number) & (grid[3] > 0.3)
        assert grid[:3, of_one].mean(axis=1).argmax() == np.argmax(color)


def test_fit_scene__same_seed_same_grid_whatever_else_draws(spheres: Scene) -> None:
    few = FitSettings(resolution=16, steps=20, rays=64, bound=1.2)
    first = fit_scene(spheres, few)
    torch.manual_seed(9)
    torch.rand(3)
    state = torch.get_rng_state()
    second = fit_scene(spheres, few)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.field.values, second.field.values) and first.psnr == second.psnr
    other = fit_scene(spheres, FitSettings(resolution=16, steps=20, rays=64, bound=1.2, seed=1))
    assert not torch.equal(first.field.values, other.field.values)


def test_fit_scene__leaves_the_number_of_threads(spheres: Scene) -> None:
    before = torch.get_num_threads()
    fit_scene(spheres, FitSettings(resolution=8, steps=1, rays=4))
    assert torch.get_num_threads() == before


def test_fit_scene__a_box_that_no_view_shows_is_named(tmp_path: Path) -> None:
    """Read in axes of the other kind, the cameras look away from the scene."""
    scene = read_scene(write_nerfstudio(tmp_path / "away", photographs(8, size=8)), axes="opencv")
    with pytest.raises(
        DataError, match=r"no view shows the box from \(-1 -1 -1\) to \(1 1 1\), which the rule 'bound'"
    ):
        fit_scene(scene, FitSettings(resolution=8, steps=1, bound=1.0))


def test_psnr__of_known_errors() -> None:
    assert psnr(0.01) == pytest.approx(20) and psnr(0.0) == 100


WRONG = [
    ("resolution", 7),
    ("steps", 0),
    ("bound", -1.0),
    ("box", (0.0, 0, 0, 1, 1, 0)),
    ("box", (0.0, 0, 1)),
    ("background", "green"),
    ("axes", "opngl"),
    ("up", "w"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_settings__refuse_what_is_not_allowed(name: str, value: object) -> None:
    with pytest.raises(DataError, match=f"^{name}=.* is not allowed; "):
        FitSettings(**{name: value})  # type: ignore[arg-type] # wrong on purpose


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Iterator[Path]:
    yield shared_data / "nerf_synthetic"


@pytest.mark.long
@pytest.mark.parametrize(("name", "least"), [("chair", 27.5), ("lego", 25.0)])
def test_fit_scene__real_scenes(real: Path, name: str, least: float) -> None:
    assert fit_scene(read_scene(real / f"{name}.tar"), FitSettings()).psnr >= least
