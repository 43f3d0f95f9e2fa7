"""What a head made of test samples, as pictures: confusion of classes, nearest neighbors, maps of classes.

They are drawn of the arrays that a protocol keeps with its result (`Outcome.shown`), whichever protocol it is:

* `predicted` and `labels`, (n,) classes of the test samples: a confusion matrix.
* `asked` (q,) test samples, and `neighbors` (q, k) samples of train, the nearest first: these images side by side.
* `asked` (q,) test samples, `truth` and `guess` (q, h, w) classes, `IGNORED` where ignored: both over the images, and
  where they differ.

Not here: what an encoder makes of its patches (`evaluation.pictures.tokens`).

Legend: C classes, q test samples that are asked for, (h, w) pixels of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from data_pipelines.inspection.thumbnails import class_colors
from data_pipelines.shards.dataset import Dataset
from evaluation.data import IGNORED, EvaluationData, OpenedData, class_label
from evaluation.extraction.images import IMAGES
from evaluation.pictures.sheets import Pixels, encoded, on_tiles, sheet
from evaluation.protocol import Protocol
from evaluation.protocols.label_maps import nearest

__all__ = ["OutcomePictures", "confusion_counts", "confusion_picture", "framed", "overlay_rows"]

Arrays = Mapping[str, npt.NDArray[Any]]
Places = npt.NDArray[np.int64]

MOST_NAMED = 20  # classes with names beside the matrix or below the maps
MOST_CELLS = 240  # of a side of the matrix; of more classes neighbors share a cell
NAMED_CELL_PX, MATRIX_PX = 24, 480
NEIGHBOR_PX, MAP_PX = 48, 80  # of a tile: noise in 36 and in 16 of them still is no larger than a picture may be
FRAME_PX = 3
FONT_PX, LINE_PX, MOST_LETTERS = 10, 14, 16
WHITE, INK, NOBODY = (255, 255, 255), (8, 48, 107), (225, 225, 225)  # a share of 0 and of 1; no sample of the class
RIGHT, WRONG = (40, 160, 60), (230, 30, 30)
TINT, DIMMED = 0.6, 0.4  # share of the color of a class over an image; brightness of what is right


@dataclass(frozen=True)
class OutcomePictures:
    """The pictures of one result.

    Attributes:
        spec: Its protocol.
        shown: What was kept with it.
        data: What it is of.
        inputs: Fields of which one holds what the backbone was given.
        size: Pixels (height, width) that images were brought to; None: the samples are no images.
    """

    spec: Protocol
    shown: Arrays
    data: EvaluationData
    inputs: tuple[str, ...]
    size: tuple[int, int] | None

    def drawings(self) -> dict[str, Callable[[], bytes]]:
        """What draws each of them, by its kind `PROTOCOL_...`: a PNG of at most `sheets.MOST_BYTES`."""
        found: dict[str, Callable[[], bytes]] = {}
        if self._has("predicted", "labels"):
            found["confusion"] = self._confusion
        if self.size is not None and self._has("asked", "neighbors"):
            found["neighbors"] = partial(self._neighbors, self.size)
        if self.size is not None and self._has("asked", "truth", "guess"):
            found["maps"] = partial(self._maps, self.size)
        return {f"{self.spec.name}_{kind}": drawing for kind, drawing in found.items()}

    def _has(self, *names: str) -> bool:
        return set(names) <= self.shown.keys()

    def _opened(self) -> OpenedData:
        return self.data.open(self.spec, self.inputs)

    def _confusion(self) -> bytes:
        classes = self._opened().classes
        counts = confusion_counts(self.shown["predicted"], self.shown["labels"], len(classes or ()))
        return encoded(confusion_picture(counts, classes))

    def _neighbors(self, size: tuple[int, int]) -> bytes:
        """A row for each test image: itself, then its neighbors, framed by whether they are of its class."""
        opened, rows = self._opened(), []
        for asked, neighbors in zip(self.shown["asked"], self.shown["neighbors"], strict=True):
            label = class_label(opened.test.read(int(asked)), opened.classes)
            found = [class_label(opened.train.read(int(number)), opened.classes) for number in neighbors]
            images = [*self._images(opened.test, [asked], size), *self._images(opened.train, neighbors, size)]
            tiles = on_tiles(np.stack(images), images[0].shape[:2], NEIGHBOR_PX)
            rows.append(np.concatenate((tiles[:1], framed(tiles[1:], np.array(found) == label))))
        return encoded(sheet(rows))

    def _maps(self, size: tuple[int, int]) -> bytes:
        opened = self._opened()
        images = on_tiles(np.stack(self._images(opened.test, self.shown["asked"], size)), size, MAP_PX)
        rows = overlay_rows(images, self.shown["truth"], self.shown["guess"])
        picture = sheet(rows)
        present = np.unique((self.shown["truth"], self.shown["guess"]))
        present = present[present != IGNORED]
        if opened.classes is None or len(present) > MOST_NAMED:
            return encoded(picture)
        named = [(opened.classes[number], class_colors()[number % 256]) for number in present]
        return encoded(np.concatenate((picture, _legend(named, picture.shape[1]))))

    def _images(self, dataset: Dataset, numbers: Sequence[int] | Places, size: tuple[int, int]) -> list[Pixels]:
        """As the backbone was given them, (H, W, 3) each."""
        field, recipe = dataset.require_field(*self.inputs), {"tokens": self.spec.tokens, "size": size}
        prepared: list[Any] = [IMAGES.prepare(dataset.read(int(number))[field], recipe) for number in numbers]
        return [image.permute(1, 2, 0).numpy() for image in prepared]


def confusion_counts(predicted: npt.NDArray[Any], labels: npt.NDArray[Any], num_classes: int) -> Places:
    """How many samples of a class (row) were taken for a class (column): (C, C), C as many as there are at least."""
    size = 1 + max(num_classes - 1, int(predicted.max()), int(labels.max()))
    cells = labels.astype(np.int64) * size + predicted
    return np.bincount(cells, minlength=size**2).reshape(size, size)


def confusion_picture(counts: Places, classes: Sequence[str] | None) -> Pixels:
    """A confusion matrix (C, C): the darker, the larger the share of the class of the row; gray where that has none.

    Ink is the square root of the share, so that what is rare is seen. Up to `MOST_NAMED` classes have their names
    beside it and percents in it; above `MOST_CELLS` several neighbors in the list of classes share a row and a column.

    Args:
        classes: their names; None: their numbers stand for them.
    """
    num_classes = len(counts)
    if num_classes > MOST_CELLS:
        starts = np.arange(0, num_classes, -(-num_classes // MOST_CELLS))
        counts = np.add.reduceat(np.add.reduceat(counts, starts, axis=0), starts, axis=1)
    of_class = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(of_class, 1)
    ink = np.sqrt(shares)[..., None]
    cells = np.where(of_class[..., None] > 0, (1 - ink) * WHITE + ink * np.array(INK), NOBODY).round().astype(np.uint8)
    is_named = num_classes <= MOST_NAMED
    side = NAMED_CELL_PX if is_named else MATRIX_PX // len(counts)
    matrix = cells.repeat(side, axis=0).repeat(side, axis=1)
    if not is_named:
        return matrix
    return _with_names(_with_percents(matrix, shares), classes or [str(number) for number in range(num_classes)])


def _with_percents(matrix: Pixels, shares: npt.NDArray[np.float64]) -> Pixels:
    image, font = Image.fromarray(matrix), ImageFont.load_default(FONT_PX - 1)
    pen = ImageDraw.Draw(image)
    for row, column in np.argwhere(shares >= 0.005):
        at = ((column + 0.5) * NAMED_CELL_PX, (row + 0.5) * NAMED_CELL_PX)
        ink = WHITE if shares[row, column] > 0.25 else INK
        pen.text(at, f"{100 * shares[row, column]:.0f}", fill=ink, font=font, anchor="mm")
    return np.array(image)


def _with_names(matrix: Pixels, names: Sequence[str]) -> Pixels:
    """Names of the rows to the left, and those of the columns above, upright."""
    font = ImageFont.load_default(FONT_PX)
    shown = [_short(name) for name in names]
    margin = 8 + round(max(font.getlength(name) for name in shown))
    canvas = Image.new("RGB", (margin + matrix.shape[1], margin + matrix.shape[0]), WHITE)
    canvas.paste(Image.fromarray(matrix), (margin, margin))
    above = Image.new("RGB", (margin, matrix.shape[1]), WHITE)
    for number, name in enumerate(shown):
        middle = (number + 0.5) * NAMED_CELL_PX
        ImageDraw.Draw(canvas).text((margin - 4, margin + middle), name, fill=(0, 0, 0), font=font, anchor="rm")
        ImageDraw.Draw(above).text((4, middle), name, fill=(0, 0, 0), font=font, anchor="lm")
    canvas.paste(above.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    return np.array(canvas)


def _short(name: str) -> str:
    return " ".join(name.split())[:MOST_LETTERS]


def framed(tiles: Pixels, is_right: npt.NDArray[np.bool_]) -> Pixels:
    """Tiles (n, h, w, 3) in frames, green where `is_right` (n,) and red elsewhere."""
    colors = np.where(is_right[:, None], RIGHT, WRONG).astype(np.uint8)[:, None, None]  # (n, 1, 1, 3)
    found = np.broadcast_to(colors, tiles.shape).copy()
    inside = (slice(None), slice(FRAME_PX, -FRAME_PX), slice(FRAME_PX, -FRAME_PX))
    found[inside] = tiles[inside]
    return found


def overlay_rows(images: Pixels, truth: npt.NDArray[Any], guess: npt.NDArray[Any]) -> list[Pixels]:
    """Rows of tiles (q, h, w, 3): images; truth over them; guess over them; errors in red.

    A class has the color that it has in pictures of the data. What is ignored has none, and is black among errors.

    Args:
        images: (q, h, w, 3).
        truth, guess: classes (q, H, W) of any size, `IGNORED` where truth is.
    """
    size = images.shape[1:3]
    truth, guess = (np.stack([nearest(labels, size) for labels in maps]) for maps in (truth, guess))
    colors, is_ignored = class_colors(), (truth == IGNORED)[..., None]

    def over(labels: npt.NDArray[Any]) -> Pixels:
        return ((1 - TINT) * images + TINT * colors[labels % len(colors)]).round().astype(np.uint8)

    dimmed = (DIMMED * images).astype(np.uint8)
    errors = np.where((truth != guess)[..., None], np.array(WRONG, np.uint8), dimmed)
    return [images, np.where(is_ignored, images, over(truth)), over(guess), np.where(is_ignored, np.uint8(0), errors)]


def _legend(named: Sequence[tuple[str, Pixels]], width: int) -> Pixels:
    """Colors with the names of their classes, in lines of `width` pixels."""
    font = ImageFont.load_default(FONT_PX)
    places, x, y = [], 0, 0
    for name, color in named:
        needed = LINE_PX + round(font.getlength(_short(name))) + 8
        if x and x + needed > width:
            x, y = 0, y + LINE_PX
        places.append((x, y, _short(name), color))
        x += needed
    strip = Image.new("RGB", (width, y + LINE_PX), WHITE)
    pen = ImageDraw.Draw(strip)
    for x, y, name, color in places:
        pen.rectangle((x, y + 2, x + 9, y + 11), fill=(int(color[0]), int(color[1]), int(color[2])))
        pen.text((x + LINE_PX, y + LINE_PX // 2), name, fill=(0, 0, 0), font=font, anchor="lm")
    return np.array(strip)
