"""Names of fields to kinds."""

from __future__ import annotations

import pytest

from data_pipelines.field_kinds import (
    FIELD_KINDS,
    cut_names,
    field_kind,
    is_never_read,
    kind_of_field,
    picture_names,
    shared_names,
    under_shared_names,
)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("jpg", "image"),
        ("left.png", "image"),
        ("seg.png", "mask"),
        ("left.seg.png", "mask"),
        ("depth.png", "depth"),
        ("points.npy", "points"),
        ("volume.npy", "volume"),
        ("grid.npy", "volume"),
        ("pose.npy", "array"),
        ("seg.npy", "mask"),
        ("labels.npy", "mask"),
        ("npz", "array"),
        ("cls", "label"),
        ("JSON", "json"),
        ("txt", "text"),
        ("pyd", None),
        ("pkl", None),
        ("pth", None),
        ("mp4", None),
    ],
)
def test_field_kind__goes_by_the_name(name: str, kind: str | None) -> None:
    assert field_kind(name) == kind
    assert kind is None or kind in FIELD_KINDS


def test_kind_of_field__what_the_data_set_says_counts_unless_it_is_no_kind_or_code() -> None:
    declared = {"png": "mask", "jpg": "film", "x.pkl": "json"}
    kinds = [kind_of_field(name, declared) for name in ("png", "jpg", "cls", "x.pkl")]
    assert kinds == ["mask", "image", "label", None]
    assert kind_of_field("png", ["png"]) == "image"


def test_is_never_read__also_below_a_compression() -> None:
    assert is_never_read("pkl.gz") and is_never_read("PYD") and not is_never_read("npy")


def test_picture_names__masks_have_one_name() -> None:
    assert picture_names("left.png") == ("left.jpg", "left.jpeg", "left.png", "left.webp")
    assert picture_names("seg.png") == picture_names("npy") == ()


@pytest.mark.parametrize(
    ("sets", "shared"),
    [
        (["jpg cls", "png cls"], "jpg cls"),
        (["png cls", "webp cls", "png"], "png"),
        (["jpg seg.png", "jpg"], "jpg"),
        (["jpg png", "png"], "png"),
        (["jpg png", "webp"], ""),
        (["left.jpg right.jpg", "left.png right.jpg"], "left.jpg right.jpg"),
        (["jpg", "cls"], ""),
        ([], ""),
    ],
)
def test_shared_names__one_picture_each_under_whatever_name(sets: list[str], shared: str) -> None:
    assert shared_names(frozenset(one.split()) for one in sets) == frozenset(shared.split())


def test_under_shared_names__renames_pictures_only() -> None:
    assert under_shared_names({"png": b"1", "seg.png": b"2"}, ["jpg", "cls"]) == {"jpg": b"1", "seg.png": b"2"}


def test_cut_names__numbers_before_a_suffix_of_images() -> None:
    assert cut_names(["jpg", "left.jpg", "1.jpg", "25.jpg", "22.33.png", "0.npy", "seg.png"]) == [
        "1.jpg",
        "22.33.png",
        "25.jpg",
    ]
