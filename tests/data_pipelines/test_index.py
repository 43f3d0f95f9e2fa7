"""Each kind of damage to a tar gives one line that names shard and place; the index survives on disk."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy

from data_pipelines.errors import DataError
from data_pipelines.shards.index import ShardIndex, load_index, scan_shard, sidecar
from data_pipelines.shards.tar_walk import Damage, walk
from data_pipelines.storage.stores import Store

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


def load(shard: Path) -> ShardIndex:
    return load_index(str(shard), Store())


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
    assert f", sample '0005' at offset {SAMPLE * 5}: member '0005.jpg' needs the bytes up to" in message
    assert f" {SAMPLE * 5 + MEMBER}, the file ends at {size}: cut; copy it again" in message


@pytest.mark.parametrize(
    ("size", "last"),
    [
        (SAMPLE * 5, "0004.seg.png"),
        (SAMPLE * 5 + MEMBER, "0005.jpg"),
        (SAMPLE * 5 + 100, "0004.seg.png"),
        (SAMPLE * 5 + MEMBER + 511, "0005.jpg"),
    ],
)
def test_scan_shard__cut_at_or_inside_a_header(shard: Path, size: int, last: str) -> None:
    os.truncate(shard, size)
    message = refused(shard)
    assert f"{shard} at offset {size // MEMBER * MEMBER}: " in message
    assert f" after member '{last}'" in message and f" at {size}" in message and " cut" in message


def test_scan_shard__cut_inside_the_end_marker(shard: Path) -> None:
    os.truncate(shard, SAMPLE * 10 + 512)
    message = refused(shard)
    assert f"at offset {SAMPLE * 10}: no end of archive after member '0009.seg.png': the file ends at" in message
    assert f" {SAMPLE * 10 + 512}, cut; copy or write it again" in message


@pytest.mark.parametrize(("said", "damage"), [("damaged", b"\xff" * 8), ("zeroed", b"\0" * 512)])
def test_scan_shard__damaged_header(shard: Path, said: str, damage: bytes) -> None:
    patch(shard, SAMPLE * 5 + (148 if len(damage) == 8 else 0), damage)
    assert f"at offset {SAMPLE * 5}: {said} header after member '0004.seg.png'; the next readable" in refused(shard)


def test_scan_shard__damaged_first_header(shard: Path) -> None:
    patch(shard, 148, b"\xff" * 8)
    assert f" at offset 0: damaged header; the next readable one is at offset {MEMBER}; copy" in refused(shard)


def test_scan_shard__garbage_after_the_end(shard: Path) -> None:
    with open(shard, "ab") as file:
        file.write(b"\0" * (1 << 20) + b"x")
    said = f"at offset {SAMPLE * 10}: zeros after member '0009.seg.png', then content up to the end of the file"
    assert said in refused(shard)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty (0 bytes); copy or write it again"),
        (b"<!DOCTYPE html><html>404 Not Found</html>" * 40, "not a plain tar: begins with b'<!DOCTYPE html><'"),
        (b"\x1f\x8b" + b"z" * 600, "not a plain tar"),
        (b"\0" * 10240, "the tar holds no sample (10240 bytes)"),
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
        (["a.jpg", "b.jpg", "a.cls"], ", sample 'a' at offset 1024: sample was begun at offset 0 already"),
        (["a.jpg", "a.jpg"], ", sample 'a' at offset 512: repeats field 'jpg'"),
    ],
    ids=["interleaved", "repeated field"],
)
def test_scan_shard__names(tmp_path: Path, write_tar: Write, names: list[str], message: str) -> None:
    assert message in refused(write_tar(tmp_path / "a.tar", [(name, b"") for name in names]))


def test_scan_shard__name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("caf\u00e9.jpg"))
    assert "has a name that is not UTF-8" in refused(path)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE])
def test_scan_shard__only_regular_files(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        special = tarfile.TarInfo("a.jpg")
        special.type, special.linkname = kind, "/etc/hostname"
        tar.addfile(special)
    assert ", sample 'a' at offset 0: member 'a.jpg' is a link or special file" in refused(path)


def test_scan_shard__samples_of_2_gib(tmp_path: Path) -> None:
    """Files of holes: nothing of them is read before the members are found to be too large together."""
    path, size = tmp_path / "a.tar", 1 << 30
    with open(path, "wb") as file:
        for name in ("a.x", "a.y"):
            member = tarfile.TarInfo(name)
            member.size = size
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
            file.seek(size, os.SEEK_CUR)
        file.truncate(file.tell() + 1024)
    message = refused(path)
    assert f", sample 'a' at offset {512 + size}: member 'a.y' makes the sample larger than 2 GiB; split it" in message


@pytest.mark.parametrize(
    ("kind", "size"),
    [(tarfile.REGTYPE, -1), (tarfile.REGTYPE, -512), (tarfile.REGTYPE, -4096), (tarfile.GNUTYPE_SPARSE, -512)],
)
def test_scan_shard__sizes_below_zero_lead_nowhere(shard: Path, kind: bytes, size: int) -> None:
    forged = tarfile.TarInfo("0005.jpg")
    forged.type, forged.size = kind, size
    patch(shard, SAMPLE * 5, forged.tobuf(tarfile.GNU_FORMAT))
    assert f" at offset {SAMPLE * 5}: damaged header" in refused(shard)
    with open(shard, "rb") as file:
        found = list(islice(walk(file, shard.stat().st_size), 100))
    assert len(found) == 20 and [n for n, part in enumerate(found) if isinstance(part, Damage)] == [10]


def test_scan_shard__directories_have_no_content(tmp_path: Path) -> None:
    """Whatever size their headers give: what follows the last one is not passed over."""
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        for name, kind, size in (("a.cls", tarfile.REGTYPE, 0), ("d", tarfile.DIRTYPE, 512)):
            member = tarfile.TarInfo(name)
            member.type, member.size = kind, size
            file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(1024))
    assert scan_shard(path).num_samples == 1
    patch(path, 1024, b"x" * 512)
    assert "at offset 1024: damaged or cut header after member 'd'" in refused(path)


def test_load_index__missing_shard(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot open shard .*gone.tar: No such file"):
        load(tmp_path / "gone.tar")


def test_load_index__second_time_comes_from_the_cache(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(shard)
    monkeypatch.setattr("data_pipelines.shards.index.scan_shard", lambda *_: pytest.fail("scanned again"))
    second = load(shard)
    assert second.digest == first.digest and second.field_ranges(4) == first.field_ranges(4)


def test_load_index__changed_shard_is_scanned_again(shard: Path) -> None:
    before = load(shard)
    patch(shard, 600, b"new")
    os.utime(shard, ns=(0, 12345))
    after = load(shard)
    assert after.digest != before.digest and after.crc32[0] != before.crc32[0]


def test_load_index__sidecar_wins_when_it_fits(shard: Path, write_tar: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    index = scan_shard(shard)
    index.save(Path(sidecar(str(shard))))
    with monkeypatch.context() as patched:
        patched.setattr("data_pipelines.shards.index.scan_shard", lambda *_: pytest.fail("scanned"))
        assert load(shard).digest == index.digest
    write_tar(shard, [("other.jpg", b"x")])  # another size: the sidecar is stale
    assert load(shard).key(0) == "other"


class RemoteStore(Store):
    """Files of a folder under URLs; counts what is asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.asked: list[str] = []

    def size(self, location: str) -> int:
        self.asked.append(f"size {location}")
        return self.local_copy(location).stat().st_size

    def read_file(self, location: str, limit: int) -> bytes | None:
        self.asked.append(f"file {location}")
        path = self.local_copy(location)
        return path.read_bytes() if path.exists() else None

    def local_copy(self, location: str) -> Path:
        return self.folder / location.partition("?")[0].rpartition("/")[2]


