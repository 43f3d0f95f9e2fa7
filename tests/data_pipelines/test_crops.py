"""Rectangles inside the picture with the stated overlap; pixels that belong to the rectangle, in every kind."""

from __future__ import annotations

import io
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import Photo
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.crops import (
    ArrayPicture,
    Box,
    Crop,
    PhotoPicture,
    ValuePicture,
    draw_box,
    draw_overlapping_box,
    eval_view,
    photo_crop,
)

RATIO = (3 / 4, 4 / 3)


def lies_inside(box: Box, width: int, height: int) -> bool:
    left, top, w, h = box
    return left >= 0 and top >= 0 and w > 0 and h > 0 and left + w <= width and top + h <= height


def test_draw_box__golden() -> None:
    """Recorded from the first version of the crops: what a key draws must not change."""
    boxes = [draw_box(480, 360, (0.2, 1.0), RATIO, ViewRandom(k)) for k in (0, 1, 2)]
    assert boxes == [(27, 62, 224, 171), (116, 21, 361, 313), (68, 33, 366, 317)]


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_draw_overlapping_box__covers_the_share(share: float) -> None:
    frames = [(480, 360), (33, 100), (5, 5), (1, 7)]
    for (width, height), seed in itertools.product(frames, range(150)):
        rng = ViewRandom(seed)
        other = draw_box(width, height, (0.05, 1.0), (0.5, 2.0), rng)
        box = draw_overlapping_box(width, height, (0.05, 0.6), (0.5, 2.0), rng, other=other, share=share)
        assert lies_inside(box, width, height)
        assert box.shared_area(other) >= share * min(box.area, other.area)


def test_draw_overlapping_box__keeps_the_drawn_box_when_it_can() -> None:
    rng, other = ViewRandom(3), Box(0, 0, 100, 100)
    free = draw_box(100, 100, (0.2, 0.4), RATIO, ViewRandom(3))
    assert draw_overlapping_box(100, 100, (0.2, 0.4), RATIO, rng, other=other, share=1.0) == free


def test_draw_overlapping_box__far_apart_is_moved_inside() -> None:
    """A tiny anchor in a corner: ten draws of a small box rarely meet it."""
    other = Box(990, 990, 10, 10)
    for seed in range(20):
        box = draw_overlapping_box(1000, 1000, (1e-4, 2e-4), RATIO, ViewRandom(seed), other=other, share=0.9)
        assert box.shared_area(other) >= 0.9 * min(box.area, other.area)


def test_crop__as_row_and_in_another_frame() -> None:
    crop = Crop(Box(10, 20, 50, 40), True, (100, 80))
    assert crop.as_row() == [0.1, 0.25, 0.5, 0.5, 1.0]
    assert crop.box_in(100, 80) == Box(10, 20, 50, 40)
    assert crop.box_in(50, 40) == Box(5, 10, 25, 20)
    assert crop.box_in(34, 27).width == pytest.approx(17)  # a third, rounded: still the same frame
    with pytest.raises(DataError, match="100 x 60 pixels do not show the same frame as the 100 x 80"):
        crop.box_in(100, 60)


@pytest.mark.parametrize("resampler", ["pil", "torch"])
def test_photo_picture__resamplers_agree(grocery: Dataset, resampler: str) -> None:
    """torch differs from PIL by rounding, and at the border, where PIL looks beyond the crop."""
    data = grocery.read(1)["jpg"]
    photo = Photo(data)
    picture = PhotoPicture(Photo(data), resampler)
    for seed in range(20):
        box = draw_box(photo.width, photo.height, (0.2, 1.0), RATIO, ViewRandom(seed))
        crop = Crop(box, seed % 2 == 0, (photo.width, photo.height))
        out = np.empty((3, 32, 32), np.uint8)
        picture.cut(crop, out)
        expected = photo_crop(photo.image, box, 32, crop.is_flipped)
        difference = np.abs(out.astype(int) - expected)
        if resampler == "pil":
            assert difference.max() == 0
        else:
            assert difference[:, 3:-3, 3:-3].max() <= 2 and difference.mean() < 1.0


def test_array_picture__three_8_bit_channels_equal_the_photo(grocery: Dataset) -> None:
    photo = Photo(grocery.read(2)["jpg"])
    values = np.ascontiguousarray(photo.pixels.transpose(2, 0, 1))
    whole = Crop(Box(5, 3, 60, 70), True, (photo.width, photo.height))
    first, second = np.empty((3, 40, 40), np.uint8), np.empty((3, 40, 40), np.uint8)
    PhotoPicture(photo, "torch").cut(whole, first)
    ArrayPicture(values).cut(whole, second)
    assert np.array_equal(first, second)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float16, np.float32])
