"""Reading samples: content, errors at read time, descriptors across fork, pickle and many shards."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import tarfile
import threading
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.shards import dataset as shards_module
from data_pipelines.shards.dataset import Dataset, Shard, locate, open_dataset
from data_pipelines.shards.index import scan_shard, sidecar
from data_pipelines.shards.manifest import FORMAT, split_digest

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


def test_dataset__description_is_an_object_or_nothing(tiny_dataset: Tiny, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(DataError, match=rf"^{tmp_path}/dataset.json is not valid JSON"):
        tiny_dataset([1])
    for content, expected in (("[1]", {}), ('{"name": "n"}', {"name": "n"}), ("", {})):
        (tmp_path / "dataset.json").write_text(content)
        assert tiny_dataset([1]).description == expected


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
    with pytest.raises(
        CorruptSampleError, match=rf"shard {path}, sample '00002': bytes 0..\d+ have CRC-32 \w{{8}}, expected"
    ):
        dataset.read(2)
    assert dataset.read(3)["cls"] == b"3"


def test_dataset_read__flipped_byte_is_found_through_a_sidecar(tiny_dataset: Tiny) -> None:
    path = tiny_dataset([2]).shards[0].path
    scan_shard(path).save(Path(sidecar(str(path))))
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as bits rot: without a new time
    with pytest.raises(DataError, match="CRC-32"):
        open_dataset(path).read(0)


def change(path: Path) -> None:
    """Another byte in the first member, later than the index was written."""
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_dataset__shard_changed_beside_its_index_is_noticed(tiny_dataset: Tiny) -> None:
    path = tiny_dataset([2]).shards[0].path
    scan_shard(path).save(Path(sidecar(str(path))))
    change(path)
    with pytest.raises(DataError, match="was changed after the index beside it was written, and holds something else"):
        open_dataset(path)


def test_dataset__times_that_copying_turned_around_cost_a_scan(
    tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_dataset([2]).shards[0].path
    index = scan_shard(path)
    index.save(Path(sidecar(str(path))))
    later = path.stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))
    assert open_dataset(path).digest == split_digest([index.digest])
    monkeypatch.setattr("data_pipelines.shards.index.scan_shard", lambda *_: pytest.fail("scanned again"))
    assert open_dataset(path).read(1)["cls"] == b"1"


@pytest.mark.parametrize("with_index", [True, False])
def test_dataset_digest__looks_at_listed_shards(tiny_dataset: Tiny, with_index: bool) -> None:
    """A digest by which results are known is not taken from `dataset.json` when a shard is newer or of another size."""
    dataset = tiny_dataset([2, 3])
    write_manifest(dataset)
    first, second = (shard.path for shard in dataset.shards)
    if with_index:
        for path in (first, second):
            scan_shard(path).save(Path(sidecar(str(path))))
    assert open_dataset(first.parent).digest == dataset.digest
    change(second)
    said = "was changed after the index" if with_index else "index_digest of its index is"
    with pytest.raises(DataError, match=said):
        _ = open_dataset(first.parent).digest
    os.truncate(first, first.stat().st_size - 512)
    with pytest.raises(DataError, match=r"dataset\.json, or when it was opened first"):
        _ = open_dataset(first.parent).digest


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
    with pytest.raises(
        DataError, match=r"no field pngs in every sample; every sample has cls, png; did you mean 'png'\?"
    ):
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
    monkeypatch.setattr("data_pipelines.storage.stores._MAX_OPEN_FILES", 3)
    dataset = tiny_dataset([1] * 8)

    def open_shards() -> int:
        links = (os.path.join("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd"))
        return sum("tiny-" in os.readlink(link) for link in links if os.path.islink(link))

    for sample_id in [0, 1, 2, 3, 4, 5, 6, 7, 0, 7]:
        assert dataset.read(sample_id)["cls"] == str(sample_id).encode()
    assert open_shards() == 3
    del dataset
    assert open_shards() == 0


def test_shard__name() -> None:
    names = {location: Shard(location, 1, 1, "").name for location in ("/a/b?.tar", "https://h/a/b.tar?key=a/b")}
    assert names == {"/a/b?.tar": "b?.tar", "https://h/a/b.tar?key=a/b": "b.tar"}


def test_locate__every_id() -> None:
    assert [locate(i, [0, 2, 2, 5]) for i in range(5)] == [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2)]


def write_manifest(dataset: Dataset, *, fields: Sequence[str] = ("cls", "png"), **changes: Any) -> None:
    """A `dataset.json` of ours beside the shards; `changes` are made to the entry of the second shard."""
    entries = [
        {"name": s.name, "samples": s.num_samples, "bytes": s.num_bytes, "sha256": "", "index_digest": s.index_digest}
        for s in dataset.shards
    ]
    entries[1].update(changes)
    split = {"samples": dataset.num_samples, "digest": dataset.digest, "shards": entries}
    content = {"format": FORMAT, "name": "tiny", "fields": dict.fromkeys(fields, "image"), "splits": {"tiny": split}}
    dataset.shards[0].path.with_name("dataset.json").write_text(json.dumps(content))


def test_open_dataset__listed_shards_are_not_opened_before_they_are_read(
    tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    indexed = tiny_dataset([2, 3, 1])
    write_manifest(indexed)
    opened: list[str] = []
    load_index = shards_module.load_index
    monkeypatch.setattr(shards_module, "load_index", lambda at, *a, **k: opened.append(at) or load_index(at, *a, **k))
    listed = open_dataset(indexed.shards[0].path.parent)
    facts = (listed.shards, listed.counts, listed.num_samples, listed.fields, listed.digest)
    assert facts == (indexed.shards, indexed.counts, indexed.num_samples, indexed.fields, indexed.digest)
    assert opened == []
    assert [listed.read(i) for i in (3, 2, 4)] == [indexed.read(i) for i in (3, 2, 4)]
    assert opened == [listed.shards[1].location]


def test_open_dataset__unlisted_shard_beside_listed_ones(tiny_dataset: Tiny, tmp_path: Path) -> None:
    indexed = tiny_dataset([2, 3])
    write_manifest(indexed)
    extra = tmp_path / "tiny-000009.tar"
    extra.write_bytes(indexed.shards[1].path.read_bytes())
    both = open_dataset(tmp_path)
    assert both.counts == (2, 3, 3) and both.fields == {"cls", "png"}
    assert both.read(5) == both.read(2)


def test_open_dataset__sidecars_and_manifest_do_not_change_the_digest(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 3])
    folder, digest = dataset.shards[0].path.parent, dataset.digest
    for shard in dataset.shards:
        scan_shard(shard.path).save(Path(sidecar(shard.location)))
    assert open_dataset(folder).digest == digest
    write_manifest(dataset)
    assert open_dataset(folder).digest == digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 4}, r"samples of its index is 3, expected 4 \(dataset.json"),
        ({"bytes": 512}, r"has \d+ bytes, expected 512 \(dataset.json"),
        ({"index_digest": "0" * 64}, r"index_digest of its index is \w{64}, expected 0{64} \(dataset.json"),
        (
            {"fields": ("cls", "png", "seg.png")},
            "not every sample has seg.png, which its dataset.json lists",
        ),
    ],
)
def test_open_dataset__manifest_of_other_shards(tiny_dataset: Tiny, changes: dict[str, Any], message: str) -> None:
    dataset = tiny_dataset([2, 3])
    write_manifest(dataset, **changes)
    listed = open_dataset(dataset.shards[0].path.parent)
    with pytest.raises(DataError, match=f"shard {listed.shards[1].path}:? {message}"):
        listed.read(3)


def test_open_dataset__stale_sidecar_is_noticed(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([2, 3])
    write_manifest(dataset)
    path = dataset.shards[1].path
    stale = scan_shard(path)
    rows = stale.rows.copy()
    rows["crc32"][1] ^= 1
    replace(stale, rows=rows).save(Path(sidecar(str(path))))
    with pytest.raises(DataError, match="index_digest of its index is"):
        open_dataset(path.parent).read(2)


@pytest.mark.parametrize("content", ['{"name": "other", "splits": []}', '{"format": "theirs"}'])
def test_open_dataset__other_peoples_description(tiny_dataset: Tiny, tmp_path: Path, content: str) -> None:
    (tmp_path / "dataset.json").write_text(content)
    dataset = tiny_dataset([2, 1])
    assert dataset.counts == (2, 1) and dataset.description == json.loads(content)


def test_open_dataset__malformed_manifest_names_the_file(tiny_dataset: Tiny, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(json.dumps({"format": FORMAT, "name": "tiny"}))
    with pytest.raises(DataError, match=rf"^{tmp_path}/dataset.json of format {FORMAT} lacks 'fields'"):
        tiny_dataset([1])


def test_open_dataset__limit(tiny_dataset: Tiny) -> None:
    whole = tiny_dataset([2, 3, 4])
    folder = whole.shards[0].path.parent
    digests = {whole.digest}
    for limit in range(1, 9):
        first = open_dataset(folder, limit=limit)
        assert first.num_samples == len(first) == sum(first.counts) == limit
        assert [first.read(i) for i in range(limit)] == [whole.read(i) for i in range(limit)]
        with pytest.raises(DataError, match=f"sample id {limit} is outside 0..{limit - 1}"):
            first.read(limit)
        ids = first.sample_order(seed=0, block_size=2, window=2, num_streams=2)(range(limit))[1]
        assert sorted(ids.tolist()) == list(range(limit))
        digests.add(first.digest)
    assert len(digests) == 9
    assert open_dataset(folder, limit=5).digest == open_dataset([s.path for s in whole.shards[:2]]).digest
    assert open_dataset(folder, limit=9).digest == open_dataset(folder, limit=99).digest == whole.digest
    with pytest.raises(DataError, match="limit=0 is not allowed"):
        open_dataset(folder, limit=0)


def test_open_dataset__limit_does_not_open_what_it_leaves_out(tiny_dataset: Tiny) -> None:
    whole = tiny_dataset([2, 3, 4])
    os.truncate(whole.shards[2].path, 100)
    assert open_dataset(whole.shards[0].path.parent, limit=5).counts == (2, 3)


def test_dataset_prefetch__ranges_of_remote_samples(tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = tiny_dataset([2, 3])
    asked: list[tuple[str, int, int]] = []
    monkeypatch.setattr(dataset._store, "prefetch", asked.extend)
    dataset.prefetch([0, 4])
    assert asked == []  # local files are here
    monkeypatch.setattr(dataset, "_is_remote", True)
    dataset.prefetch([4, 0])
    last, first = scan_shard(dataset.shards[1].path).row(2), scan_shard(dataset.shards[0].path).row(0)
    assert asked == [(dataset.shards[1].location, *last[:2]), (dataset.shards[0].location, *first[:2])]


def test_dataset__open_indices_are_bounded(tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "INDEX_BYTES", 3 * (8 << 10) + 1000)
    dataset = tiny_dataset([1] * 8)
    write_manifest(dataset)
    dataset = open_dataset(dataset.shards[0].path.parent)
    for sample_id in [0, 1, 2, 3, 4, 5, 6, 7, 5, 0, 7]:
        assert dataset.read(sample_id)["cls"] == str(sample_id).encode()
    assert list(dataset._indices._opened) == [5, 0, 7]


def test_dataset__index_that_changed_while_it_was_closed(tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "INDEX_BYTES", 1)
    dataset = tiny_dataset([1, 1])
    path = dataset.shards[0].path
    content = bytearray(path.read_bytes())
    content[600] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(0, 12345))  # a new scan finds new CRCs
    with pytest.raises(DataError, match=r"index_digest of its index is .* or when it was opened first"):
        dataset.read(0)


def test_dataset__threads_share_bounded_indices(tiny_dataset: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "INDEX_BYTES", 1)  # one at a time: every read closes another thread's index
    dataset = tiny_dataset([1] * 6)
    wrong: list[object] = []

    def read(seed: int) -> None:
        try:
            for i in range(200):
                sample_id = (i * seed) % 6
                if dataset.read(sample_id)["cls"] != str(sample_id).encode():
                    wrong.append(sample_id)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in (1, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_open_dataset__many_listed_shards_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 000 shards of 10 000 samples: less than 1 KB each, whatever they hold; nothing but `dataset.json` is read."""
    names = [f"train-{number:06d}.tar" for number in range(20_000)]
    entry = {"samples": 10_000, "bytes": 10**9, "sha256": "0" * 64}
    shards = [{"name": name, **entry, "index_digest": f"{number:064d}"} for number, name in enumerate(names)]
    split = {"samples": 200_000_000, "digest": "", "shards": shards}
    content = {"format": FORMAT, "name": "large", "fields": {"jpg": "image"}, "splits": {"train": split}}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    locations = [str(tmp_path / name) for name in names]  # grows the table of names in pathlib, which is not ours
    monkeypatch.setattr(shards_module, "expand_source", lambda *_, **__: locations)
    tracemalloc.start()
    dataset = open_dataset(tmp_path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert dataset.num_samples == 200_000_000 and dataset.fields == {"jpg"}
    assert held < 20_000 * 600 and peak < 20_000 * 4000
