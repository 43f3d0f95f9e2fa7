"""One shard from front to back: what webdataset would pass over in silence is an error here."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.storage.stores import FetchOptions, Store
from data_pipelines.streaming.tar_stream import read_samples

Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]

MEMBERS = [(f"{number}.{field}", f"{field} {number}".encode() * 200) for number in range(12) for field in ("a", "b")]
FIELDS = frozenset({"a", "b"})


@pytest.fixture
def shard(tmp_path: Path, write_tar: Write) -> Path:
    return write_tar(tmp_path / "train.tar", MEMBERS)


def read(path: Path | str, *fields: str) -> list[dict[str, object] | CorruptSampleError]:
    return list(read_samples(Store(FetchOptions(allow_pipe=True)), str(path), frozenset(fields) or FIELDS))


def webdataset_reads(path: Path) -> int:
    from webdataset import tariterators

    with path.open("rb") as file:
        files = tariterators.tar_file_expander([{"url": "", "stream": file}])
        return sum(1 for _ in tariterators.group_by_keys(files))


def rewritten(path: Path, change: Callable[[bytearray], None]) -> Path:
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
    return path


def test_read_samples__all_of_them_in_order(shard: Path) -> None:
    samples = read(shard)
    assert [sample["__key__"] for sample in samples] == [str(number) for number in range(12)]
    assert samples[3] == {"__key__": "3", "__url__": str(shard), "a": b"a 3" * 200, "b": b"b 3" * 200}


def test_read_samples__compressed_and_from_a_command(shard: Path, tmp_path: Path) -> None:
    plain = [{**sample, "__url__": ""} for sample in read(shard)]
    packed = tmp_path / "train.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert [{**sample, "__url__": ""} for sample in read(packed)] == plain
    assert [{**sample, "__url__": ""} for sample in read(f"pipe:cat {packed}")] == plain
    with pytest.raises(DataError, match=r"pipe:cat .* is a command and is not run"):
        next(read_samples(Store(), f"pipe:cat {shard}", FIELDS))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_read_samples__long_names_folders_and_links(kind: int, tmp_path: Path) -> None:
    path, long = tmp_path / "train.tar", "folder/" + "x" * 150
    with tarfile.open(path, "w", format=kind) as tar:
        for name, member_type in (("folder", tarfile.DIRTYPE), ("link", tarfile.SYMTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = member_type, long
            tar.addfile(member)
        for field in ("a", "b"):
            member = tarfile.TarInfo(f"{long}.{field}")
            member.size = 700
            tar.addfile(member, io.BytesIO(bytes(700)))
    assert read(path) == [{"__key__": long, "__url__": str(path), "a": bytes(700), "b": bytes(700)}]


@pytest.mark.parametrize("packed", [False, True])
def test_read_samples__cut_anywhere_is_an_error(shard: Path, *, packed: bool) -> None:
    content = shard.read_bytes()
    end = len(content.rstrip(b"\0")) // 512 * 512 + 512  # of the last member
    step = 512
    if packed:
        content = gzip.compress(content)
        end, step = len(content) - 1024, 97
    for size in [*range(0, end + 1024, step), end + 1023]:
        shard.write_bytes(content[:size])
        with pytest.raises(DataError, match=rf"^shard {shard}: .*; copy it again$"):
            read(shard)
    shard.write_bytes(content[: end + 1024])
    assert len(read(shard)) == 12


def zeroed_header(content: bytearray) -> None:
    content[10 * 1536 : 10 * 1536 + 512] = bytes(512)


def damaged_header(content: bytearray) -> None:
    content[10 * 1536 + 3] ^= 1


def negative_size(content: bytearray) -> None:
    header = content[10 * 1536 : 10 * 1536 + 512]
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    content[10 * 1536 : 10 * 1536 + 512] = header


def content_behind_the_end(content: bytearray) -> None:
    content[-1] = 1


def other_file(content: bytearray) -> None:
    content[:] = b"<html>please log in</html>" * 100


@pytest.mark.parametrize(
    ("change", "message", "left"),
    [
        (zeroed_header, "content behind the end of archive at offset 15360", 5),
        (damaged_header, r"no tar header at offset 15360 but b'5\.a", 5),
        (negative_size, r"member '5.a' at offset 15360 has size -1", None),
        (content_behind_the_end, "content behind the end of archive at offset", 12),
        (other_file, r"no tar header at offset 0 but b'<html>please log", None),
    ],
)
def test_read_samples__damaged_tars(
    shard: Path, change: Callable[[bytearray], None], message: str, left: int | None
) -> None:
    rewritten(shard, change)
    if left is not None:
        assert webdataset_reads(shard) == left  # without a word
    with pytest.raises(DataError, match=rf"^shard {shard}: {message}"):
        read(shard)


def test_read_samples__damage_inside_gzip_is_noticed(shard: Path) -> None:
    content = bytearray(gzip.compress(shard.read_bytes()))
    content[-6] ^= 1  # the checksum of all bytes before
    shard.write_bytes(content)
    with pytest.raises(DataError, match="CRC check failed"):
        read(shard)


def test_read_samples__repeated_field_and_missing_file(tmp_path: Path, write_tar: Write) -> None:
    path = write_tar(tmp_path / "train.tar", [("0.a", b""), ("0.A", b"")])
    with pytest.raises(DataError, match=rf"^shard {path}: 0.A: duplicate file name in tar file a"):
        read(path)
    with pytest.raises(DataError, match=r"cannot open shard .*none.tar: No such file"):
        read(tmp_path / "none.tar")


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_read_samples__pickles_are_not_even_read(tmp_path: Path, write_tar: Write) -> None:
    payload = pickle.dumps(Payload(tmp_path / "executed"))
    names = ("pkl", "pyd", "pickle", "pth", "pt", "pkl.gz")
    path = write_tar(tmp_path / "train.tar", [*((f"0.{name}", payload) for name in names), ("0.a", b"a")])
    assert list(read_samples(Store(), str(path), None)) == [{"__key__": "0", "__url__": str(path), "a": b"a"}]
    (lacking,) = read(path, "a", "pkl")
    assert isinstance(lacking, CorruptSampleError) and "no pkl" in str(lacking)
    assert not (tmp_path / "executed").exists()


def test_read_samples__a_sample_that_lacks_a_field_is_told(tmp_path: Path, write_tar: Write) -> None:
    names = ["0.a", "0.b", "1.a", "2.json", "3.c.a", "3.b", "4.a", "5.a", "4.b", "5.b"]
    samples = read(write_tar(tmp_path / "train.tar", [(name, b"") for name in names]))
    assert [isinstance(sample, CorruptSampleError) for sample in samples] == [False] + [True] * 7
    assert f"shard {tmp_path}/train.tar, sample '1': no b; a view needs it in every sample" in str(samples[1])
    assert "sample '2': no a, b" in str(samples[-1])


READ_AND_TELL = """
import os, sys
from data_pipelines.errors import DataError
from data_pipelines.storage.stores import Store
from data_pipelines.streaming.tar_stream import read_samples
before = dict(os.environ)
try:
    print(len(list(read_samples(Store(), sys.argv[1], frozenset({"a", "b"})))))
