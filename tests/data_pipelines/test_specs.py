"""Plain data to views, and what is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.views.kinds.images import ImageView
from data_pipelines.views.photometric import Photometric
from data_pipelines.views.specs import views_from


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
