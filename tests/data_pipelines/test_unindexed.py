"""The stream without an index: endless on every rank, shared without overlap, and honest about what it cannot do."""

from __future__ import annotations

import gzip
import io
import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.storage.stores import FetchOptions
from data_pipelines.streaming import unindexed
from data_pipelines.streaming.stream import Stream, StreamState
from data_pipelines.streaming.unindexed import UnindexedStream, reader_share
from data_pipelines.views.kinds.images import ImageView
from data_pipelines.views.kinds.labels import LabelView

Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
Make = Callable[[Sequence[int]], Path]

VIEWS = (ImageView("image", 6), LabelView("label"))


@pytest.fixture
def shards(tmp_path: Path, write_tar: Write) -> Make:
    """`shards([3, 5])`: a folder with shards of 3 and 5 pictures, labelled 0..7."""

    def make(counts: Sequence[int]) -> Path:
        labels = itertools.count()
        for number, size in enumerate(counts):
            write_tar(tmp_path / f"tiny-{number:06d}.tar", members(list(itertools.islice(labels, size))))
        return tmp_path

    return make


def members(labels: Sequence[int]) -> list[tuple[str, bytes]]:
    picture = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 7, np.uint8)).save(picture, "PNG")
    return [part for n in labels for part in ((f"{n:05d}.png", picture.getvalue()), (f"{n:05d}.cls", str(n).encode()))]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full buffer takes a thousand samples."""
    monkeypatch.setattr(unindexed, "SHUFFLED_SAMPLES", 20)


@pytest.fixture
def in_order(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples leave a reader as they come, so that its passes can be told apart."""
    monkeypatch.setattr(unindexed, "SHUFFLED_SAMPLES", 0)


def stream(source: Any, **changes: Any) -> UnindexedStream:
    settings: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 1, "seed": 3}
    return UnindexedStream(source, VIEWS, **{**settings, **changes})


def labels(one: UnindexedStream, num_micro_batches: int) -> list[int]:
    batches = list(itertools.islice(iter(one), num_micro_batches))
    assert [len(batch["label"]) for batch in batches] == [one.micro_batch_size] * num_micro_batches
    return [label for batch in batches for label in batch["label"].tolist()]


# Who reads what.


def test_reader_share__each_sample_once_per_pass() -> None:
    for num_shards, num_readers, number in itertools.product(range(1, 8), range(1, 10), range(3)):
        sizes = [3 * shard % 7 for shard in range(num_shards)]
        read = [
            (shard, sample)
            for reader in range(num_readers)
            for shard, first, step in reader_share(num_shards, reader, num_readers, 99, number)
            for sample in range(first, sizes[shard], step)
        ]
        assert sorted(read) == [(shard, sample) for shard in range(num_shards) for sample in range(sizes[shard])]


def test_reader_share__shards_move_from_pass_to_pass() -> None:
    passes = [tuple(reader_share(30, 1, 3, 5, number)) for number in range(20)]
    assert len(set(passes)) == 20
    assert {shard for shares in passes for shard, _, _ in shares} == set(range(30))
    assert passes != [tuple(reader_share(30, 1, 3, 6, number)) for number in range(20)]


@pytest.mark.parametrize("counts", [[6] * 8, [48], [12, 12, 24]])
def test_stream__two_ranks_with_two_loader_workers_share_a_pass(
    shards: Make, in_order: None, monkeypatch: pytest.MonkeyPatch, counts: list[int]
) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "7", "WORKER": "1", "NUM_WORKERS": "3"}.items():
        monkeypatch.setenv(name, value)  # webdataset would split by these
    source, options = shards(counts), {"world_size": 2, "num_workers": 2}
    if counts != [12, 12, 24]:
        seen = [labels(stream(source, rank=rank, **options), 12) for rank in range(2)]
        assert not set(seen[0]) & set(seen[1])
        assert sorted(seen[0] + seen[1]) == list(range(48))
    else:  # readers end their first pass at different times
        seen = [labels(stream(source, rank=rank, **options), 6) for rank in range(2)]
        assert not set(seen[0]) & set(seen[1])


def test_stream__nobody_starves_with_fewer_samples_than_readers(shards: Make) -> None:
    source = shards([1, 1])
    for rank in range(4):
        assert set(labels(stream(source, rank=rank, world_size=4), 30)) == {0, 1}


def test_stream__ranks_get_equally_many_batches_from_unequal_shards(shards: Make) -> None:
    source = shards([40, 1, 1])
    for rank in range(2):
        one = stream(source, rank=rank, world_size=2)
        assert one.micro_batches_per_step == 2
        labels(one, 100)


# In which order.