except DataError as error:
    print(error)
print("kept" if dict(os.environ) == before else "changed")
"""


def read_in_a_new_process(shard: Path, **variables: str) -> list[str]:
    """What a process says that imports webdataset under these variables: samples or an error, then `kept`."""
    command, root = [sys.executable, "-c", READ_AND_TELL, str(shard)], Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), **variables}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.splitlines()


def test_read_samples__variables_of_webdataset_play_no_role_and_are_left_alone(shard: Path) -> None:
    said = read_in_a_new_process(
        shard,
        GOPEN_REWRITE=f"{shard}=pipe:touch {shard.parent}/executed; cat {shard}",
        GOPEN_VERBOSE="1",
        WDS_CACHE_SIZE="1e9",
        WDS_SECURE="1",
        WDS_REWRITE=f"{shard}=pipe:touch {shard.parent}/executed",
    )
    assert said == ["12", "kept"]
    assert not (shard.parent / "executed").exists()


def test_read_samples__a_variable_that_webdataset_cannot_read_is_named(shard: Path) -> None:
    said = read_in_a_new_process(shard, WDS_CACHE_SIZE="many")
    problem = "webdataset cannot be imported with WDS_CACHE_SIZE=many: could not convert string to float: 'many'"
    assert said == [f"shard {shard}: {problem}; unset it", "kept"]