def test_load_index__of_a_remote_shard(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, index, store = "https://me:secret@host/data/a.tar?key=secret", scan_shard(shard), RemoteStore(shard.parent)
    index.save(Path(sidecar(str(shard))))
    monkeypatch.setattr("data_pipelines.shards.index.scan_shard", lambda *_: pytest.fail("scanned"))
    sidecar_url = "https://me:secret@host/data/a.tar.index?key=secret"
    for expected in ([f"size {url}", f"file {sidecar_url}"], [f"size {url}"]):  # the second time from the cache
        assert load_index(url, store).digest == index.digest
        assert store.asked == expected
        store.asked.clear()
    assert load_index(url, store, num_bytes=index.num_bytes, digest="1").digest == index.digest
    assert store.asked == [f"file {sidecar_url}"]  # a listed size is not asked for; another digest, another cache entry


def test_load_index__remote_shard_without_sidecar_is_scanned_under_its_name(shard: Path) -> None:
    store = RemoteStore(shard.parent)
    assert load_index("s3://bucket/a.tar", store).digest == scan_shard(shard).digest
    os.truncate(shard, 1000)
    with pytest.raises(DataError, match=r"^shard s3://bucket/b/a.tar, sample '0000' at offset 0: member '0000.jpg'"):
        load_index("s3://bucket/b/a.tar?key=secret", store)


def test_load_index__expected_size(shard: Path) -> None:
    size = shard.stat().st_size
    with pytest.raises(DataError, match=rf"shard {shard} has {size} bytes, expected 7 "):
        load_index(str(shard), Store(), num_bytes=7)


def test_shard_index__container_is_safetensors_and_deterministic(shard: Path) -> None:
    index = scan_shard(shard)
    content = index.to_bytes()
    assert content == scan_shard(shard).to_bytes()
    tensors = safetensors.numpy.load(content)
    assert tensors["samples"].tobytes() == index.rows.tobytes() and tensors["samples"].shape == (10, 24 + 16)
    assert tensors["keys"].tobytes() == b"".join(b"%04d" % number for number in range(10))
    again = ShardIndex.open(content, index.num_bytes)
    assert again is not None and again.digest == index.digest and again.to_bytes() == content
    assert again.row(3) == (SAMPLE * 3, SAMPLE, int(index.crc32[3]), 12, 16, 512, 1212, 2048, 2648)


def test_shard_index__mapped_file_is_not_copied(shard: Path, tmp_path: Path) -> None:
    index = scan_shard(shard)
    index.save(tmp_path / "i.index")
    mapped = ShardIndex.open(tmp_path / "i.index", index.num_bytes)
    assert mapped is not None and not mapped.rows.flags.owndata and not mapped.rows.flags.writeable
    os.unlink(tmp_path / "i.index")  # what is mapped stays
    assert mapped.digest == index.digest


def _shorter(header: dict[str, Any]) -> None:
    header["samples"]["data_offsets"][1] -= 8


def _foreign(header: dict[str, Any]) -> None:
    header["__metadata__"]["format"] = "other/1"


def _more_fields(header: dict[str, Any]) -> None:
    header["__metadata__"]["fields"] = '["jpg", "png", "txt"]'


def _no_keys(header: dict[str, Any]) -> None:
    del header["keys"]


@pytest.mark.parametrize("damage", [_shorter, _foreign, _more_fields, _no_keys])
def test_shard_index__wrong_header_is_not_used(shard: Path, damage: Callable[[dict[str, Any]], None]) -> None:
    index = scan_shard(shard)
    content = index.to_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    damage(header)
    text = json.dumps(header).encode().ljust(size + 64)
    assert ShardIndex.open(len(text).to_bytes(8, "little") + text + content[8 + size :], index.num_bytes) is None


def test_shard_index__damaged_file_is_not_used(shard: Path, tmp_path: Path) -> None:
    index, path = scan_shard(shard), tmp_path / "i.index"
    content = index.to_bytes()
    assert ShardIndex.open(content, index.num_bytes) is not None
    assert ShardIndex.open(content, index.num_bytes + 1) is None  # of a shard of another size
    for damaged in (b"", b"not an index", content[:7], content[:100], content[: len(content) // 2], content[:-1]):
        path.write_bytes(damaged)
        assert ShardIndex.open(path, index.num_bytes) is None
        assert ShardIndex.open(damaged, index.num_bytes) is None
    pickled = pickle.dumps(index.row(0))
    assert ShardIndex.open(pickled, index.num_bytes) is None
    assert ShardIndex.open(tmp_path / "gone.index", index.num_bytes) is None


@pytest.mark.parametrize("column", ["start", "size", "key_begin", "key_end", "fields"])
def test_shard_index__range_outside_is_not_used(shard: Path, column: str) -> None:
    index = scan_shard(shard)
    rows = index.rows.copy()
    rows[column][-1] = 0xFFFFFFF0
    damaged = ShardIndex(index.num_bytes, index.field_names, rows, index.keys)
    assert ShardIndex.open(damaged.to_bytes(), index.num_bytes) is None


OPEN = """
import sys, time
from pathlib import Path
from data_pipelines.shards import index
from data_pipelines.storage.stores import Store

folder, seconds = Path(sys.argv[1]), float(sys.argv[2])
plain = index.scan_shard
def scan(path, name=None):
    with open(folder / "scans", "a") as file:
        file.write(f"{path.name} ")
    time.sleep(seconds)
    return plain(path, name)
index.scan_shard = scan
shards = sorted(map(str, folder.glob("*.tar")))
print("begins", flush=True)
sys.stdin.readline()
found = index.load_indices(shards, Store())
assert list(found) == shards
print(sum(index.num_samples for index in found.values()), flush=True)
"""


def open_together(folder: Path, processes: int, seconds: float) -> list[subprocess.Popen[str]]:
    """Processes that have begun to open all shards of a folder; a scan takes them `seconds` more."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", OPEN, str(folder), str(seconds)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen(command, env=environment, **pipes) for _ in range(processes)]
    for rank in ranks:
        assert rank.stdout.readline() == "begins\n"
    for rank in ranks:
        rank.stdin.write("\n")
        rank.stdin.flush()
    return ranks


@pytest.fixture
def read_only_shards(tmp_path: Path, write_tar: Write, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Eight shards of one sample without an index, in a folder where nothing is written but the list of scans."""
    monkeypatch.setenv("PRETRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(8):
        write_tar(folder / f"{number}.tar", [(f"{number}.jpg", b"x" * 600)])
    (folder / "scans").touch()
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    assert len(list(folder.iterdir())) == 9  # the mode does not hold for root


def test_load_indices__processes_that_open_the_same_shards_at_once_share_the_scans(read_only_shards: Path) -> None:
    ranks = open_together(read_only_shards, 3, seconds=0.1)
    assert [rank.communicate()[0] for rank in ranks] == ["8\n"] * 3 and not any(rank.returncode for rank in ranks)
    scans = (read_only_shards / "scans").read_text().split()
    assert sorted(scans) == [f"{number}.tar" for number in range(8)]
    assert not list((read_only_shards.parent / "cache" / "index").glob("*.lock"))


def test_load_indices__a_process_that_dies_in_a_scan_leaves_it_to_those_that_wait(read_only_shards: Path) -> None:
    (dying,) = open_together(read_only_shards, 1, seconds=60)
    while not (read_only_shards / "scans").read_text():
        time.sleep(0.01)
    (waiting,) = open_together(read_only_shards, 1, seconds=0)
    while len((read_only_shards / "scans").read_text().split()) < 8:  # all but the one that the first is at
        time.sleep(0.01)
    assert waiting.poll() is None
    dying.kill()
    assert waiting.communicate()[0] == "8\n" and waiting.returncode == 0
    scans = (read_only_shards / "scans").read_text().split()
    assert sorted(scans) == ["0.tar", *(f"{number}.tar" for number in range(8))]
    dying.communicate()


def test_load_indices__a_damaged_shard_is_named_to_each_process(read_only_shards: Path) -> None:
    os.truncate(read_only_shards / "5.tar", 600)
    ranks = open_together(read_only_shards, 2, seconds=0.05)
    for rank in ranks:
        rank.communicate()
        assert rank.returncode == 1


def test_load_index__unwritable_cache_costs_a_warning(shard: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PRETRAIN_CACHE", str(shard))  # a file where the folder should be
    with pytest.warns(UserWarning, match="cannot keep shard indices"):
        assert load(shard).num_samples == 10


def test_shard_index__digest_is_content_not_place(shard: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere.tar"
    copy.write_bytes(shard.read_bytes())
    assert scan_shard(copy).digest == scan_shard(shard).digest
    patch(copy, 600, b"!")
    assert scan_shard(copy).digest != scan_shard(shard).digest


def test_shard_index__save_leaves_no_temporary_file(shard: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scan_shard(shard).save(tmp_path / "kept" / "i.index")
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["i.index"]


def test_shard_index__golden_digest(shard: Path) -> None:
    """Of the first published form of the index; runs and evaluations are recorded under it."""
    assert scan_shard(shard).digest == "e9ca2ef1d93e5b264530ba51e44479982d5465e23752d80b1af26fff5158ad3e"


def test_load_index__needs_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user of a container may have no home; where the index lies beside the shard no cache is needed at all."""

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("PRETRAIN_CACHE", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    shard = tmp_path / "a.tar"
    with tarfile.open(shard, "w") as tar:
        member = tarfile.TarInfo("x.txt")
        member.size = 1
        tar.addfile(member, io.BytesIO(b"x"))
    with pytest.warns(UserWarning, match="no home directory; set PRETRAIN_CACHE"):
        found = load_index(str(shard), Store())
    found.save(Path(sidecar(str(shard))))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_index(str(shard), Store()).keys == found.keys
    assert {path.name for path in tmp_path.iterdir()} == {"a.tar", "a.tar.index"}
