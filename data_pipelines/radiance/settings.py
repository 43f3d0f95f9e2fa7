"""What determines the grid of a scene besides its pictures and cameras.

Imports nothing heavy, for the command line.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from data_pipelines.errors import DataError, suggest

__all__ = ["AXES", "BACKGROUNDS", "DTYPES", "UPS", "FitSettings"]

AXES = ("opengl", "opencv")  # of a camera: y up and looking along -z, or y down and looking along +z
UPS = ("auto", "x", "y", "z", "-x", "-y", "-z")
BACKGROUNDS = {"white": 1.0, "black": 0.0}
DTYPES = ("uint8", "float16")


@dataclass(frozen=True)
class FitSettings:
    """How a scene is fitted.

    Attributes:
        resolution: nodes of the grid along the longest side of the box, 8 or more.
        steps: of the optimiser, over all stages.
        rays: per step.
        size: shorter side in pixels that larger pictures are reduced to.
        bound: half the side of a cube around the origin that is fitted.
        box: lowest, then highest x, y and z of what is fitted, in the world with z up; without either see `boxes`.
        background: what transparent parts and the space behind the box look like, one of `BACKGROUNDS`.
        axes: of the cameras in JSON and npz, one of `AXES`.
        up: axis of the source that points up, one of `UPS`.
        seed: of the pixels that each step takes.

    Raises:
        DataError: a value is not allowed.
    """

    resolution: int = 64
    steps: int = 1000
    rays: int = 1024
    size: int = 400
    bound: float | None = None
    box: tuple[float, ...] | None = None
    background: str = "white"
    axes: str = "opengl"
    up: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("resolution", 8), ("steps", 1), ("rays", 1), ("size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)} is not allowed; it must be {least} or more")
        if self.bound is not None and not 0 < self.bound < inf:
            raise DataError(f"bound={self.bound} is not allowed; it must be above 0")
        if self.box is not None and (
            len(self.box) != 6
            or not all(-inf < low < high < inf for low, high in zip(self.box, self.box[3:], strict=False))
        ):
            shown = ",".join(f"{value:g}" for value in self.box)
            raise DataError(f"box={shown} is not allowed; it is X0,Y0,Z0,X1,Y1,Z1, each end above its beginning")
        if self.box is not None and self.bound is not None:
            raise DataError(f"bound={self.bound:g} is not allowed beside a box; give one of the two")
        for name, allowed in (("background", tuple(BACKGROUNDS)), ("axes", AXES), ("up", UPS)):
            value = getattr(self, name)
            if value not in allowed:
                raise DataError(f"{name}={value!r} is not allowed; use {' or '.join(allowed)}{suggest(value, allowed)}")
