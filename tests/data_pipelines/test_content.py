"""Copies: what is compared, and how many samples of a split are in another one."""

from __future__ import annotations

import numpy as np

from data_pipelines.content import compared_field, content_hash, copies_between


def test_compared_field__the_picture_before_arrays_and_masks() -> None:
    assert compared_field(["cls", "seg.png", "npy", "webp"], None) == "webp"
    assert compared_field(["seg.png", "volume.npy"], None) == "volume.npy"
    assert compared_field(["cls", "json"], None) is None
    assert compared_field(["png"], {"png": "mask"}) == "png"


def test_content_hash__golden() -> None:
    assert content_hash(b"picture") == 0xA2296F9A8E95066D != content_hash(b"other")


def test_copies_between__counts_samples_of_the_smaller_split() -> None:
    contents = {
        "train": np.array([1, 2, 3, 3, 0], np.uint64),
        "test": np.array([9, 3, 0, 3], np.uint64),
        "val": np.array([7], np.uint64),
    }
    (copies,) = copies_between(contents)
    assert str(copies) == "2 samples of test have the content of some of train" and copies.first == 1
