"""The pixels of many pictures, and the rays through them, as tensors.

Legend: V pictures, P pixels of all of them, B rays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_pipelines.radiance.cameras import Camera
from data_pipelines.radiance.photos import Pixels

__all__ = ["PixelRays", "Rays"]


class Rays(NamedTuple):
    """Rays in the world and what was photographed along them."""

    origins: Tensor  # (B, 3)
    directions: Tensor  # (B, 3), of length 1
    colors: Tensor  # (B, 3) in [0, 1], transparent parts on the background


class PixelRays:
    """All pixels of some pictures in a row; a ray is named by the number of its pixel.

    Args:
        pictures: (H, W, 4) uint8 each, straight alpha.
        background: gray value in [0, 1] that transparent parts are seen on.
    """

    def __init__(self, pictures: Sequence[Pixels], cameras: Sequence[Camera], background: float) -> None:
        self._pixels = torch.from_numpy(np.concatenate([picture.reshape(-1, 4) for picture in pictures]))  # (P, 4)
        self._widths = torch.tensor([camera.width for camera in cameras])  # (V,)
        sizes = torch.tensor([camera.width * camera.height for camera in cameras])
        self._ends = sizes.cumsum(0)  # (V,)
        self._begins = self._ends - sizes
        lenses = [(camera.fx, camera.fy, camera.cx, camera.cy) for camera in cameras]
        self._lenses = torch.tensor(lenses, dtype=torch.float32)  # (V, 4)
        self._poses = torch.tensor(np.stack([camera.pose[:3] for camera in cameras]), dtype=torch.float32)  # (V, 3, 4)
        self._background = background

    def __len__(self) -> int:
        return len(self._pixels)

    def of_picture(self, number: int) -> Tensor:
        """Numbers of the pixels of one picture, row by row."""
        return torch.arange(int(self._begins[number]), int(self._ends[number]))

    def rays(self, pixel_idx: Tensor) -> Rays:
        """The rays through the centers of pixels (B,)."""
        picture_idx = torch.searchsorted(self._ends, pixel_idx, right=True)  # (B,)
        place, width = pixel_idx - self._begins[picture_idx], self._widths[picture_idx]
        column, row = place % width + 0.5, place // width + 0.5
        fx, fy, cx, cy = self._lenses[picture_idx].unbind(1)
        in_camera = torch.stack([(column - cx) / fx, -(row - cy) / fy, -torch.ones_like(fx)], dim=1)  # (B, 3)
        pose = self._poses[picture_idx]  # (B, 3, 4)
        directions = torch.nn.functional.normalize((pose[:, :, :3] @ in_camera[:, :, None])[:, :, 0], dim=1)
        values = self._pixels[pixel_idx].float() / 255  # (B, 4)
        color, alpha = values[:, :3], values[:, 3:]
        return Rays(pose[:, :, 3], directions, color * alpha + self._background * (1 - alpha))
