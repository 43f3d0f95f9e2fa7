"""Crops: reproducible, inside the image, with the stated distribution; the evaluation crop is the usual one. Plain data
to views, and what is refused.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.errors import DataError
from data_pipelines.randomness import ViewRandom, sample_seed
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.crops import eval_view
from data_pipelines.views.kinds.images import ImageView, random_resized_crop
from data_pipelines.views.photometric import Photometric
from data_pipelines.views.specs import views_from


def coordinates(height: int, width: int) -> np.ndarray:
    """(H, W, 3) uint8 whose red is the column and green the row."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], axis=-1).astype(np.uint8)


def test_view_random__is_splitmix64() -> None:
    """First outputs of SplitMix64 from state 0, as in the JDK's SplittableRandom(0)."""
    rng = ViewRandom(0)
    assert [rng.below(1 << 64) for _ in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_view_random__uniform_and_below_cover_their_range() -> None:
    rng = ViewRandom(7)
    floats = np.array([rng.uniform(2.0, 5.0) for _ in range(20_000)])
    assert floats.min() >= 2 and floats.max() < 5 and abs(floats.mean() - 3.5) < 0.03
    assert abs(np.corrcoef(floats[:-1], floats[1:])[0, 1]) < 0.03
    counts = np.bincount([rng.below(5) for _ in range(20_000)], minlength=5)
    assert len(counts) == 5 and (np.abs(counts - 4000) < 300).all()
    assert ViewRandom(1).below(1) == 0


def test_sample_seed__differs_in_every_part() -> None:
    seeds = {sample_seed(s, e, i) for s in range(5) for e in range(5) for i in range(200)}
    assert len(seeds) == 5 * 5 * 200


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


def test_views_from__plain_data() -> None:
    specs = [{"name": "global", "size": 96, "count": 2, "scale": [0.4, 1.0]}, {"name": "local", "size": 32, "hflip": 0}]
    assert views_from(specs) == (ImageView("global", 96, 2, (0.4, 1.0)), ImageView("local", 32, hflip=0))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"name": "v", "sise": 8},
            "unknown key 'sise'; allowed: name, size, count, scale, ratio, hflip, field, array, channels, resize, "
            "same_crop_as, overlap_with, min_overlap, return_box, photometric, kind; did you mean 'size'?",
        ),
        ({"name": "v"}, "'size' is missing"),
        ({"size": 8}, "'name' is missing"),
        ({"name": "seed", "size": 8}, "view name 'seed' is not allowed"),
        ({"name": "", "size": 8}, "view name '' is not allowed"),
        ({"name": "v", "size": 0}, "size=0 is not allowed; it is an integer from 1"),
        ({"name": "v", "size": 8.0}, "size=8.0 is not allowed"),
        ({"name": "v", "size": True}, "size=True is not allowed"),
        ({"name": "v", "size": 8, "count": 0}, "count=0 is not allowed"),
        ({"name": "v", "size": 8, "scale": [0.5, 0.2]}, "scale=(0.5, 0.2) is not allowed"),
        ({"name": "v", "size": 8, "scale": [0.0, 1.0]}, "scale=(0.0, 1.0) is not allowed"),
        ({"name": "v", "size": 8, "scale": [0.2, 1.5]}, "scale=(0.2, 1.5) is not allowed"),
        (
            {"name": "v", "size": 8, "scale": 0.5},
            "scale=0.5 is not allowed; it is [low, high] with 0 < low <= high <= 1",
        ),
        ({"name": "v", "size": 8, "ratio": ["a", 1]}, "ratio=('a', 1) is not allowed"),
        ({"name": "v", "size": 8, "ratio": [1, float("inf")]}, "ratio=(1, inf) is not allowed"),
        ({"name": "v", "size": 8, "hflip": 1.1}, "hflip=1.1 is not allowed; it is a probability"),
        ({"name": "v", "size": 8, "hflip": float("nan")}, "hflip=nan is not allowed"),
    ],
)
def test_views_from__refuses(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        views_from([spec])


def test_views_from__names_are_distinct_and_there_is_one() -> None:
    with pytest.raises(DataError, match="view name 'v' is used twice"):
        views_from([{"name": "v", "size": 8}, {"name": "v", "size": 16}])
    with pytest.raises(DataError, match="no view is asked for"):
        views_from([])


def test_views_from__colors() -> None:
    views = views_from([{"name": "v", "size": 32, "photometric": {"blur_p": 0.5}}])
    assert views == (ImageView("v", 32, photometric=Photometric(blur_p=0.5)),)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": "images"}, "kind='images' is not allowed; it is one of array, image, label, points, volume; did you"),
        ({"same_crop_as": "aa"}, "view 'v': same_crop_as='aa' is not allowed; it is one of a; did you mean 'a'?"),
        ({"same_crop_as": "v"}, "same_crop_as='v' is not allowed"),
        ({"same_crop_as": "a", "hflip": 0}, "hflip=0 has no effect, the crops are those of 'a'; leave it out"),
        ({"overlap_with": "a"}, "overlap_with and min_overlap belong together"),
        ({"overlap_with": "a", "min_overlap": 2}, "min_overlap=2 is not allowed"),
        ({"overlap_with": "a", "min_overlap": 0.5, "count": 3}, "count=3 differs from 2 of 'a'"),
        ({"resize": "bilinear"}, "resize='bilinear' is not allowed; it is one of bicubic, nearest"),
        ({"channels": 3}, "channels=3 is not allowed; it is a list of channel numbers"),
        ({"channels": [-1]}, "channels=-1 is not allowed"),
        ({"resize": "nearest", "field": "x.png", "photometric": {}}, "photometric changes colors"),
        ({"photometric": {"blurp": 1}}, "view 'v', photometric: unknown key 'blurp'"),
        ({"mask": {"kind": "random", "patch": 4, "ratio": 0.5}}, "unknown key 'mask'"),
        ({"name": "v.w"}, "view name 'v.w' is not allowed; give a name other than sample_id, seed, without a dot"),
    ],
)
def test_views_from__refuses_relations_and_extras(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as caught:
        views_from([{"name": "a", "size": 8, "count": 2}, {"name": "v", "size": 8, **spec}])
    assert "\n" not in str(caught.value)
