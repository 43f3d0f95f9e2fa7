"""Each kind of damage to a tar gives one line that names shard and place; the index survives on disk."""

from __future__ import annotations

import os
import tarfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.errors import DataError
from data_pipelines.index import ShardIndex, load_index, scan_shard

MEMBER = 512 + 1024  # header + data of each member below, padded
SAMPLE = 2 * MEMBER

Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]


@pytest.fixture
def shard(tmp_path: Path, write_tar: Write) -> Path:
    """Ten samples of two members, 700 and 600 bytes."""
    members = []
    for number in range(10):
        members += [(f"{number:04d}.jpg", bytes([number]) * 700), (f"{number:04d}.seg.png", bytes([number]) * 600)]
    return write_tar(tmp_path / "a.tar", members)


def refused(shard: Path) -> str:
    with pytest.raises(DataError) as caught:
        scan_shard(shard)
    message = str(caught.value)
    assert str(shard) in message and "\n" not in message
    return message


def patch(shard: Path, offset: int, content: bytes) -> None:
    with open(shard, "r+b") as file:
        file.seek(offset)
        file.write(content)


def test_scan_shard__finds_every_field_of_every_sample(shard: Path) -> None:
    index = scan_shard(shard)
    assert index.num_samples == 10 and index.num_bytes == shard.stat().st_size
    assert [index.key(i) for i in (0, 9)] == ["0000", "0009"]
    assert index.common_fields == {"jpg", "seg.png"}
    assert index.start.tolist() == [SAMPLE * i for i in range(10)] and set(index.size.tolist()) == {SAMPLE}
    content = shard.read_bytes()
    begin, end = index.field_ranges(3)["seg.png"]
    assert content[SAMPLE * 3 + begin : SAMPLE * 3 + end] == bytes([3]) * 600


def test_scan_shard__folders_capitals_long_names_and_missing_fields(tmp_path: Path) -> None:
    long = "k" * 150  # more than a USTAR name field holds: a PAX or GNU header precedes the member
    for number, tar_format in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        path = tmp_path / f"{number}.tar"
        with tarfile.open(path, "w", format=tar_format) as tar:
            folder = tarfile.TarInfo("set.v1")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
            for name in ("set.v1/a.JPG", "set.v1/b.jpg", f"{long}.jpg", f"{long}.cls"):
                tar.addfile(tarfile.TarInfo(name))
            last = tarfile.TarInfo("last")
            last.type = tarfile.DIRTYPE
            tar.addfile(last)
        index = scan_shard(path)
        assert [index.key(i) for i in range(3)] == ["set.v1/a", "set.v1/b", long]
        assert index.common_fields == {"jpg"}
        assert sorted(index.field_ranges(2)) == ["cls", "jpg"] and sorted(index.field_ranges(0)) == ["jpg"]


@pytest.mark.parametrize("size", [SAMPLE * 5 + 512 + 300, SAMPLE * 5 + 512 + 1])
def test_scan_shard__cut_inside_data(shard: Path, size: int) -> None:
    os.truncate(shard, size)
    message = refused(shard)
    assert f"member '0005.jpg' at offset {SAMPLE * 5} needs {SAMPLE * 5 + MEMBER} bytes, the file has {size}" in message


@pytest.mark.parametrize("size", [SAMPLE * 5, SAMPLE * 5 + MEMBER, SAMPLE * 5 + 100, SAMPLE * 5 + MEMBER + 511])
def test_scan_shard__cut_at_or_inside_a_header(shard: Path, size: int) -> None:
    os.truncate(shard, size)
    end = size // MEMBER * MEMBER
    assert f"no clean end of archive at offset {end} of {size} bytes" in refused(shard)


def test_scan_shard__cut_inside_the_end_marker(shard: Path) -> None:
    os.truncate(shard, SAMPLE * 10 + 512)
    assert f"no clean end of archive at offset {SAMPLE * 10} of {SAMPLE * 10 + 512} bytes" in refused(shard)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\0" * 512], ids=["checksum", "zeroed"])
def test_scan_shard__damaged_header(shard: Path, damage: bytes) -> None:
    patch(shard, SAMPLE * 5 + (148 if len(damage) == 8 else 0), damage)
    assert f"no clean end of archive at offset {SAMPLE * 5}" in refused(shard)


