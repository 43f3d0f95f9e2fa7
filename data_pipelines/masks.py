"""Which patches of a crop are hidden: masks drawn in the loader worker, from the sample's own randomness.

A mask is stated as plain data inside an image view (`mask: {kind: blocks, patch: 16, ratio: [0.1, 0.5]}`) and becomes
the boolean entry `<view>.<name>` of the batch, one cell per patch, True where hidden. Four kinds:

* `random`: a uniformly random set of exactly `int(cells * ratio)` cells, as MAE (He et al. 2022).
* `blocks`: rectangles until the count is reached, as BEiT (Bao et al. 2022) and iBOT (Zhou et al. 2022).
* `grid`: all but one cell in each square of `cell` x `cell`, as the grid sampling of MAE.
* `groups`: rectangles that overlap and grow to the lower right, as GMML (Atito et al. 2022).

Not here: what is put in the hidden places, and masks over tokens of points or volumes (objectives draw these on the
device, where the tokens are).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipelines.errors import DataError
from data_pipelines.order import permutation
from data_pipelines.randomness import ViewRandom
from data_pipelines.specs import (
    is_number,
    is_range,
    read_spec,
    refuse,
    require_integers,
    require_probabilities,
)

__all__ = ["BlockMask", "GridMask", "GroupMask", "Mask", "RandomMask", "mask_from"]

IsHidden = npt.NDArray[np.bool_]
Ratio = float | tuple[float, float]

_BLOCK_ATTEMPTS = 10  # as BEiT: this many rectangles that do not fit, and no more are tried


@dataclass(frozen=True, kw_only=True)
class Mask(ABC):
    """One kind of mask.

    Attributes:
        patch: side of a cell in pixels of the crop; divides the crop's size.
        name: the batch entry is `<view>.<name>`.
        probability: of a mask at all; else nothing is hidden.
    """

    patch: int
    name: str = "mask"
    probability: float = 1.0

    def __post_init__(self) -> None:
        where = f"mask {self.name!r}"
        if not isinstance(self.name, str) or not self.name.isidentifier():
            refuse(where, "name", self.name, "a word")
        require_integers(where, 1, patch=self.patch)
        require_probabilities(where, probability=self.probability)
        self._check(where)

    def draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden:
        """A mask over a grid of cells.

        Args:
            rows: cells from top to bottom.
            cols: cells from left to right.
            rng: advanced by the draws made.

        Returns:
            (rows, cols), True where hidden.
        """
        if self.probability < 1 and rng.uniform(0.0, 1.0) >= self.probability:
            return np.zeros((rows, cols), np.bool_)
        return self._draw(rows, cols, rng)

    def require_grid(self, rows: int, cols: int) -> None:
        """Refuse a grid on which this mask cannot be drawn.

        Raises:
            DataError: says what does not fit.
        """
        return None

    @abstractmethod
    def _check(self, where: str) -> None: ...

    @abstractmethod
    def _draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden: ...


@dataclass(frozen=True, kw_only=True)
class RandomMask(Mask):
    """Exactly `int(cells * ratio)` cells, each set equally likely.

    Attributes:
        ratio: share hidden, or [low, high] to draw it from.
    """

    ratio: Ratio

    def _check(self, where: str) -> None:
        _check_ratio(where, self.ratio)

    def _draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden:
        target = int(rows * cols * _drawn(self.ratio, rng))
        is_hidden = np.zeros(rows * cols, np.bool_)
        is_hidden[permutation(rows * cols, rng.below(1 << 64))[:target]] = True
        return is_hidden.reshape(rows, cols)


@dataclass(frozen=True, kw_only=True)
class BlockMask(Mask):
    """Rectangles of random area and aspect until `int(cells * ratio)` cells are hidden.

    When no further rectangle fits, the rest is filled with single cells (as DINOv3), so that the count is exact.

    Attributes:
        ratio: share hidden, or [low, high] to draw it from.
        area: least and greatest area of a rectangle in cells; the greatest is half of the grid unless given.
        aspect: least and greatest height / width.
        exact: False leaves the count short when no further rectangle fits (as BEiT and DINOv2).
    """

    ratio: Ratio
    area: tuple[int, int | None] = (4, None)
    aspect: tuple[float, float] = (0.3, 1 / 0.3)
    exact: bool = True

    def _check(self, where: str) -> None:
        _check_ratio(where, self.ratio)
        most = self.area[1] if isinstance(self.area, tuple) and len(self.area) == 2 else 0
        if not is_range((self.area[0], self.area[0] if most is None else most) if most != 0 else None, low=1):
            refuse(where, "area", self.area, "[least, greatest] in cells, from 1; the greatest may be null")
        if not is_range(self.aspect) or self.aspect[0] <= 0:
            refuse(where, "aspect", self.aspect, "[low, high] with 0 < low <= high")

    def _draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden:
        target = int(rows * cols * _drawn(self.ratio, rng))
        is_hidden = np.zeros((rows, cols), np.bool_)
        greatest = rows // 2 * cols if self.area[1] is None else self.area[1]
        missing = target
        while missing > 0 and (covered := self._add_block(is_hidden, min(missing, greatest), rng)):
            missing -= covered
        if self.exact and missing > 0:
            seen = np.flatnonzero(~is_hidden)
            is_hidden.flat[seen[permutation(len(seen), rng.below(1 << 64))[:missing]]] = True
        return is_hidden

    def _add_block(self, is_hidden: IsHidden, most: int, rng: ViewRandom) -> int:
        """Hide one more rectangle in place; the number of cells newly hidden, 0 when none of the attempts fitted."""
        rows, cols = is_hidden.shape
        for _ in range(_BLOCK_ATTEMPTS):
            area = rng.uniform(self.area[0], most)
            aspect = math.exp(rng.uniform(math.log(self.aspect[0]), math.log(self.aspect[1])))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if height < rows and width < cols:
                top, left = rng.below(rows - height + 1), rng.below(cols - width + 1)
                block = is_hidden[top : top + height, left : left + width]
                covered = block.size - int(np.count_nonzero(block))
                if 0 < covered <= most:
                    block[...] = True
                    return covered
        return 0


@dataclass(frozen=True, kw_only=True)
class GridMask(Mask):
    """Regular: in every square of `cell` x `cell` cells the same one stays visible; which one is drawn."""

    cell: int = 2

    def _check(self, where: str) -> None:
        require_integers(where, 2, cell=self.cell)

    def _draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden:
        is_hidden = np.ones((rows, cols), np.bool_)
        is_hidden[rng.below(self.cell) :: self.cell, rng.below(self.cell) :: self.cell] = False
        return is_hidden


@dataclass(frozen=True, kw_only=True)
class GroupMask(Mask):
    """GMML's groups: rectangles until their union covers the share; `patch: 1` gives the published pixel blocks.

    A rectangle starts anywhere, has sides of up to `side` of the picture and is cut off at the far edge, so that the
    lower right is hidden more often than the upper left (0.68 against 0.04 of the outermost pixel rows at 224 pixels,
    patch 1, ratio [0.5, 0.75]): the published behaviour, kept.

    Attributes:
        ratio: share hidden at least, or [low, high] to draw it from; the last rectangle may overshoot.
        side: greatest side of a rectangle as a share of the picture's.
    """

    ratio: Ratio
    side: float = 0.3

    def _check(self, where: str) -> None:
        _check_ratio(where, self.ratio)
        if not is_number(self.side) or not 0 < self.side < 1:
            refuse(where, "side", self.side, "a share in (0, 1)")

    def require_grid(self, rows: int, cols: int) -> None:
        height, width = rows * self.patch, cols * self.patch
        if min(int(self.side * height), int(self.side * width)) <= self.patch:
            raise DataError(
                f"mask {self.name!r}: side={self.side} of {height} x {width} pixels is no more than one patch of "
                f"{self.patch}; give a larger side or a smaller patch"
            )

    def _draw(self, rows: int, cols: int, rng: ViewRandom) -> IsHidden:
        self.require_grid(rows, cols)
        step = self.patch  # draws are in pixels, as published; only their results are whole cells
        height, width = rows * step, cols * step
        is_hidden = np.zeros((rows, cols), np.bool_)
        missing = _drawn(self.ratio, rng) * rows * cols
        while missing > 0:
            top, left = (rng.below(size - step) // step for size in (height, width))
            tall = self._drawn_side(height, height - top * step, rng)
            wide = self._drawn_side(width, width - left * step, rng)
            block = is_hidden[top : top + tall, left : left + wide]
            missing -= block.size - int(np.count_nonzero(block))
            block[...] = True
        return is_hidden

    def _drawn_side(self, whole: int, room: int, rng: ViewRandom) -> int:
        """Cells of one side: a draw in pixels below the limit and the room left, rounded."""
        return round(min(self.patch + rng.below(int(self.side * whole) - self.patch), room) / self.patch)


_KINDS: dict[str, type[Mask]] = {"random": RandomMask, "blocks": BlockMask, "grid": GridMask, "groups": GroupMask}


def mask_from(spec: Mapping[str, Any], view: str) -> Mask:
    """The mask stated by a mapping with `kind` and the attributes of that kind.

    Raises:
        DataError: a key is unknown or missing, or a value is refused.
    """
    where = f"view {view!r}, mask"
    if not isinstance(spec, Mapping):
        refuse(where, "mask", spec, "a mapping such as {kind: random, patch: 16, ratio: 0.75}")
    return read_spec(_KINDS, spec, where)


def _check_ratio(where: str, ratio: object) -> None:
    if not is_range((ratio, ratio) if is_number(ratio) else ratio, low=0.0, high=1.0):
        refuse(where, "ratio", ratio, "a share in 0..1 or [low, high]")


def _drawn(ratio: Ratio, rng: ViewRandom) -> float:
    return rng.uniform(*ratio) if isinstance(ratio, tuple) else ratio
