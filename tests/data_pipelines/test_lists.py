"""Lists of paths: with and without header, labels as numbers or names, text or parquet."""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import pytest

from data_pipelines.errors import DataError
from data_pipelines.packing.lists import list_rows


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def rows(source: Path) -> list[tuple[str, int | None]]:
    return [(item.name, item.label) for item in list_rows(source).items]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.csv", "path,label\nb.jpg,dog\n\n'a,1.jpg',cat\nc/d.jpg,dog\n".replace("'", '"')),
        ("list.csv", "\ufefflabel,more,path\ndog,x,b.jpg\ncat,x,'a,1.jpg'\ndog,x,c/d.jpg\n".replace("'", '"')),
        ("list.csv", "b.jpg,dog\n'a,1.jpg',cat\nc/d.jpg,dog\n".replace("'", '"')),
        ("list.tsv", "path\tlabel\nb.jpg\tdog\na,1.jpg\tcat\nc/d.jpg\tdog\n"),
        ("list.txt", "# made by hand\nb.jpg dog\na,1.jpg cat\n\nc/d.jpg  dog\n"),
        ("list.lst", "b.jpg dog\na,1.jpg cat\nc/d.jpg dog"),
    ],
)
def test_list_rows__reads_paths_and_labels(tmp_path: Path, name: str, text: str) -> None:
    source = write(tmp_path, name, text)
    assert rows(source) == [("a,1.jpg", 0), ("b.jpg", 1), ("c/d.jpg", 1)]
    listing = list_rows(source)
    assert (listing.classes, listing.name, listing.family) == (("cat", "dog"), "list", "images")
    assert listing.root == str(tmp_path)


def test_list_rows__numbers_are_class_indices(tmp_path: Path) -> None:
    source = write(tmp_path, "list.csv", "a.jpg,7\nb.jpg,0\n")
    assert rows(source) == [("a.jpg", 7), ("b.jpg", 0)]
    assert list_rows(source).classes is None


def test_list_rows__labels_are_optional(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "list.txt", "b.ply\na.off\n")) == [("a.off", None), ("b.ply", None)]
    assert rows(write(tmp_path, "list.csv", "path\na.jpg\n")) == [("a.jpg", None)]


def test_list_rows__knows_the_size_of_what_is_there(tmp_path: Path) -> None:
    write(tmp_path, "a.jpg", "12345")
    listing = list_rows(write(tmp_path, "list.txt", "a.jpg\ngone.jpg\n"))
    assert [item.pieces[0].size for item in listing.items] == [5, 0]
    assert listing.newest == ((tmp_path / "a.jpg").stat().st_mtime_ns, "a.jpg")


def test_list_rows__reads_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"label": [1, 0], "path": ["b.jpg", "a.jpg"], "other": [0.5, 0.25]})
    parquet.write_table(table, tmp_path / "list.parquet")
    assert rows(tmp_path / "list.parquet") == [("a.jpg", 0), ("b.jpg", 1)]
    parquet.write_table(pyarrow.table({"file": ["b.jpg"]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match="has columns file; a column 'path' is needed"):
        list_rows(tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"cannot read .*broken\.parquet"):
        list_rows(write(tmp_path, "broken.parquet", "no parquet at all"))


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("empty.txt", "# nothing\n", "names no file"),
        ("twice.txt", "b.jpg\na.jpg\nb.jpg\n", "names 'b.jpg' twice"),
        ("mixed.txt", "a.jpg\nb.ply\n", "several or unknown kinds, such as a.jpg, b.ply"),
        ("film.txt", "a.mp4\n", "several or unknown kinds, such as a.mp4"),
        ("half.txt", "a.jpg 1\nb.jpg\n", "1 of 2 rows have no label"),
        ("head.csv", "paths,label\na.jpg,1\n", "no column 'path' .* is 'paths' the column of paths"),
        ("short.csv", "label,path\n1,a.jpg\n2\n", "line 3: 1 columns, 2 are needed"),
    ],
)
def test_list_rows__names_what_is_wrong(tmp_path: Path, name: str, text: str, named: str) -> None:
    with pytest.raises(DataError, match=named):
        list_rows(write(tmp_path, name, text))


def test_list_rows__refuses_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"a.jpg\n\xff\xfe.jpg\n")
    with pytest.raises(DataError, match="is not UTF-8 text"):
        list_rows(tmp_path / "list.txt")


def test_list_rows__names_with_spaces_and_hashes_are_whole(tmp_path: Path) -> None:
    write(tmp_path, "#3.jpg", "a picture")
    text = "# a comment\nmy cat 1.jpg\n#3.jpg\n#gone.jpg\n  a.jpg b.jpg  \nlast one.JPG\n"
    assert [name for name, _ in rows(write(tmp_path, "list.txt", text))] == [
        "#3.jpg",
        "a.jpg b.jpg",
        "last one.JPG",
        "my cat 1.jpg",
    ]
    text = "my cat 1.jpg tabby\n#3.jpg\tgolden retriever\n"
    assert rows(write(tmp_path, "named.txt", text)) == [("#3.jpg", 0), ("my cat 1.jpg", 1)]


def test_list_rows__given_classes_number_the_names(tmp_path: Path) -> None:
    source = write(tmp_path, "list.csv", "a.jpg,dog\nb.jpg,cat\n")
    listing = list_rows(source, ("cat", "cow", "dog"))
    assert ([item.label for item in listing.items], listing.classes) == ([2, 0], ("cat", "cow", "dog"))
    with pytest.raises(DataError, match=r"list\.csv has the class 'dog', which is none of --classes cat,cow"):
        list_rows(source, ("cat", "cow"))
    with pytest.raises(DataError, match="has no labels for --classes to number"):
        list_rows(write(tmp_path, "plain.txt", "a.jpg\n"), ("cat",))


def test_list_rows__finds_files_however_accents_are_written(tmp_path: Path) -> None:
    write(tmp_path, normalize("NFD", "café.jpg"), "12345")
    (item,) = list_rows(write(tmp_path, "list.txt", normalize("NFC", "café.jpg"))).items
    assert (item.pieces[0].path, item.pieces[0].size) == (normalize("NFD", "café.jpg"), 5)


def test_list_rows__a_file_is_named_once_however_its_path_is_written(tmp_path: Path) -> None:
    """Hard links are files of their own: nothing says which of them is the original."""
    (tmp_path / "a.jpg").write_text("a")
    (tmp_path / "b.jpg").hardlink_to(tmp_path / "a.jpg")
    assert rows(write(tmp_path, "list.txt", "a.jpg\nb.jpg\n")) == [("a.jpg", None), ("b.jpg", None)]
    (tmp_path / "c.jpg").symlink_to("a.jpg")
    for other in ("c.jpg", "./a.jpg"):
        with pytest.raises(DataError, match=rf"list\.txt names one file as 'a\.jpg' and as '{other}'; name each file"):
            list_rows(write(tmp_path, "list.txt", f"a.jpg\n{other}\n"))
