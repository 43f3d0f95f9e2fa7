"""A radiance field as a grid of voxels: trilinear between nodes, rendered along rays. It knows no network.

As DVGO (Sun, Sun and Chen, CVPR 2022) with post-activation: raw values are interpolated, then activated, so that a
voxel can hold a sharp surface. Opacity is per length of one voxel of the current grid and survives a finer one.

Legend: B rays, N steps along a ray, M steps that are looked at, (X, Y, Z) nodes of the grid.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipelines.radiance.boxes import Box

__all__ = ["Rendered", "VoxelField"]

_INITIAL_ALPHA = 1e-3  # of one voxel length
_STEP_VOXELS = 0.5
_EMPTY_ALPHA = 5e-3  # below it a cell is passed over, with all cells around it as empty


class Rendered(NamedTuple):
    """Colors of rays, and of the steps that made them."""

    colors: Tensor  # (B, 3)
    weights: Tensor  # (M,) share of a step in the color of its ray
    step_colors: Tensor  # (M, 3)
    ray_idx: Tensor  # (M,) to which ray a step belongs


class VoxelField:
    """A grid over a box, its outermost nodes on the faces.

    Attributes:
        values: (4, X, Y, Z) logits of red, green and blue, then raw density; what is optimised.
        is_occupied: (X, Y, Z) nodes that rendering looks at.
    """

    def __init__(self, box: Box, values: Tensor, is_occupied: Tensor | None = None) -> None:
        self.box = box
        self.values = values
        self.shape = tuple(values.shape[1:])
        self.is_occupied = torch.ones(self.shape, dtype=torch.bool) if is_occupied is None else is_occupied
        self._low = torch.tensor(box.low, dtype=torch.float32)
        self._extent = torch.tensor(box.high - box.low, dtype=torch.float32)
        self._step = _STEP_VOXELS * float(np.max((box.high - box.low) / (np.array(self.shape) - 1)))
        self._num_steps = math.ceil(float(np.linalg.norm(box.high - box.low)) / self._step)
        self._shift = math.log(1 / (1 - _INITIAL_ALPHA) - 1)  # softplus(shift) is the density of the initial alpha

    @classmethod
    def empty(cls, box: Box, shape: tuple[int, int, int]) -> VoxelField:
        """Gray and all but transparent."""
        return cls(box, torch.zeros(4, *shape))

    def refined(self, shape: tuple[int, int, int]) -> VoxelField:
        """The same field on more nodes; cells that are empty with all of their neighbors are marked as such."""
        values = F.interpolate(self.values.detach()[None], shape, mode="trilinear", align_corners=True)[0]
        return VoxelField(self.box, values, self._occupied(values))

    def pruned(self) -> VoxelField:
        """The same field, with what is empty by now marked as such."""
        values = self.values.detach()
        return VoxelField(self.box, values, self._occupied(values))

    def colors(self) -> Tensor:
        """(3, X, Y, Z) in [0, 1] at the nodes."""
        return torch.sigmoid(self.values[:3])

    def alpha(self, num_voxels: float = 1.0) -> Tensor:
        """(X, Y, Z) opacity at the nodes of a length of so many voxels."""
        return self._alpha(self.values[3], num_voxels)

    def meets(self, origins: Tensor, directions: Tensor) -> Tensor:
        """(B,) whether rays pass through the box."""
        near, far = self._span(origins, directions)
        return near < far

    def render(self, origins: Tensor, directions: Tensor, background: float, start: Tensor) -> Rendered:
        """Composite color along rays, front to back (Max 1995).

        Args:
            origins, directions: (B, 3), the directions of length 1.
            background: gray value in [0, 1] behind the box.
            start: (B,) in [0, 1), where in its first step a ray is looked at.
        """
        near, far = self._span(origins, directions)  # (B,)
        steps = torch.arange(self._num_steps) + start[:, None]  # (B, N)
        depth = near[:, None] + self._step * steps
        places = (origins[:, None] + depth[..., None] * directions[:, None] - self._low) / self._extent  # (B, N, 3)
        looked_at = (depth < far[:, None]) & self._occupied_at(places)
        step_idx = looked_at.flatten().nonzero()[:, 0]  # (M,)
        ray_idx = step_idx // self._num_steps
        raw = self._sampled(places.reshape(-1, 3)[step_idx])  # (4, M)
        step_colors = torch.sigmoid(raw[:3]).T  # (M, 3)
        alpha = torch.zeros(looked_at.numel()).index_copy(0, step_idx, self._alpha(raw[3], _STEP_VOXELS))
        passed = torch.cumprod(1 - alpha.view(looked_at.shape) + 1e-10, dim=1)  # (B, N) light that is left behind it
        before = torch.cat([torch.ones(len(passed), 1), passed[:, :-1]], dim=1)
        weights = (alpha * before.flatten())[step_idx]  # (M,)
        behind = background * passed[:, -1:].expand(-1, 3)
        colors = behind.index_add(0, ray_idx, weights[:, None] * step_colors)
        return Rendered(colors, weights, step_colors, ray_idx)

    def _span(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays enter and leave the box, as distances; the first is not smaller for those that miss it."""
        toward = torch.where(directions.abs() < 1e-9, torch.full_like(directions, 1e-9), directions)
        first, second = (self._low - origins) / toward, (self._low + self._extent - origins) / toward
        near = torch.minimum(first, second).amax(dim=1).clamp(min=0)
        return near, torch.maximum(first, second).amin(dim=1)

    def _occupied_at(self, places: Tensor) -> Tensor:
        """(B, N) whether the node nearest to places (B, N, 3) in [0, 1] is occupied."""
        nodes = torch.tensor(self.shape)
        nearest = (places * (nodes - 1) + 0.5).long().clamp(min=0).minimum(nodes - 1)
        x, y, z = nearest.unbind(-1)
        return self.is_occupied.flatten()[(x * self.shape[1] + y) * self.shape[2] + z]

    def _sampled(self, places: Tensor) -> Tensor:
        """(4, M) raw values at places (M, 3) in [0, 1], trilinear between nodes."""
        coordinates = (2 * places - 1).flip(-1)[None, :, None, None]  # `grid_sample` wants the last axis first
        return F.grid_sample(self.values[None], coordinates, align_corners=True, padding_mode="border")[0, :, :, 0, 0]

    def _alpha(self, raw: Tensor, num_voxels: float) -> Tensor:
        return 1 - torch.exp(-num_voxels * F.softplus(raw + self._shift))

    def _occupied(self, values: Tensor) -> Tensor:
        around = F.max_pool3d(self._alpha(values[3], 1.0)[None, None], 3, stride=1, padding=1)[0, 0]
        occupied = around >= _EMPTY_ALPHA
        return occupied if occupied.any() else torch.ones_like(occupied)  # nothing is opaque yet: look everywhere
