"""What Macs, file managers and people leave beside data is left out everywhere, and said once."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.hidden import is_hidden
from data_pipelines.inspection.stats import stats
from data_pipelines.inspection.verify import verify
from data_pipelines.packing.pack import pack
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.index import scan_shard
from data_pipelines.storage.stores import Store
from data_pipelines.streaming.tar_stream import read_samples

WriteTar = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
APPLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        " + bytes(200)


@pytest.mark.parametrize(
    ("path", "hidden"),
    [
        ("000.jpg", False),
        ("./000.jpg", False),
        ("../a/000.jpg", False),
        ("._000.jpg", True),
        (".DS_Store", True),
        ("a/.git/x.jpg", True),
        ("__MACOSX/000.jpg", True),
        ("cat/Thumbs.db", True),
        ("Desktop.ini", True),
        ("a.b/c.jpg", False),
    ],
)
def test_is_hidden(path: str, hidden: bool) -> None:
    assert is_hidden(path) == hidden


@pytest.fixture
def mac_shards(tmp_path: Path, write_tar: WriteTar) -> Path:
    """Two shards as bsdtar of a Mac writes them, with companions inside samples, and a companion of a shard."""
    folder = tmp_path / "mac"
    folder.mkdir()
    for shard in range(2):
        members: list[tuple[str, bytes]] = [("README", b"hello"), (".DS_Store", b"Bud1"), ("Thumbs.db", b"x")]
        for number in range(4):
            for field in ("cls", "txt"):
                name = f"{shard}{number:03d}.{field}"
                members += [(f"._{name}", APPLE), (name, str(number).encode())]
        write_tar(folder / f"train-{shard:06d}.tar", [*members, (".hidden/0.cls", b"7")])
    (folder / "._train-000000.tar").write_bytes(APPLE)
    return folder


def test_dataset__leaves_hidden_members_and_shards_out_and_says_so_once(mac_shards: Path) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        dataset = open_dataset(mac_shards)
    assert dataset.num_samples == 8 and dataset.fields == {"cls", "txt"}
    assert dataset.read(6) == {"__key__": "1002", "cls": b"2", "txt": b"2"}
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2 and texts[0].startswith("left out hidden files of") and "._train-000000.tar" in texts[0]
    assert texts[1].startswith("left out members of shards that are hidden (._000.jpg, .DS_Store) or have no KEY.FIELD")


@pytest.mark.filterwarnings("ignore:left out")
def test_every_reader_leaves_the_same_out(mac_shards: Path, tmp_path: Path) -> None:
    report = verify(mac_shards)
    assert not report.findings and (report.num_shards, report.num_samples) == (2, 8)
    assert len(report.left_out) == 2 * 12 and report.left_out[0] == "README"
    assert stats(mac_shards).samples == 8
    streamed: list[Any] = list(read_samples(Store(), str(mac_shards / "train-000000.tar"), None))
    assert [sample["__key__"] for sample in streamed] == ["0000", "0001", "0002", "0003"]
    wanted = frozenset({"cls"})
    assert not any(
        isinstance(sample, Exception)
        for sample in islice(read_samples(Store(), str(mac_shards / "train-000001.tar"), wanted), 9)
    )
    packed = pack(mac_shards, tmp_path / "packed", workers=1)
    assert packed.num_samples == 8


def test_scan_shard__of_hidden_members_alone_holds_no_sample(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "a.tar", [("._a.jpg", APPLE), ("README", b"")])
    with pytest.warns(UserWarning, match="left out members"), pytest.raises(ValueError, match="holds no sample"):
        scan_shard(shard)