def test_stream__order_follows_from_seed_rank_and_start(shards: Make) -> None:
    source = shards([10] * 6)
    first = labels(stream(source), 100)
    assert first == labels(stream(source), 100)
    one = stream(source)
    assert labels(one, 100) == labels(one, 100) == first  # each iterator begins anew
    others = [
        labels(stream(source, **change), 100)
        for change in ({"seed": 4}, {"rank": 1, "world_size": 2}, {"state": StreamState(0, 8)})
    ]
    assert len({tuple(order) for order in [first, *others]}) == 4


def test_stream__samples_are_shuffled_and_come_equally_often(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unindexed, "SHUFFLED_SAMPLES", 40)
    order = labels(stream(shards([10] * 6)), 900)
    neighbours = sum(abs(first - second) == 1 for first, second in itertools.pairwise(order))
    assert neighbours < 200  # of 1799; 1620 without shuffling
    often = Counter(order)
    assert set(often) == set(range(60)) and min(often.values()) >= 25 and max(often.values()) <= 35


def test_stream__shuffle_buffer_is_bounded_in_bytes(shards: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unindexed, "SHUFFLED_BYTES", 1)
    order = labels(stream(shards([10])), 5)
    assert order == list(range(10))


def test_stream__a_resumed_run_does_not_repeat_a_beginning(shards: Make, in_order: None) -> None:
    source = shards([2] * 50)
    begun = [tuple(labels(stream(source, state=stream(source).state_at(step)), 8)) for step in range(5)]
    assert len(set(begun)) == 5
    assert max(len(set(begun[0]) & set(other)) for other in begun[1:]) <= 8  # of 16; 3 by chance


def test_stream__batches_are_those_of_an_indexed_stream(shards: Make) -> None:
    source = shards([5, 6])
    indexed = Stream(open_dataset(source), VIEWS, global_batch_size=8, micro_batch_size=2, rank=1, world_size=2, seed=3)
    one = stream(source, rank=1, world_size=2)
    expected, batch = next(iter(indexed)), next(iter(one))
    assert {name: (t.shape, t.dtype) for name, t in batch.items()} == {
        name: (t.shape, t.dtype) for name, t in expected.items()
    }
    assert len(set(batch["seed"].tolist())) == 2
    assert one.finish(batch).keys() == batch.keys()
    assert one.micro_batches_per_step == indexed.micro_batches_per_step == 2
    assert one.decoder == indexed.decoder


def test_stream__state_counts_samples(shards: Make) -> None:
    one = stream(shards([3]), state=StreamState(0, 16))
    assert [one.state_at(step) for step in (0, 2, 1000)] == [StreamState(0, n) for n in (0, 16, 8000)]
    ids = torch.cat([batch["sample_id"] for batch in itertools.islice(iter(one), 4)])
    assert sorted(ids.tolist()) == list(range(16, 24))


def test_stream__kinds_of_order_are_not_mixed(shards: Make, caplog: pytest.LogCaptureFixture) -> None:
    source = shards([4, 4])
    settings: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 2, "rank": 0, "world_size": 1, "seed": 3}
    state = stream(source).state_at(1000)
    exact = Stream(open_dataset(source), VIEWS, state=state, **settings)
    saved = stream(source).order_signature
    assert saved["exact"] is False and saved["shards"] == 2
    with pytest.raises(DataError, match=r"was taken with data.unindexed=stream.*; set data.unindexed=stream or"):
        exact.require_order(saved)
    with pytest.raises(DataError, match=r"cannot go on with the exact order .*; set data.unindexed=index or"):
        stream(source, state=exact.state_at(7)).require_order(exact.order_signature)
    with caplog.at_level(logging.WARNING):
        for rank in range(2):
            stream(source, rank=rank, world_size=2, seed=4).require_order(saved)
    assert [record.message.partition("goes on with ")[2] for record in caplog.records] == [
        "a new pass over the shards, not with the samples it had not seen yet; changed since the checkpoint: seed"
    ]


# Where from.


