"""What folders and names of tars say: splits, classes, and the same index for a class wherever it is missing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unicodedata import normalize

import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.layout import Place, number_classes, places, require_all_classes
from data_pipelines.split_names import in_order, split_of_tar


def said(*paths: str, **options: bool) -> list[tuple[str | None, str | None]]:
    return [tuple(place) for place in places(paths, "SRC", **options)]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("train/cat/1.jpg", "train/dog/2.jpg", "val/dog/3.jpg"), [("train", "cat"), ("train", "dog"), ("val", "dog")]),
        (("Training/a/1.jpg", "Validation/b/1.jpg"), [("train", "a"), ("val", "b")]),
        (("chair/train/1.off", "desk/test/2.off"), [("train", "chair"), ("test", "desk")]),
        (("images/train2017/1.jpg", "images/val2017/2.jpg"), [("train", None), ("val", None)]),
        (("images/train/a/1.jpg", "images/test/b/2.jpg"), [("train", "a"), ("test", "b")]),
        (("train/1.jpg", "train/a/2.jpg"), [("train", None), ("train", None)]),
        (("train/a/deep/1.jpg", "train/b/2.jpg"), [("train", "a"), ("train", "b")]),
        (("bus/1.jpg", "car/2.jpg", "train/3.jpg"), [(None, "bus"), (None, "car"), (None, "train")]),
        (("cat/1.jpg", "dog/2.jpg"), [(None, "cat"), (None, "dog")]),
        (("1.jpg", "dog/2.jpg"), [(None, None), (None, None)]),
    ],
)
def test_places__splits_and_classes(paths: Sequence[str], expected: Sequence[tuple[str, str]]) -> None:
    assert said(*paths) == expected


@pytest.mark.parametrize(
    "paths",
    [
        ("train/a/1.jpg", "val/a/2.jpg", "extra/a/3.jpg"),
        ("train/a/1.jpg", "train/b/2.jpg", "unlabelled/3.jpg"),
        ("train/a/1.jpg", "val/a/2.jpg", "3.jpg"),
        ("trainA/1.jpg", "trainB/1.jpg", "testA/1.jpg", "testB/1.jpg"),
    ],
)
def test_places__folders_that_may_be_splits_are_refused(paths: Sequence[str]) -> None:
    with pytest.raises(DataError, match=r"^SRC holds folders that look like splits .* others that do not"):
        places(paths, "SRC")


def test_places__a_split_without_classes_beside_one_with_them_is_refused() -> None:
    paths = "train/a/1.jpg", "train/b/2.jpg", "test/3.jpg"
    with pytest.raises(DataError, match="split train has folders of classes, split test has files"):
        places(paths, "SRC")
    assert said(*paths, with_classes=False) == [("train", None), ("train", None), ("test", None)]


def test_places__one_folder_is_a_class_where_classes_are_given() -> None:
    assert said("cat/1.jpg") == [(None, None)]
    assert said("cat/1.jpg", single_class=True) == [(None, "cat")]


def test_places__accents_are_the_same_however_they_are_written() -> None:
    found = places(
        [f"{split}/{normalize(form, 'café')}/1.jpg" for split, form in (("train", "NFC"), ("val", "NFD"))], ""
    )
    assert {place.class_name for place in found} == {None}, "they are one folder"
    found = places([f"{normalize(form, 'café')}/1.jpg" for form in ("NFC", "NFD")] + ["x/2.jpg"], "")
    assert found[0] == found[1] == Place(None, normalize("NFC", "café"))


def test_number_classes__by_name() -> None:
    assert number_classes(["fox", "cat"], None, "SRC") == (("cat", "fox"), {"cat": 0, "fox": 1})
    assert number_classes(["fox", "cat"], ["cat", "dog", "fox"], "SRC")[1] == {"cat": 0, "dog": 1, "fox": 2}
    with pytest.raises(DataError, match=r"SRC has the class 'dgo', which is none of --classes cat,dog; did you mean"):
        number_classes(["dgo"], ["cat", "dog"], "SRC")


def test_require_all_classes__a_split_by_itself_has_those_of_the_splits_beside_it(tmp_path: Path) -> None:
    for name in ("train/cat", "train/dog", "train/fox", "val/cat", "val/fox", "other/elk"):
        (tmp_path / name).mkdir(parents=True)
    require_all_classes(tmp_path / "train", ("cat", "dog", "fox"))
    require_all_classes(tmp_path / "other", ("elk",))
    with pytest.raises(DataError, match=r"val has no folder 'dog', which train beside it has.*--classes cat,dog,fox$"):
        require_all_classes(tmp_path / "val", ("cat", "fox"))
    for name in ("pets_train/cat", "pets_train/dog", "pets-val/dog", "birds_val/tit"):
        (tmp_path / name).mkdir(parents=True)
    require_all_classes(tmp_path / "birds_val", ("tit",))
    with pytest.raises(DataError, match=r"pets-val has no folder 'cat'.*other indices; give --classes cat,dog$"):
        require_all_classes(tmp_path / "pets-val", ("dog",))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000000.tar", "train"),
        ("imagenet1k-validation-01.tar.gz", "val"),
        ("cifar_test_7.tgz", "test"),
        ("photos-000000.tar", None),
        ("train-test-0.tar", None),
        ("contest-0.tar", None),
    ],
)
def test_split_of_tar(name: str, split: str | None) -> None:
    assert split_of_tar(name) == split


def test_in_order() -> None:
    assert in_order({"test", "extra", "train", "dev", "val"}) == ["train", "val", "test", "dev", "extra"]
