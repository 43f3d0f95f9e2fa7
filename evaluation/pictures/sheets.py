"""Sheets of pictures: tiles in rows and columns, as a PNG of bounded size; and colors that stay from one to the next.

Not here: what is on the tiles (`evaluation.pictures.tokens`, `evaluation.pictures.outcomes`).

Legend: n tiles of a row, (h, w) pixels of a tile.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evaluation.protocol import EvaluationError

__all__ = ["CAPTION", "MOST_BYTES", "Pixels", "encoded", "on_tiles", "sheet", "with_colors_of"]

Pixels = npt.NDArray[np.uint8]  # (..., h, w, 3)

MOST_BYTES = 60_000  # of a PNG: a checkpoint has up to five of a data set, 300 KB
GAP_PX = 2  # white, right of each tile and below it
LEAST_PX, MOST_PX = 64, 96  # of the longer side of a tile: smaller ones are enlarged
PALETTES = (256, 64, 16)  # colors of a PNG whose full colors would be too large
CAPTION = "caption"  # text of a PNG: what people should know of this very picture
TILE = "tile"  # text of a PNG: pixels of a tile with its gap, "HEIGHTxWIDTH"


def on_tiles(pictures: npt.NDArray[Any], size: tuple[int, int], most_px: int = MOST_PX) -> Pixels:
    """Pictures (n, rows, columns, 3), uint8 or in [0, 1], each filling a tile as suits images of `size` pixels.

    What is smaller than its tile is enlarged with sharp edges; what is larger is shrunk.

    Args:
        most_px: of the longer side of a tile; only images of up to half of `LEAST_PX` may get larger ones.
    """
    longer = max(size)
    scale = max(1, LEAST_PX // longer) if longer <= most_px else most_px / longer
    height, width = (max(1, round(side * scale)) for side in size)
    pixels = pictures if pictures.dtype == np.uint8 else _bytes(pictures)
    is_larger = pixels.shape[1] > height or pixels.shape[2] > width
    how = Image.Resampling.BOX if is_larger else Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(one).resize((width, height), how)) for one in pixels])


def _bytes(shares: npt.NDArray[Any]) -> Pixels:
    """Shares of full brightness; what is no number is dark."""
    return np.round(np.clip(np.nan_to_num(shares), 0, 1) * 255).astype(np.uint8)


def sheet(rows: Sequence[Pixels]) -> Pixels:
    """Rows of tiles (n, h, w, 3), all of one size, as one picture; a row with fewer tiles ends earlier."""
    columns = max(len(row) for row in rows)
    _, height, width, _ = rows[0].shape
    canvas = np.full((len(rows), height + GAP_PX, columns, width + GAP_PX, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        canvas[number, :height, : len(row), :width] = row.swapaxes(0, 1)
    return canvas.reshape(len(rows) * (height + GAP_PX), columns * (width + GAP_PX), 3)


def encoded(picture: Pixels, tile: tuple[int, int] | None = None, caption: str = "") -> bytes:
    """A PNG of at most `MOST_BYTES`, in full color where these are enough.

    Args:
        tile: Pixels (height, width) of one, which the PNG then says.
        caption: For people; the PNG says it as well.

    Raises:
        EvaluationError: it would be larger even with the fewest colors.
    """
    info = PngInfo()
    if tile is not None:
        info.add_text(TILE, f"{tile[0] + GAP_PX}x{tile[1] + GAP_PX}")
    if caption:
        info.add_text(CAPTION, caption)
    image = Image.fromarray(picture)
    for colors in (None, *PALETTES):
        content = io.BytesIO()
        shown = image if colors is None else image.quantize(colors)
        shown.save(content, format="PNG", pnginfo=info, optimize=True)
        if content.tell() <= MOST_BYTES:
            return content.getvalue()
    raise EvaluationError(f"a picture of {picture.shape[1]} x {picture.shape[0]} pixels takes more than {MOST_BYTES} B")


def with_colors_of(png: bytes, before: bytes, *, row: int) -> bytes:
    """A sheet whose `row` has its red, green and blue in the order and direction that are most like those of another.

    Principal components have no sign, and near ones change places; so colors would flip from checkpoint to checkpoint.
    Of the 48 ways to assign them that is taken whose channels correlate most with those of the sheet before, over all
    pixels of the row. Sheets whose rows differ in shape are left as they are.
    """
    new, old = _read(png), _read(before)
    here, there = (_row(picture, tile, row) for picture, tile, _ in (new, old))
    if here.shape != there.shape:
        return png
    correlation = _correlation(here, there)  # (3 of the new one, 3 of the old one)
    order = max(permutations(range(3)), key=lambda order: sum(abs(correlation[order, range(3)])))
    is_flipped = correlation[order, range(3)] < 0
    if order == (0, 1, 2) and not is_flipped.any():
        return png
    channels = here[..., order]
    is_gap = _is_gap(here.shape, new[1])
    here[...] = np.where(is_flipped & ~is_gap, 255 - channels, channels)
    picture, tile, caption = new
    return encoded(picture, (tile[0] - GAP_PX, tile[1] - GAP_PX), caption)


def _read(png: bytes) -> tuple[Pixels, tuple[int, int], str]:
    """Its pixels, those of a tile with its gap, and its caption."""
    with Image.open(io.BytesIO(png)) as image:
        image.load()
        height, _, width = str(image.info.get(TILE, "1x1")).partition("x")
        return np.array(image.convert("RGB")), (int(height), int(width)), str(image.info.get(CAPTION, ""))


def _row(picture: Pixels, tile: tuple[int, int], row: int) -> Pixels:
    """A view of one row of tiles with their gaps."""
    return picture[row * tile[0] : (row + 1) * tile[0]]


def _is_gap(shape: Iterable[int], tile: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """(h, all w, 1) of one row of tiles."""
    height, width, _ = shape
    rows, columns = (np.arange(side) % of >= of - GAP_PX for side, of in zip((height, width), tile, strict=True))
    return (rows[:, None] | columns[None, :])[..., None]


def _correlation(new: Pixels, old: Pixels) -> npt.NDArray[np.float64]:
    """(3, 3) between the channels; 0 of one that is the same everywhere."""
    centered = [picture.reshape(-1, 3).astype(np.float64) for picture in (new, old)]
    centered = [channels - channels.mean(axis=0) for channels in centered]
    lengths = [np.maximum(np.linalg.norm(channels, axis=0), 1e-12) for channels in centered]
    return (centered[0].T @ centered[1]) / lengths[0][:, None] / lengths[1]
