"""Fit a voxel field to the views of one scene, coarse to fine, and measure it on views it has not seen.

After DVGO (Sun, Sun and Chen, CVPR 2022), with colors that do not depend on the direction: half a voxel per step,
squared error of colors plus a tenth of that of single steps, Adam at 0.1 that falls tenfold in each stage, empty cells
passed over from the second stage on. One thread: several scenes are several processes. All random numbers come
from the seed, so the same pictures and settings give the same grid.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from data_pipelines.errors import DataError
from data_pipelines.radiance.boxes import Box, choose_box, fitting_shape
from data_pipelines.radiance.field import VoxelField
from data_pipelines.radiance.rays import PixelRays
from data_pipelines.radiance.scenes import Scene, View
from data_pipelines.radiance.settings import BACKGROUNDS, FitSettings

__all__ = ["Fit", "fit_scene", "psnr"]

_STAGES = ((1 / 4, 0.2), (1 / 2, 0.3), (1.0, 0.5))  # share of the resolution, share of the steps
_MIN_NODES = 8  # of the longest side in the coarsest stage
_LR, _BETAS, _LR_DECAY = 0.1, (0.9, 0.99), 0.1
_STEP_COLOR_WEIGHT = 0.1
_RENDERED_AT_ONCE = 4096  # rays


@dataclass(frozen=True)
class Fit:
    """A fitted scene.

    Attributes:
        field: on the finest grid.
        psnr: mean over the held-out views, dB.
        seconds: CPU time of this process.
    """

    field: VoxelField
    psnr: float
    seconds: float


def fit_scene(scene: Scene, settings: FitSettings, advance: Callable[[int], None] = lambda steps: None) -> Fit:
    """Fit a scene.

    Args:
        advance: told after each step of the optimiser.

    Raises:
        DataError: a picture does not decode, or no ray meets the box.
    """
    with _one_thread():
        began = time.process_time()
        background = BACKGROUNDS[settings.background]
        rays = _rays_of(scene, scene.train, settings)
        box = choose_box([view.camera for view in scene.train], settings, scene.points, str(scene.path))
        box, finest = fitting_shape(box, settings.resolution)
        _require_hits(box, rays, str(scene.path))
        generator = torch.Generator().manual_seed(settings.seed)
        field: VoxelField | None = None
        for share, share_of_steps in _STAGES:
            shape = _coarser(finest, share)
            field = VoxelField.empty(box, shape) if field is None else field.refined(shape)
            _optimise(
                field, rays, round(share_of_steps * settings.steps), settings.rays, background, generator, advance
            )
        assert field is not None
        field = field.pruned()
        held_out = _rays_of(scene, scene.held_out, settings)
        scores = [_psnr_of(field, held_out, number, background) for number in range(len(scene.held_out))]
        return Fit(field, float(np.mean(scores)), time.process_time() - began)


def psnr(squared_error: float) -> float:
    """Peak signal-to-noise ratio in dB of values in [0, 1], from their mean squared error; at most 100."""
    return -10 * math.log10(max(squared_error, 1e-10))


def _rays_of(scene: Scene, views: list[View], settings: FitSettings) -> PixelRays:
    pictures, cameras = zip(*(scene.pixels(view, settings.size) for view in views), strict=True)
    return PixelRays(pictures, cameras, BACKGROUNDS[settings.background])


def _require_hits(box: Box, rays: PixelRays, where: str) -> None:
    """Look at some of the rays, evenly spread."""
    some = torch.arange(0, len(rays), max(1, len(rays) // 4096))
    origins, directions, _ = rays.rays(some)
    if not VoxelField.empty(box, (2, 2, 2)).meets(origins, directions).any():
        low, high = (" ".join(f"{value:.3g}" for value in corner) for corner in (box.low, box.high))
        raise DataError(
            f"{where}: no view shows the box from ({low}) to ({high}), which the rule {box.rule!r} gives; declare the "
            "part to fit with --bound or --box, or name the axes of the cameras with --axes"
        )


def _coarser(shape: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """Fewer nodes along each axis, in proportion."""
    share = min(1.0, max(share, _MIN_NODES / max(shape)))
    x, y, z = (max(2, round(count * share)) for count in shape)
    return x, y, z


def _optimise(
    field: VoxelField,
    rays: PixelRays,
    num_steps: int,
    rays_per_step: int,
    background: float,
    generator: torch.Generator,
    advance: Callable[[int], None],
) -> None:
    """Change the values of a field so that its rays get the colors of their pixels."""
    values = field.values.requires_grad_()
    optimizer = torch.optim.Adam([values], lr=_LR, betas=_BETAS, fused=True)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, _LR_DECAY ** (1 / max(1, num_steps)))
    for _ in range(num_steps):
        pixel_idx = torch.randint(len(rays), (rays_per_step,), generator=generator)
        start = torch.rand(rays_per_step, generator=generator)
        origins, directions, colors = rays.rays(pixel_idx)
        rendered = field.render(origins, directions, background, start)
        loss = torch.mean((rendered.colors - colors) ** 2)
        step_error = ((rendered.step_colors - colors[rendered.ray_idx]) ** 2).sum(dim=1)  # (M,)
        loss = loss + _STEP_COLOR_WEIGHT * (rendered.weights.detach() * step_error).sum() / rays_per_step
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        advance(1)
    values.requires_grad_(False)


@torch.no_grad()
def _psnr_of(field: VoxelField, rays: PixelRays, number: int, background: float) -> float:
    """Of a whole picture."""
    error, pixels = 0.0, rays.of_picture(number)
    for pixel_idx in pixels.split(_RENDERED_AT_ONCE):
        origins, directions, colors = rays.rays(pixel_idx)
        middle = torch.full((len(pixel_idx),), 0.5)
        error += float(((field.render(origins, directions, background, middle).colors - colors) ** 2).sum())
    return psnr(error / (3 * len(pixels)))


@contextmanager
def _one_thread() -> Iterator[None]:
    """Two threads on cores that others use as well wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