def test_scan_shard__damaged_first_header(shard: Path) -> None:
    patch(shard, 148, b"\xff" * 8)
    assert "is not a plain tar: it begins with b'0000.jpg" in refused(shard)


def test_scan_shard__garbage_after_the_end(shard: Path) -> None:
    with open(shard, "ab") as file:
        file.write(b"\0" * (1 << 20) + b"x")
    assert f"no clean end of archive at offset {SAMPLE * 10}" in refused(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes)"),
        (b"<!DOCTYPE html><html>404 Not Found</html>" * 40, "is not a plain tar: it begins with b'<!DOCTYPE html><'"),
        (b"\x1f\x8b" + b"z" * 600, "is not a plain tar"),
        (b"\0" * 10240, "holds no sample"),
    ],
    ids=["empty", "html", "gzip", "zeros"],
)
def test_scan_shard__not_a_shard(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    assert message in refused(path)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.jpg", "b.jpg", "a.cls"], "sample 'a' at offset 1024 was begun at offset 0 already"),
        (["a.jpg", "a.jpg"], "member 'a.jpg' at offset 512 repeats field 'jpg' of sample 'a'"),
        (["a.jpg", "README"], "member 'README' at offset 512 has no KEY.FIELD name"),
        (["a.jpg", ".hidden"], "member '.hidden' at offset 512 has no KEY.FIELD name"),
    ],
    ids=["interleaved", "repeated field", "no field", "no key"],
)
def test_scan_shard__names(tmp_path: Path, write_tar: Write, names: list[str], message: str) -> None:
    assert message in refused(write_tar(tmp_path / "a.tar", [(name, b"") for name in names]))


def test_scan_shard__links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(link)
    assert "member 'a.jpg' at offset 0 is a link or special file" in refused(path)


def test_load_index__missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open shard .*gone.tar: No such file"):
        load_index(tmp_path / "gone.tar")


def test_load_index__second_time_comes_from_the_cache(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load_index(shard)
    monkeypatch.setattr("data_pipelines.index.scan_shard", lambda path: pytest.fail("scanned again"))
    second = load_index(shard)
    assert second.digest == first.digest and second.field_ranges(4) == first.field_ranges(4)


def test_load_index__changed_shard_is_scanned_again(shard: Path) -> None:
    before = load_index(shard)
    patch(shard, 600, b"new")
    os.utime(shard, ns=(0, 12345))
    after = load_index(shard)
    assert after.digest != before.digest and after.crc32[0] != before.crc32[0]


def test_load_index__sidecar_wins_when_it_fits(shard: Path, write_tar: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    index = scan_shard(shard)
    sidecar = shard.with_name("a.tar.index.npz")
    index.save(sidecar)
    with monkeypatch.context() as patched:
        patched.setattr("data_pipelines.index.scan_shard", lambda path: pytest.fail("scanned"))
        assert load_index(shard).digest == index.digest
    write_tar(shard, [("other.jpg", b"x")])  # another size: the sidecar is stale
    assert load_index(shard).key(0) == "other"


@pytest.mark.parametrize("damage", ["cut", "pickle", "text", "shapes"])
def test_shard_index__damaged_file_is_not_used(shard: Path, tmp_path: Path, damage: str) -> None:
    path, index = tmp_path / "i.npz", scan_shard(shard)
    index.save(path)
    assert ShardIndex.load(path, index.num_bytes) is not None
    if damage == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif damage == "pickle":
        np.savez(path, format=np.array([{"a": 1}], dtype=object))
    elif damage == "text":
        path.write_text("not an index")
    else:
        stored = dict(np.load(path))
        stored["size"] = stored["size"][:-1]
        np.savez(path, **stored)
    assert ShardIndex.load(path, index.num_bytes) is None


def test_load_index__unwritable_cache_costs_a_warning(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(shard))  # a file where the folder should be
    with pytest.warns(UserWarning, match="cannot keep shard indices"):
        assert load_index(shard).num_samples == 10


def test_shard_index__digest_is_content_not_place(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.tar"
    copy.write_bytes(shard.read_bytes())
    assert scan_shard(copy).digest == scan_shard(shard).digest
    patch(copy, 600, b"!")
    assert scan_shard(copy).digest != scan_shard(shard).digest


def test_shard_index__save_leaves_no_temporary_file(shard: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan_shard(shard).save(tmp_path / "kept" / "i.npz")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["i.npz"]