class Handler(SimpleHTTPRequestHandler):
    """The files of a folder; with parts of them when the server has `ranges`."""

    def send_head(self) -> Any:
        self.server.asked.append(self.path)
        begin, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        path = Path(self.translate_path(self.path))
        if not (self.server.ranges and begin and path.is_file()):
            return super().send_head()
        content = path.read_bytes()
        part = content[int(begin) : int(end) + 1 if end else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {begin}-{int(begin) + len(part) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        return io.BytesIO(part)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    running: Any = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    running.ranges, running.asked = True, []
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running
    running.shutdown()
    running.server_close()


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream__remote_shards_are_not_read_before_they_are_needed(
    shards: Make, server: Any, tmp_path_factory: pytest.TempPathFactory, ranges: bool, num_workers: int
) -> None:
    server.ranges = ranges
    shards([5] * 12)
    url = f"http://127.0.0.1:{server.server_port}/tiny-{{000000..000011}}.tar"
    fetch = FetchOptions(cache_dir=str(tmp_path_factory.mktemp("cache")), retries=1, timeout_s=5.0)
    one = stream(url, fetch=fetch, num_workers=num_workers)
    assert set(server.asked) == {"/tiny-000000.tar"}  # what fields there are
    assert set(labels(one, 200)) == set(range(60))


def test_stream__a_missing_remote_shard_is_named_once(shards: Make, server: Any) -> None:
    shards([5])
    url = f"http://127.0.0.1:{server.server_port}/tiny-{{000000..000001}}.tar?key=secret"
    with pytest.raises(DataError, match=r"^http://127.0.0.1:\d+/tiny-000001.tar at offset 0: HTTP 404 .*the name$"):
        labels(stream(url, fetch=FetchOptions(retries=0)), 20)


def test_stream__compressed_and_piped_shards(shards: Make) -> None:
    folder = shards([4, 4, 4])
    for number in (1, 2):
        plain = folder / f"tiny-{number:06d}.tar"
        packed = gzip.compress(plain.read_bytes())
        plain.with_suffix(".tgz" if number == 2 else ".tar.gz").write_bytes(packed)
        plain.unlink()
    assert set(labels(stream(folder), 60)) == set(range(12))
    with pytest.raises(DataError, match=r"data.allow_pipe=true"):
        stream(f"pipe:cat {folder}/tiny-000001.tar.gz")
    piped = stream(f"pipe:cat {folder}/tiny-000001.tar.gz", fetch=FetchOptions(allow_pipe=True))
    assert set(labels(piped, 20)) == {4, 5, 6, 7}


# What is wrong with them.


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream__cut_shard_ends_the_stream(shards: Make, num_workers: int) -> None:
    cut = shards([4, 4]) / "tiny-000001.tar"
    cut.write_bytes(cut.read_bytes()[: 4 * 1024])  # before the header of the third sample, where tarfile sees an end
    with pytest.raises(DataError, match=rf"^shard {cut}: no clean end of archive, the file ends at 4096: cut"):
        labels(stream(cut.parent, num_workers=num_workers), 20)


def damaged(folder: Path, write_tar: Write, num_damaged: int) -> Path:
    parts = members(range(20))
    for number in range(num_damaged):
        place = 4 * number
        parts[place] = (parts[place][0], b"no picture") if number % 2 else ("00000.txt", b"no field")
    write_tar(folder / "tiny-000000.tar", [*members([99]), *parts])
    return folder


def test_stream__damaged_samples_are_replaced_by_the_next(tmp_path: Path, write_tar: Write) -> None:
    source = damaged(tmp_path, write_tar, 2)
    one = stream(source, max_corrupt_fraction=0.25, num_workers=1)
    assert set(labels(one, 100)) == {*range(20), 99} - {0, 2}
    assert 10 <= one.num_corrupt <= 30  # 2 of 21 samples
    with pytest.raises(DataError, match=r"(no png|field png).*; data.max_corrupt_fraction=0.001 replaces such samples"):
        labels(stream(source), 100)


def test_stream__too_many_damaged_samples_end_it(tmp_path: Path, write_tar: Write) -> None:
    source = damaged(tmp_path, write_tar, 2)
    one = stream(source, max_corrupt_fraction=0.0002)
    with pytest.raises(DataError, match=r"^[23] of \d+ samples read here were damaged, more than data.max_corrupt"):
        labels(one, 100)
    everything = write_tar(tmp_path / "bad.tar", [(f"{n}.{field}", b"") for n in range(9) for field in ("png", "cls")])
    with pytest.raises(DataError, match=r"15 substitutes are damaged; the last: shard .*bad.tar, sample '\d', field"):
        labels(stream(everything, max_corrupt_fraction=0.5), 100)


def test_stream__sets_that_hold_nothing(tmp_path: Path, write_tar: Write, shards: Make) -> None:
    empty = write_tar(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match=rf"shard {empty} has no sample KEY.FIELD to begin with"):
        stream(empty)
    text = write_tar(tmp_path / "text.tar", [("0.txt", b"")])
    with pytest.raises(DataError, match=r"view 'image': no field jpg or .* in every sample; every sample has txt"):
        stream(text)
    picture, label = members([0])
    one = stream(write_tar(tmp_path / "tiny.tar", [picture, label]))
    write_tar(tmp_path / "tiny.tar", [])
    with pytest.raises(DataError, match=r"no sample in 2 passes over 1 shards"):
        labels(one, 1)


def test_stream__pictures_of_mixed_formats(tmp_path: Path, write_tar: Write) -> None:
    found = [
        (name.replace("png", ("png", "jpg", "JPEG")[n // 2 % 3]), data)
        for n, (name, data) in enumerate(members(range(6)))
    ]
    write_tar(tmp_path / "mixed.tar", [*found, ("00005.webp.txt", b"of another kind")])
    one = stream(tmp_path / "mixed.tar", max_corrupt_fraction=0.0)
    assert set(labels(one, 6)) == set(range(6))
