"""Names of fields to kinds."""

from __future__ import annotations

import pytest

from data_pipelines.field_kinds import FIELD_KINDS, field_kind, is_never_read, kind_of_field


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
        ("pose.npy", "array"),
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
