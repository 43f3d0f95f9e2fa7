"""What a folder holds: classes, pairs, sequences, and clear words when it holds something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.inputs import Listing, list_folder, natural_order, suffix_of

Touch = Callable[..., Path]


@pytest.fixture
def touch(tmp_path: Path) -> Touch:
    """`touch("a/1.jpg", "b/2.jpg")` makes files whose content is their name; the folder they lie in."""

    def make(*names: str, folder: str = "source") -> Path:
        for name in names:
            path = tmp_path / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        return tmp_path / folder

    return make


def listed(source: Path, kind: str = "auto", masks: Path | None = None) -> Listing:
    return list_folder(source, kind=kind, masks=masks)


def names(listing: Listing) -> list[str]:
    return [item.name for item in listing.items]


def test_list_folder__takes_sub_folders_as_classes_in_sorted_order(touch: Touch) -> None:
    listing = listed(touch("dog/b.jpg", "cat/deep/c.JPEG", "cat/a.jpg"))
    assert listing.classes == ("cat", "dog")
    assert [(item.name, item.label) for item in listing.items] == [
        ("cat/a.jpg", 0),
        ("cat/deep/c.JPEG", 0),
        ("dog/b.jpg", 1),
    ]
    assert listing.items[0].pieces[0] == ("jpg", "cat/a.jpg", 0, len("cat/a.jpg"))


@pytest.mark.parametrize("files", [("a.jpg", "cat/b.jpg"), ("only/a.jpg", "only/b.jpg"), ("a.jpg", "b.jpg")])
def test_list_folder__sees_no_classes_where_there_are_none(touch: Touch, files: Sequence[str]) -> None:
    listing = listed(touch(*files))
    assert listing.classes is None
    assert [item.label for item in listing.items] == [None, None]


def test_list_folder__names_and_counts_what_it_leaves_out(touch: Touch) -> None:
    listing = listed(touch("a.jpg", "b.png", "c.jpg", "README", "notes.md", "more.md", ".DS_Store", ".git/x.jpg"))
    assert names(listing) == ["a.jpg", "b.png", "c.jpg"]
    assert listing.skipped == {"README": 1, ".md": 2}
    assert {item.pieces[0].field for item in listing.items} == {"jpg"}, "mixed formats share the field of the most"


def test_list_folder__a_readme_among_clouds_is_none(touch: Touch) -> None:
    listing = listed(touch("README.txt", "chair/a.off", "chair/readmes.txt", "desk/License-2.txt", "desk/c.off"))
    assert (listing.classes, listing.skipped) == (("chair", "desk"), {".txt": 2})
    assert names(listing) == ["chair/a.off", "chair/readmes.txt", "desk/c.off"]


def test_list_folder__follows_links_but_not_in_circles(touch: Touch) -> None:
    source = touch("cat/a.jpg", "dog/b.jpg")
    (source / "elk").symlink_to(touch("c.jpg", folder="elsewhere"), target_is_directory=True)
    assert listed(source).classes == ("cat", "dog", "elk")
    (source / "cat" / "up").symlink_to(source, target_is_directory=True)
    with pytest.raises(DataError, match=r"symbolic link \S+/cat/up leads to a folder that it lies in; remove the link"):
        listed(source)


def test_list_folder__a_file_that_links_lead_to_is_one_sample(touch: Touch) -> None:
    """By the name that it has without a link, else by the first; whether a link leads to it or to its folder."""
    source = touch("a/x.jpg", "b/y.jpg", "b/.blobs/z")
    outside = touch("o.jpg", folder="elsewhere")
    (source / "a" / "again.jpg").symlink_to(source / "a" / "x.jpg")
    (source / "a" / "z.jpg").symlink_to(source / "b" / ".blobs" / "z")
    for name in ("far", "farther"):
        (source / "a" / name).symlink_to(outside, target_is_directory=True)
    (source / "a" / "near").symlink_to(source / "a" / "far", target_is_directory=True)
    listing = listed(source)
    assert names(listing) == ["a/far/o.jpg", "a/x.jpg", "a/z.jpg", "b/y.jpg"]
    assert listing.skipped == {"(links to files that are packed already)": 3}
    (source / "b" / "x.jpg").symlink_to(source / "a" / "x.jpg")
    with pytest.raises(DataError, match=r"'a/x\.jpg' and 'b/x\.jpg' are one file by a link, in two classes; keep one"):
        listed(source)


def test_list_folder__links_put_no_file_into_two_splits(touch: Touch) -> None:
    source = touch("train/x.jpg", "test/y.jpg")
    (source / "test" / "x.jpg").symlink_to(source / "train" / "x.jpg")
    with pytest.raises(
        DataError, match=r"'train/x\.jpg' and 'test/x\.jpg' are one file by a link, in two splits; keep"
    ):
        listed(source)


def test_list_folder__pictures_may_share_a_mask_by_links(touch: Touch) -> None:
    source, masks = touch("x.jpg", "y.jpg"), touch("x.png", folder="masks")
    (masks / "y.png").symlink_to(masks / "x.png")
    assert names(listed(source, masks=masks)) == ["x.jpg", "y.jpg"]


def test_list_folder__names_the_link_that_leads_above_the_source_or_to_itself(touch: Touch) -> None:
    source = touch("a.jpg")
    (source / "up").symlink_to(source.parent, target_is_directory=True)
    with pytest.raises(DataError, match=rf"symbolic link {source}/up leads to a folder that it lies in"):
        listed(source)
    (source / "up").unlink()
    (source / "self.jpg").symlink_to("self.jpg")
    with pytest.raises(DataError, match=rf"{source}/self\.jpg cannot be read: Too many levels of symbolic links"):
        listed(source)


def test_list_folder__names_a_broken_link(touch: Touch) -> None:
    source = touch("a.jpg")
    (source / "b.jpg").symlink_to(source / "gone.jpg")
    with pytest.raises(DataError, match=r"b\.jpg is neither a file nor a folder"):
        listed(source)


@pytest.mark.parametrize(
    ("files", "family"),
    [
        (("a.jpg", "b.jpg", "notes.txt"), "images"),
        (("a.ply", "b.off", "c.txt"), "points"),
        (("a.nii", "b.nii.gz"), "volumes"),
    ],
)
def test_list_folder__auto_goes_by_what_most_files_are(touch: Touch, files: Sequence[str], family: str) -> None:
    assert listed(touch(*files)).family == family


@pytest.mark.parametrize(("shape", "family"), [((5, 3), "points"), ((4, 5, 6), "volumes")])
def test_list_folder__auto_tells_clouds_from_volumes_by_shape(
    tmp_path: Path, shape: tuple[int, ...], family: str
) -> None:
    np.save(tmp_path / "a.npy", np.zeros(shape, np.float32))
    assert listed(tmp_path).family == family


def test_list_folder__a_damaged_array_does_not_tell_what_the_others_are(tmp_path: Path) -> None:
    (tmp_path / "0.npy").write_bytes(b"cut")
    with pytest.raises(
        DataError, match=r"none of 1 arrays can be read.*; the first: .*0\.npy: cannot decode array of 3"
    ):
        listed(tmp_path)
    np.save(tmp_path / "1.npy", np.zeros((4, 5, 6), np.float32))
    assert listed(tmp_path).family == "volumes"  # packing then names the damaged one, or leaves it out by max_bad


def test_list_folder__empty_or_of_another_kind_is_an_error(touch: Touch, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"nothing to pack in .*empty: there is no file in it"):
        listed(tmp_path / "empty")
    with pytest.raises(DataError, match=r"nothing to pack in .*; it has 2 \.mp4"):
        listed(touch("a.mp4", "b.mp4", folder="films"))
    with pytest.raises(DataError, match=r"no file with suffix \.npy .*; it has 1 \.jpg"):
        listed(touch("a.jpg", folder="photos"), "points")


def test_list_folder__pairs_files_of_the_same_stem(touch: Touch) -> None:
    images = touch("town/a.jpg", "b.jpg", folder="images")
    masks = touch("town/a.png", "b.png", "unused.png", folder="masks")
    listing = listed(images, "pairs", masks)
    assert [[piece.field for piece in item.pieces] for item in listing.items] == [["jpg", "seg.png"]] * 2
    assert listing.items[1].name == "town/a.jpg"
    assert Path(listing.items[1].pieces[1].path) == masks / "town" / "a.png"
    assert listing.skipped["(masks without image)"] == 1


def test_list_folder__masks_may_lie_inside_the_source(touch: Touch) -> None:
    source = touch("a.png", "masks/a.png")
    listing = listed(source, masks=source / "masks")
    assert names(listing) == ["a.png"]
    assert Path(listing.items[0].pieces[1].path) == source / "masks" / "a.png"


def test_list_folder__pairs_name_what_is_missing_or_double(touch: Touch) -> None:
    images, masks = touch("a.jpg", "b.jpg", folder="images"), touch("a.png", folder="masks")
    with pytest.raises(DataError, match=r"1 of 2 files of .* have no mask \(\.png\) .* first 'b\.jpg'"):
        listed(images, "pairs", masks)
    touch("b.png", folder="masks")
    touch("b.jpeg", folder="images")
    with pytest.raises(
        DataError, match=r"'b\.jpe?g' and 'b\.jpe?g' differ in the suffix or in how accents are written only"
    ):
        listed(images, "pairs", masks)
    with pytest.raises(DataError, match="no such folder of masks"):
        listed(images, "pairs", masks / "nowhere")


def test_list_folder__sequences_keep_the_order_of_their_frames(touch: Touch) -> None:
    listing = listed(touch("b/f10.jpg", "b/f9.jpg", "a/deep/f1.jpg", "b/f100.jpg"), "sequences")
    assert [(item.sequence, item.name) for item in listing.items] == [
        ("a/deep", "a/deep/f1.jpg"),
        ("b", "b/f9.jpg"),
        ("b", "b/f10.jpg"),
        ("b", "b/f100.jpg"),
    ]
    with pytest.raises(DataError, match=r"frame 'x\.jpg' lies in no sequence"):
        listed(touch("x.jpg"), "sequences")


def test_digest__changes_with_names_sizes_and_labels_but_not_with_the_place(touch: Touch) -> None:
    first, second = touch("a/1.jpg", "b/2.jpg"), touch("a/1.jpg", "b/2.jpg", folder="moved")
    digest = listed(first).digest()
    assert listed(second).digest() == digest
    (second / "b" / "2.jpg").write_text("longer than before")
    assert listed(second).digest() != digest
    touch("c/3.jpg")
    assert listed(first).digest() != digest


def test_natural_order__counts() -> None:
    paths = ["b/1", "a/10.jpg", "a/9.jpg", "a/x2y11", "a/x2y2"]
    assert sorted(paths, key=natural_order) == ["a/9.jpg", "a/10.jpg", "a/x2y2", "a/x2y11", "b/1"]


def test_suffix_of__keeps_double_suffixes_of_gzip() -> None:
    assert [suffix_of(name) for name in ("A.NII.GZ", "a.b.jpg", "noext", "x.tar.gz")] == [
        ".nii.gz",
        ".jpg",
        "",
        ".tar.gz",
    ]


def test_list_folder__images_win_over_their_labels(touch: Touch) -> None:
    """As YOLO lays them out, with more text files than photos; a cloud among photos is still told apart."""
    source = touch("images/train/1.jpg", "labels/train/1.txt", "README.txt", "classes.txt", "features.npy")
    assert (listed(source).family, names(listed(source))) == ("images", ["images/train/1.jpg"])
    assert listed(touch("a.ply", "b.ply", "preview.png", folder="clouds")).family == "points"


def test_list_folder__a_class_has_one_index_in_all_splits(touch: Touch) -> None:
    listing = listed(touch("train/cat/1.jpg", "train/dog/2.jpg", "train/fox/3.jpg", "val/cat/4.jpg", "val/fox/5.jpg"))
    assert listing.classes == ("cat", "dog", "fox")
    assert [(item.split, item.label) for item in listing.items] == [
        *(("train", label) for label in (0, 1, 2)),
        *(("val", label) for label in (0, 2)),
    ]


def test_list_folder__classes_are_looked_up_by_name(touch: Touch) -> None:
    source = touch("train/cat/1.jpg", "train/dog/2.jpg", "val/cat/3.jpg")
    with pytest.raises(DataError, match=r"pack .*source as a whole, or give --classes cat,dog"):
        list_folder(touch("val/fox/4.jpg") / "val", kind="auto")
    listing = list_folder(source / "val", kind="auto", classes=("dog", "fox", "cat"))
    assert ([item.label for item in listing.items], listing.classes) == ([2, 1], ("dog", "fox", "cat"))
    with pytest.raises(DataError, match="has the class 'fox', which is none of --classes cat,dog"):
        list_folder(source / "val", kind="auto", classes=("cat", "dog"))
    with pytest.raises(DataError, match="no folders of classes for --classes to number"):
        list_folder(touch("1.jpg", folder="flat"), kind="auto", classes=("cat", "dog"))


def test_list_folder__pairs_match_however_accents_are_written(touch: Touch) -> None:
    images = touch(*(f"{normalize('NFC', name)}.jpg" for name in ("Übung", "café", "plain")), folder="images")
    masks = touch(*(f"{normalize('NFD', name)}.png" for name in ("Übung", "café", "plain")), folder="masks")
    pairs = [[piece.path for piece in item.pieces] for item in listed(images, "pairs", masks).items]
    assert all(normalize("NFC", Path(mask).stem) == Path(image).stem and Path(mask).exists() for image, mask in pairs)
    touch(f"{normalize('NFD', 'café')}.jpg", folder="images")
    with pytest.raises(DataError, match="differ in the suffix or in how accents are written only"):
        listed(images, "pairs", masks)


def test_list_folder__tars_in_sub_folders_are_named(touch: Touch) -> None:
    with pytest.raises(DataError, match="has its tars in sub-folders"):
        listed(touch("train/a.tar", "test/b.tar"))
