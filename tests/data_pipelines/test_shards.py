"""Reading samples: content, errors at read time, descriptors across fork, pickle and many shards."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from data_pipelines.errors import DataError
from data_pipelines.index import scan_shard
from data_pipelines.shards import Dataset, open_dataset

Tiny = Callable[[Sequence[int]], Dataset]


def test_dataset__reads_what_tarfile_reads(grocery: Dataset) -> None:
    number = 0
    for shard in grocery.shards:
        with tarfile.open(shard.path) as tar:
            names = tar.getnames()
            for name in names[::2]:
                key = name.partition(".")[0]
                sample = grocery.read(number)
                fields = {n.partition(".")[2]: tar.extractfile(n).read() for n in names if n.startswith(f"{key}.")}  # type: ignore[union-attr]
                assert sample == {**fields, "__key__": key}
                number += 1
    assert number == grocery.num_samples == len(grocery) == sum(grocery.counts)


def test_dataset__counts_fields_and_description(tiny_dataset: Tiny, grocery: Dataset) -> None:
    dataset = tiny_dataset([3, 1, 4])
    assert dataset.counts == (3, 1, 4) and dataset.num_samples == 8
    assert [shard.num_samples for shard in dataset.shards] == [3, 1, 4]
    assert all(shard.num_bytes == shard.path.stat().st_size for shard in dataset.shards)
    assert dataset.fields == {"png", "cls"}
    assert [dataset.read(i)["cls"] for i in range(8)] == [str(i).encode() for i in range(8)]
    assert dataset.description == {} and grocery.description["name"] == "grocery"


def test_dataset__description_must_be_an_object(tiny_dataset: Tiny, tmp_path: Path) -> None:
    for content, message in (("{", "is not valid JSON"), ("[1]", "holds a JSON list")):
        (tmp_path / "dataset.json").write_text(content)
        with pytest.raises(DataError, match=message):
            _ = tiny_dataset([1]).description
    (tmp_path / "dataset.json").write_text(json.dumps({"name": "n"}))
    assert tiny_dataset([1]).description == {"name": "n"}


def test_dataset__digest_follows_content_and_order_not_place(tiny_dataset: Tiny, tmp_path: Path) -> None:
    dataset = tiny_dataset([2, 3])
    moved = tmp_path / "moved"
    moved.mkdir()
    for shard in dataset.shards:
        (moved / shard.path.name).write_bytes(shard.path.read_bytes())
    assert open_dataset(moved).digest == dataset.digest
    assert open_dataset(dataset.shards[0].path).digest != dataset.digest


@pytest.mark.parametrize("sample_id", [-1, 5, 10**9])
def test_dataset_read__id_out_of_range(tiny_dataset: Tiny, sample_id: int) -> None:
    with pytest.raises(DataError, match=f"sample id {sample_id} is outside 0..4"):
        tiny_dataset([2, 3]).read(sample_id)


def test_dataset_read__flipped_byte_is_a_crc_error(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 3])
    path = dataset.shards[1].path
    with open(path, "r+b") as file:
        file.seek(600)
        byte = file.read(1)[0]
        file.seek(600)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DataError, match=rf"shard {path}, sample '00002': bytes 0..\d+ have CRC-32 \w{{8}}, expected"):
        dataset.read(2)
    assert dataset.read(3)["cls"] == b"3"


def test_dataset_read__flipped_byte_is_found_through_a_sidecar(tiny_dataset: Tiny) -> None:
    path = tiny_dataset([2]).shards[0].path
    scan_shard(path).save(path.with_name(f"{path.name}.index.npz"))
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="CRC-32"):
        open_dataset(path).read(0)


def test_dataset_read__cut_or_gone_after_indexing(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 1])
    os.truncate(dataset.shards[0].path, 700)
    with pytest.raises(DataError, match=r"tiny-000000.tar: needs bytes 0..\d+, the file ends at 700"):
        dataset.read(0)
    dataset.shards[1].path.unlink()
    with pytest.raises(DataError, match=r"tiny-000001.tar at offset 0: cannot read: No such file"):
        dataset.read(2)


def test_dataset_require_field(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2])
    assert dataset.require_field("jpg", "png") == "png"
    with pytest.raises(DataError, match=r"no field pngs in every sample; every sample has cls, png \(nearest: png\)"):
        dataset.require_field("pngs")


def test_dataset__forked_readers_share_descriptors_safely(grocery: Dataset) -> None:
    expected = [grocery.read(i)["jpg"] for i in range(0, 640, 7)]  # opens every shard before the fork
    context = multiprocessing.get_context("fork")
    with context.Pool(3) as pool:
        found = [reply["jpg"] for reply in pool.imap(_Reader(grocery), range(0, 640, 7))]
    assert found == expected


class _Reader:
    """Inherited by the forked pool as an argument; pickled, so each task has a dataset without descriptors."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __call__(self, sample_id: int) -> dict[str, bytes]:
        return self.dataset.read(sample_id)


def test_dataset__fork_while_reading(grocery: Dataset) -> None:
    """Parent and child read through the same inherited descriptors at the same time; pread has no shared position."""
    crossed = list(range(0, 640, 5))
    expected = [grocery.read(i) for i in crossed]
    child = os.fork()
    if child == 0:
        same = all(
            grocery.read(i) == e for _ in range(5) for i, e in zip(reversed(crossed), reversed(expected), strict=True)
        )
        os._exit(0 if same else 1)
    same = all(grocery.read(i) == e for _ in range(5) for i, e in zip(crossed, expected, strict=True))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same


def test_dataset__pickle_drops_descriptors(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 2])
    expected = dataset.read(3)
    copy = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    assert copy.read(3) == expected == dataset.read(3)
    assert copy.digest == dataset.digest


@pytest.mark.slow
def test_dataset__spawned_reader(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 2])
    expected = dataset.read(3)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(dataset.read, (3,)) == expected


def test_dataset__open_files_are_bounded_and_closed(tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipelines.stores._MAX_OPEN_FILES", 3)
    dataset = tiny_dataset([1] * 8)

    def open_shards() -> int:
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return sum("tiny-" in os.readlink(link) for link in links if os.path.islink(link))

    for sample_id in [0, 1, 2, 3, 4, 5, 6, 7, 0, 7]:
        assert dataset.read(sample_id)["cls"] == str(sample_id).encode()
    assert open_shards() == 3
    del dataset
    assert open_shards() == 0