def test_array_picture__identity_keeps_every_value(dtype: type[np.generic]) -> None:
    values = np.random.default_rng(0).uniform(0, 30000, (13, 24, 24)).astype(dtype)
    picture = ArrayPicture(values)
    assert picture.dtype == (np.float32 if np.dtype(dtype).kind == "f" else dtype)
    out = np.empty((13, 24, 24), picture.dtype)
    picture.cut(Crop(Box(0, 0, 24, 24), False, (24, 24)), out)
    assert np.array_equal(out, values)
    picture.cut(Crop(Box(0, 0, 24, 24), True, (24, 24)), out)
    assert np.array_equal(out, values[..., ::-1])


def test_array_picture__16_bits_are_clipped_not_wrapped() -> None:
    """A bicubic filter overshoots at edges."""
    values = np.zeros((1, 16, 16), np.uint16)
    values[:, :, 8:] = 65535
    out = np.empty((1, 40, 40), np.uint16)
    ArrayPicture(values).cut(Crop(Box(0, 0, 16, 16), False, (16, 16)), out)
    assert out[0, 5, 0] == 0 and out[0, 5, -1] == 65535 and (np.diff(out[0, 5].astype(int)) >= -3000).all()
    assert out[0, 5, :15].max() < 1000 and out[0, 5, 25:].min() > 64000


def test_array_picture__refuses_what_has_no_middle() -> None:
    for dtype in (np.int64, np.bool_, np.uint32):
        with pytest.raises(DataError, match=r"cannot be resized smoothly; .* resize: nearest"):
            ArrayPicture(np.zeros((1, 4, 4), dtype))


def test_value_picture__takes_only_values_that_are_there() -> None:
    values = np.random.default_rng(0).choice(np.array([0, 7, 11, 65535], np.uint16), (1, 50, 70))
    picture = ValuePicture(values)
    for seed in range(30):
        box = draw_box(70, 50, (0.01, 1.0), RATIO, ViewRandom(seed))
        out = np.empty((1, 33, 33), np.uint16)
        picture.cut(Crop(box, False, (70, 50)), out)
        left, top, w, h = map(int, box)
        assert set(np.unique(out)) <= set(np.unique(values[0, top : top + h, left : left + w]))


def test_value_picture__nearest_is_the_pixel_below_the_centre() -> None:
    values = np.arange(6 * 8).reshape(1, 6, 8)
    out = np.empty((1, 3, 3), values.dtype)
    ValuePicture(values).cut(Crop(Box(2, 0, 6, 6), True, (8, 6)), out)
    rows, cols = [1, 3, 5], [7, 5, 3]  # centres of thirds of six pixels lie between two; the right one holds the centre
    assert out[0].tolist() == [[r * 8 + c for c in cols] for r in rows]


def test_photo_picture__reduced_photo_shows_the_same_place() -> None:
    rows, cols = np.mgrid[:512, :640]
    smooth = np.stack([cols * 255 / 639, rows * 255 / 511, 0 * rows], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(smooth).save(file, "JPEG", quality=95)
    crop = Crop(Box(101, 67, 300, 280), True, (640, 512))
    for resampler in ("pil", "torch"):
        outs = []
        for factor in (1, 2, 4):
            photo = Photo(file.getvalue())
            photo.reduce(factor)
            picture = PhotoPicture(photo, resampler)
            outs.append(np.empty((3, 64, 64), np.uint8))
            picture.cut(crop, outs[-1])
        for out in outs[1:]:
            assert np.abs(out[:2].astype(int) - outs[0][:2]).max() <= 3


def test_draw_box__inside_for_any_frame() -> None:
    for width, height, seed in itertools.product((1, 2, 9, 500), (1, 3, 400), range(25)):
        assert lies_inside(draw_box(width, height, (0.01, 1.0), RATIO, ViewRandom(seed)), width, height)
    assert math.isclose(Box(1, 2, 3, 4).area, 12)


@pytest.mark.parametrize("shape", [(96, 96), (96, 128), (131, 96), (40, 300)])
@pytest.mark.parametrize(("size", "shorter"), [(32, 32), (64, 73), (112, 128), (224, 256)])
def test_eval_view__equals_torchvision_resize_and_centre_crop(shape: tuple[int, int], size: int, shorter: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    usual = transforms.Compose(
        [
            transforms.Resize(shorter, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.PILToTensor(),
        ]
    )
    assert torch.equal(eval_view(image, size), usual(Image.fromarray(image)))


def test_eval_view__same_size_is_untouched() -> None:
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    assert np.array_equal(eval_view(image, 32).permute(1, 2, 0).numpy(), image)
