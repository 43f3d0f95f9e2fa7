"""Existing tars: an allow-list of fields, compressed ones, and no silence about damage."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.inputs import Listing
from data_pipelines.packing.tars import list_tars

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
MEMBERS = [
    (f"{number}.{field}", f"{field} {number}".encode()) for number in range(3) for field in ("cls", "seg.png", "jpg")
]


def listed(source: Path) -> Listing:
    copies = source.parent / "copies"
    copies.mkdir(exist_ok=True)
    return list_tars(source, lambda: copies)


def content(listing: Listing) -> dict[str, list[tuple[str, bytes]]]:
    def read(path: str, begin: int, size: int) -> bytes:
        return (Path(listing.root) / path).read_bytes()[begin : begin + size]

    return {item.name: [(p.field, read(p.path, p.begin, p.size)) for p in item.pieces] for item in listing.items}


def test_list_tars__finds_the_bytes_of_every_field_images_first(tmp_path: Path, write_tar: WriteTar) -> None:
    listing = listed(write_tar(tmp_path / "set.tar", MEMBERS))
    assert (listing.name, listing.family) == ("set", "tars")
    assert content(listing) == {
        f"set.tar/{n}": [(f, f"{f} {n}".encode()) for f in ("jpg", "cls", "seg.png")] for n in range(3)
    }


def test_list_tars__compressed_ones_read_the_same(tmp_path: Path, write_tar: WriteTar) -> None:
    plain = write_tar(tmp_path / "set.tar", MEMBERS)
    for name in ("set.tar.gz", "other.tgz"):
        (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    found = content(listed(tmp_path))
    assert list(found) == [f"{tar}/{n}" for tar in ("other.tgz", "set.tar", "set.tar.gz") for n in range(3)]
    assert found["other.tgz/1"] == found["set.tar/1"] == found["set.tar.gz/1"]


@pytest.mark.parametrize("field", ["pyd", "pickle", "pkl", "pth", "pkl.gz"])
def test_list_tars__refuses_pickles(tmp_path: Path, write_tar: WriteTar, field: str) -> None:
    tar = write_tar(tmp_path / "set.tar", [*MEMBERS, (f"9.{field}", b"cos\nsystem\n(S'true'\ntR.")])
    with pytest.raises(DataError, match=rf"set\.tar: sample '9' has a field '{field}', which only running code"):
        listed(tar)


def test_list_tars__leaves_out_unknown_fields_and_counts_them(tmp_path: Path, write_tar: WriteTar) -> None:
    listing = listed(write_tar(tmp_path / "set.tar", [*MEMBERS, ("2.mp4", b"film"), ("3.mp4", b"film")]))
    assert len(listing.items) == 3, "a sample of unknown fields only is none"
    assert listing.skipped == {"field mp4": 2}


@pytest.mark.parametrize("kept", [0.3, 0.9])
@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz"])
def test_list_tars__names_a_cut_tar(tmp_path: Path, write_tar: WriteTar, name: str, kept: float) -> None:
    whole = write_tar(tmp_path / "whole.tar", MEMBERS).read_bytes()
    data = gzip.compress(whole) if name.endswith("gz") else whole.rstrip(b"\0")
    (tmp_path / "whole.tar").unlink()
    (tmp_path / name).write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(DataError, match=rf"{name}\b"):
        listed(tmp_path / name)


def test_list_tars__takes_classes_from_the_description_beside_them(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "set.tar", MEMBERS)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog"], "ignore_index": 11}))
    listing = listed(tar)
    assert (listing.classes, listing.ignore_index) == (("cat", "dog"), 11)
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=r"dataset\.json is not valid JSON"):
        listed(tar)


def test_list_tars__samples_stay_in_the_split_of_their_tar(tmp_path: Path, write_tar: WriteTar) -> None:
    for name in ("train-000000.tar", "test-000000.tar", "odd.tar"):
        write_tar(tmp_path / name, MEMBERS)
    with pytest.raises(DataError, match=r"test-000000\.tar is of test, but odd\.tar says no split"):
        listed(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps({"splits": {"extra": {"shards": [{"file": "odd.tar"}]}}}))
    splits = {item.name.partition("/")[0]: item.split for item in listed(tmp_path).items}
    assert splits == {"train-000000.tar": "train", "test-000000.tar": "test", "odd.tar": "extra"}
    (tmp_path / "dataset.json").unlink()
    (tmp_path / "test-000000.tar").unlink()
    assert {item.split for item in listed(tmp_path).items} == {None}, "train is where all go without a split"


def test_list_tars__given_classes_may_only_go_on_from_the_stated_ones(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "set.tar", MEMBERS)
    (tmp_path / "dataset.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    assert list_tars(tar, lambda: tmp_path, ("cat", "dog", "elk")).classes == ("cat", "dog", "elk")
    with pytest.raises(DataError, match=r"indices into the classes cat,dog of its dataset\.json; begin with these"):
        list_tars(tar, lambda: tmp_path, ("dog", "cat"))


def test_list_tars__pictures_of_mixed_formats_share_a_field(tmp_path: Path, write_tar: WriteTar) -> None:
    names = ("0.jpg", "1.png", "2.jpeg", "3.png", "4.cls", "5.png", "5.jpg")
    listing = listed(write_tar(tmp_path / "set.tar", [(name, b"x") for name in names]))
    assert [[piece.field for piece in item.pieces] for item in listing.items] == [
        *([["png"]] * 4),
        ["cls"],
        ["jpg", "png"],
    ]
    assert [item.problem for item in listing.items if item.problem] == [
        "has no picture as other samples have, only cls"
    ]


def test_list_tars__warns_of_names_with_dots(tmp_path: Path, write_tar: WriteTar) -> None:
    tar = write_tar(tmp_path / "set.tar", [(f"cat.{number}.jpg", b"x") for number in range(3)])
    with pytest.warns(UserWarning, match=r"fields 0\.jpg, 1\.jpg, 2\.jpg look like rests of names with dots"):
        listed(tar)
