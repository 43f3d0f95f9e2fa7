"""Sheets of bounded size whose colors stay, and what of an encoder is on them."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from backbones.registry import create_backbone
from evaluation.data import EvaluationData
from evaluation.extraction.recipe import Reads
from evaluation.pictures.draw import draw
from evaluation.pictures.sheets import CAPTION, MOST_BYTES, Pixels, encoded, on_tiles, sheet, with_colors_of
from evaluation.pictures.tokens import token_rows
from evaluation.selection import spread
from evaluation.threads import Threads

GRID = (3, 8, 8)  # pictures, rows, columns
SETTINGS: dict[str, Any] = {"image_size": 32, "reads": Reads(), "device": "cpu", "threads": Threads(1)}


def pixels(png: bytes) -> Pixels:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def colors_sheet(colors: npt.NDArray[np.float64]) -> bytes:
    """Two rows, the upper one gray, of 64 pixels a tile."""
    rows = [on_tiles(np.full_like(colors, 0.5), (8, 8)), on_tiles(colors, (8, 8))]
    return encoded(sheet(rows), (64, 64))


def test_spread__over_all_samples_and_over_classes_in_whatever_order() -> None:
    assert spread(3, 8) == [0, 1, 2] and spread(8, 8) == [*range(8)] and len(spread(9, 8)) == 8
    for num_samples in (100, 2000, 10_000):
        numbers = spread(num_samples, 8)
        assert len(numbers) == 8 and max(np.diff([*numbers, num_samples])) <= num_samples / 4
        assert len({number * 10 // num_samples for number in numbers}) >= 6, "sorted by class"
        assert len({number % 10 for number in numbers}) >= 4, "classes in turn"


def test_sheet__tiles_stand_where_their_row_and_column_is() -> None:
    white, red = np.ones((2, 1, 2, 3)), np.array([1.0, 0, 0]).reshape(1, 1, 1, 3)
    picture = sheet([on_tiles(white * 0, (32, 64)), on_tiles(red, (32, 64))])
    assert picture.shape == (2 * 34, 2 * 66, 3)
    assert (picture[:32, :64] == 0).all() and (picture[:32, 66:130] == 0).all(), "a small picture fills its tile"
    assert (picture[34:66, :64] == (255, 0, 0)).all()
    assert (picture[32:34] == 255).all() and (picture[34:, 66:] == 255).all(), "what is free is white"


def test_on_tiles__large_images_are_shrunk_and_no_number_is_dark() -> None:
    noise = np.full((1, 400, 200, 3), 255, np.uint8)
    assert on_tiles(noise, (400, 200)).shape == (1, 96, 48, 3)
    with warnings.catch_warnings(action="error"):
        assert on_tiles(np.full((1, 2, 2, 3), np.nan), (8, 8)).max() == 0


def test_encoded__noise_is_no_larger_than_allowed_and_what_is_small_keeps_its_colors() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (5 * 98, 8 * 98, 3), np.uint8)
    noise[98:] = 0
    assert len(encoded(noise, (96, 96))) <= MOST_BYTES
    small = rng.integers(0, 256, (98, 98, 3), np.uint8)
    assert (pixels(encoded(small, (96, 96))) == small).all()


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_with_colors_of__components_that_changed_places_and_signs_keep_their_colors(
    order: tuple[int, ...], signs: tuple[int, ...]
) -> None:
    before = np.random.default_rng(0).random((*GRID, 3))
    now = np.clip(before + 0.05 * np.random.default_rng(1).standard_normal(before.shape), 0, 1)
    flipped = np.where(np.array(signs) < 0, 1 - now[..., order], now[..., order])
    same = pixels(with_colors_of(colors_sheet(flipped), colors_sheet(before), row=1))
    assert np.abs(same.astype(int) - pixels(colors_sheet(now))).max() <= 1, "the gaps are white as well"


def test_with_colors_of__sheets_that_do_not_match_stay_as_they_are() -> None:
    one, other = (np.random.default_rng(0).random((number, 8, 8, 3)) for number in (3, 2))
    assert with_colors_of(colors_sheet(one), colors_sheet(other), row=1) == colors_sheet(one)
    assert with_colors_of(colors_sheet(one), colors_sheet(one), row=1) == colors_sheet(one)


@pytest.mark.parametrize(("options", "num_rows"), [({}, 5), ({"class_token": False}, 4)])
def test_token_rows__attention_where_there_is_a_class_token(options: dict[str, object], num_rows: int) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    options = {"depth": 1, "embed_dim": 24, "num_heads": 2, **options}
    encoder = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options=options).eval()
    rows, caption = token_rows(encoder, images)
    assert len(rows) == num_rows and (rows[0] == images.permute(0, 2, 3, 1).numpy()).all()
    assert {row.shape for row in rows[1:]} == {(2, 4, 4, 3)}
    red = np.array([1, 0, 0])
    assert (rows[2][:, 2, 2] == red).all() and not (rows[3][:, 2, 2] == red).all()
    assert (rows[3] == red).all(-1).sum() == 2, "one patch of each image is marked, not the one in the middle"
    assert len(re.findall(r"-?\d\.\d\d to 1?\d?\.?\d*", caption)) == 4, "a range for each of two maps of two images"


def test_draw__is_small_and_the_same_for_the_same_weights(
    checkpoint: Callable[..., Path], colours: EvaluationData, tmp_path: Path
) -> None:
    """T11: two copies of a checkpoint have the same picture to the last bit."""
    found = [dict(draw(checkpoint(), colours, [], store=tmp_path, **SETTINGS)) for _ in range(2)]
    assert found[0] == found[1] and list(found[0]) == ["tokens"]
    assert pixels(found[0]["tokens"]).shape == (5 * 66, 8 * 66, 3)
    assert len(found[0]["tokens"]) <= MOST_BYTES
    assert Image.open(io.BytesIO(found[0]["tokens"])).info[CAPTION].startswith("cosines, from left to right: ")


def test_with_colors_of__keeps_the_caption() -> None:
    colors = np.random.default_rng(0).random((3, 8, 8, 3))
    picture = sheet([on_tiles(np.full_like(colors, 0.5), (8, 8)), on_tiles(1 - colors, (8, 8))])
    flipped = with_colors_of(encoded(picture, (64, 64), "said"), colors_sheet(colors), row=1)
    assert Image.open(io.BytesIO(flipped)).info[CAPTION] == "said"
    assert (pixels(flipped) == pixels(colors_sheet(colors))).mean() > 0.99
