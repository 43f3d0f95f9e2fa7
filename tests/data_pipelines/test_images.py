"""Crops: reproducible, inside the image, with the stated distribution."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.kinds.images import ImageView, random_resized_crop


def coordinates(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 whose red is the column and green the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


def test_random_resized_crop__same_key_same_pixels(grocery: Dataset) -> None:
    image, view = decode_image(grocery.read(3)["jpg"]), ImageView("v", 48)
    first, again, other = (random_resized_crop(image, view, ViewRandom(k)) for k in (11, 11, 12))
    assert first.shape == (3, 48, 48) and first.dtype == torch.uint8 and first.is_contiguous()
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(first, random_resized_crop(Image.fromarray(image), view, ViewRandom(11)))


def test_random_resized_crop__whole_image_is_the_plain_resize(grocery: Dataset) -> None:
    image = decode_image(grocery.read(0)["jpg"])[:90, :90]
    crop = random_resized_crop(image, ImageView("v", 40, scale=(1.0, 1.0), ratio=(1.0, 1.0), hflip=0), ViewRandom(5))
    expected = np.asarray(Image.fromarray(image).resize((40, 40), Image.Resampling.BICUBIC))
    assert np.array_equal(crop.permute(1, 2, 0).numpy(), expected)


def test_random_resized_crop__flip_is_a_mirror() -> None:
    image = coordinates(30, 40)
    shared: dict[str, Any] = {"name": "v", "size": 16}
    plain = random_resized_crop(image, ImageView(**shared, hflip=0), ViewRandom(3))
    flipped = random_resized_crop(image, ImageView(**shared, hflip=1), ViewRandom(3))
    assert torch.equal(flipped, plain.flip(2)) and not torch.equal(flipped, plain)
    half = [random_resized_crop(image, ImageView(**shared), ViewRandom(k))[0, 0] for k in range(400)]
    assert 150 < sum(bool(row[0] > row[-1]) for row in half) < 250


def test_random_resized_crop__boxes_have_the_asked_area_and_aspect() -> None:
    image, view = coordinates(120, 160), ImageView("v", 64, scale=(0.3, 0.6), ratio=(0.5, 2.0), hflip=0)
    areas, aspects, lefts = [], [], []
    for k in range(500):
        crop = random_resized_crop(image, view, ViewRandom(k)).float()
        width = float(crop[0, 32, -1] - crop[0, 32, 0]) * 64 / 63  # centres of the outermost pixels to edges
        height = float(crop[1, -1, 32] - crop[1, 0, 32]) * 64 / 63
        areas.append(width * height / (120 * 160))
        aspects.append(width / height)
        lefts.append(float(crop[0, 32, 0]))
    assert min(areas) > 0.27 and max(areas) < 0.65 and abs(np.mean(areas) - 0.44) < 0.03
    assert min(aspects) > 0.45 and max(aspects) < 2.2 and abs(np.mean(np.log(aspects))) < 0.15
    assert np.std(lefts) > 15  # boxes are not stuck at one place


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 3), (500, 20)])
def test_random_resized_crop__degenerate_images(shape: tuple[int, int]) -> None:
    for k in range(20):
        assert random_resized_crop(coordinates(*shape), ImageView("v", 8), ViewRandom(k)).shape == (3, 8, 8)


def test_random_resized_crop__refuses_other_arrays() -> None:
    images: list[Any] = [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3), np.float32)]
    for image in images:
        with pytest.raises(DataError, match=r"is not \(H, W, 3\) uint8"):
            random_resized_crop(image, ImageView("v", 8), ViewRandom(0))
