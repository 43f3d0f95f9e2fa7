"""Mean and standard deviation of photos, exact: sums of 8 bit values are whole numbers until the last division."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

__all__ = ["PixelSums"]

_VALUES = np.arange(256, dtype=np.int64)


@dataclass
class PixelSums:
    """Sums over pixels per channel; any order of adding gives the same."""

    total: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])
    pixels: int = 0

    def add_image(self, image: Image.Image) -> None:
        """Add an RGB image."""
        histogram = np.array(image.histogram(), np.int64).reshape(3, 256)
        total, squares = (histogram @ _VALUES).tolist(), (histogram @ _VALUES**2).tolist()
        self.add(PixelSums(total, squares, image.width * image.height))

    def add(self, other: PixelSums) -> None:
        self.total = [mine + more for mine, more in zip(self.total, other.total, strict=True)]
        self.squares = [mine + more for mine, more in zip(self.squares, other.squares, strict=True)]
        self.pixels += other.pixels

    @property
    def mean(self) -> list[float]:
        """Per channel, in [0, 1]; there must be pixels."""
        return [total / (255 * self.pixels) for total in self.total]

    @property
    def std(self) -> list[float]:
        """Per channel, in [0, 1]; there must be pixels."""
        spread = [self.pixels * square - total**2 for total, square in zip(self.total, self.squares, strict=True)]
        return [math.sqrt(value) / (255 * self.pixels) for value in spread]
