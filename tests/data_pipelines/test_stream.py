"""The stream: each sample once per epoch, the same ids and pixels whatever the ranks and workers, exact resume."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.errors import DataError
from data_pipelines.order import key
from data_pipelines.randomness import ViewRandom, sample_seed
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.streaming.mixture import Mixture, Part
from data_pipelines.streaming.stream import Stream, StreamState
from data_pipelines.views.kinds.images import ImageView, random_resized_crop

Tiny = Callable[[Sequence[int]], Dataset]
Write = Callable[[Path, Sequence[tuple[str, bytes]]], Path]
Record = tuple[int, int, int]  # sample id, device seed, CRC-32 of all its pixels

VIEWS = (ImageView("image", 6),)


def stream(dataset: Dataset | Mixture, views: Sequence[ImageView] = VIEWS, **changes: Any) -> Stream:
    settings: dict[str, Any] = {
        "global_batch_size": 8,
        "micro_batch_size": 8,
        "rank": 0,
        "world_size": 1,
        "seed": 3,
        "block_size": 3,
        "window": 2,
        "num_streams": 4,
    }
    return Stream(dataset, views, **{**settings, **changes})


def records(batch: dict[str, torch.Tensor]) -> list[Record]:
    names = sorted(batch.keys() - {"sample_id", "seed"})
    found = []
    for row, (sample_id, seed) in enumerate(zip(batch["sample_id"].tolist(), batch["seed"].tolist(), strict=True)):
        pixels = [batch[name][row] if batch[name].ndim == 4 else batch[name][:, row] for name in names]
        found.append((sample_id, seed, zlib.crc32(b"".join(p.contiguous().numpy().tobytes() for p in pixels))))
    return found


def steps(dataset: Dataset, num_steps: int, world_size: int = 1, **changes: Any) -> list[list[Record]]:
    """Records of each optimizer step over all ranks, sorted: what must not depend on the layout."""
    by_step: list[list[Record]] = [[] for _ in range(num_steps)]
    for rank in range(world_size):
        one = stream(dataset, rank=rank, world_size=world_size, **changes)
        batches = iter(one)
        for step in range(num_steps):
            for batch in itertools.islice(batches, one.micro_batches_per_step):
                assert len(batch["sample_id"]) == one.micro_batch_size
                by_step[step] += records(batch)
        del batches
    return [sorted(step) for step in by_step]


def loader_processes() -> int:
    return len(multiprocessing.active_children())


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = loader_processes()
    yield
    deadline = time.monotonic() + 10
    while loader_processes() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert loader_processes() == before


@pytest.mark.parametrize("counts", [[1], [23], [1, 1, 1], [7, 5, 6], [40, 3, 1, 17]])
@pytest.mark.parametrize(("global_batch", "micro", "world_size"), [(8, 8, 1), (8, 2, 2), (12, 1, 4), (6, 2, 3)])
def test_stream__each_sample_once_per_epoch(
    tiny_dataset: Tiny, counts: list[int], global_batch: int, micro: int, world_size: int
) -> None:
    dataset = tiny_dataset(counts)
    n = dataset.num_samples
    num_steps = -(-3 * n // global_batch)
    seen = [
        r[0]
        for step in steps(dataset, num_steps, world_size, global_batch_size=global_batch, micro_batch_size=micro)
        for r in step
    ]
    times = np.bincount(seen, minlength=n)
    whole, rest = divmod(len(seen), n)
    assert set(times.tolist()) <= {whole, whole + 1} and int((times == whole + 1).sum()) == rest
    reference = [
        r[0] for step in steps(dataset, num_steps, global_batch_size=global_batch, micro_batch_size=1) for r in step
    ]
    assert seen == reference


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream__ids_and_pixels_do_not_depend_on_ranks_workers_or_micro_batch(
    grocery: Dataset, num_workers: int, no_process_left: None
) -> None:
    views = (ImageView("large", 24, count=2), ImageView("small", 8))
    layout = {"views": views, "global_batch_size": 24, "block_size": 40, "window": 4, "num_streams": 8}
    expected = steps(grocery, 3, 1, micro_batch_size=24, **layout)
    for world_size, micro in [(1, 8), (2, 12), (2, 3), (4, 6), (3, 4)]:
        assert steps(grocery, 3, world_size, micro_batch_size=micro, num_workers=num_workers, **layout) == expected


def test_stream__order_of_batches_does_not_depend_on_workers(grocery: Dataset, no_process_left: None) -> None:
    one, two = (list(itertools.islice(stream(grocery, num_workers=workers), 9)) for workers in (0, 2))
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("world_size", [1, 2])
def test_stream__resume_equals_uninterrupted(
    tiny_dataset: Tiny, num_workers: int, world_size: int, no_process_left: None
) -> None:
    dataset = tiny_dataset([7, 5, 9])  # 21 samples, batches of 8: most steps of a pass straddle two epochs somewhere
    layout: dict[str, Any] = {"micro_batch_size": 2, "num_workers": num_workers, "world_size": world_size}
    expected = steps(dataset, 8, **layout)
    for begin in (1, 2, 3, 6):
        state = stream(dataset).state_at(begin)
        assert steps(dataset, 8 - begin, state=state, **layout) == expected[begin:]


def test_stream__resume_at_every_position(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([4, 3])
    whole = [r for step in steps(dataset, 30, global_batch_size=1, micro_batch_size=1) for r in step]
    for position in range(21):
        state = StreamState(*divmod(position, 7))
        tail = [r for step in steps(dataset, 9, global_batch_size=1, micro_batch_size=1, state=state) for r in step]
        assert tail == whole[position : position + 9]


def test_stream__resume_with_other_world_size(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([7, 5, 9])
    expected = steps(dataset, 6)
    found: list[list[Record]] = []
    for world_size, micro, num_steps in [(2, 4, 1), (4, 1, 2), (1, 2, 1), (8, 1, 2)]:
        state = stream(dataset).state_at(len(found))
        found += steps(dataset, num_steps, world_size, micro_batch_size=micro, state=state)
    assert found == expected


def test_stream__steps_of_other_sizes_are_the_same_on_all_ranks_and_after_a_resume(tiny_dataset: Tiny) -> None:
    """A quarter and half of the steps have larger views; which ones depends on the seed and the step alone."""
    dataset, num_steps = tiny_dataset([7, 5, 9]), 60
    mix = [(0.25, (ImageView("image", 8),)), (0.5, (ImageView("image", 10),))]

    def sizes(begin: int = 0, **changes: Any) -> list[int]:
        one = stream(dataset, mix=mix, **changes)
        one.state = one.state_at(begin)
        batches = itertools.islice(one, (num_steps - begin) * one.micro_batches_per_step)
        return [batch["image"].shape[-1] for batch in batches][:: one.micro_batches_per_step]

    found = sizes()
    assert {size: found.count(size) for size in (6, 8, 10)} == {6: 19, 8: 16, 10: 25}
    assert all(sizes(rank=rank, world_size=2, micro_batch_size=2) == found for rank in (0, 1))
    assert sizes(num_workers=2) == found
    assert sizes(begin=23) == found[23:]
    assert sizes(seed=4) != found
    assert {record[:2] for step in steps(dataset, 4, mix=mix) for record in step} == {
        record[:2] for step in steps(dataset, 4) for record in step
    }  # the samples and their seeds are those of any views


def test_stream__state_at(tiny_dataset: Tiny) -> None:
    one = stream(tiny_dataset([7, 5, 9]), state=StreamState(1, 4))
    assert [one.state_at(step) for step in (0, 1, 3, 21)] == [
        StreamState(0, 0),
        StreamState(0, 8),
        StreamState(1, 3),
        StreamState(8, 0),
    ]


def test_stream__batch_holds_what_it_says(grocery: Dataset) -> None:
    views = (ImageView("global", 32, count=2), ImageView("local", 16, count=3), ImageView("one", 8))
    batch = next(iter(stream(grocery, views, seed=9, state=StreamState(2, 5))))
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == {
        "global": ((2, 8, 3, 32, 32), torch.uint8),
        "local": ((3, 8, 3, 16, 16), torch.uint8),
        "one": ((8, 3, 8, 8), torch.uint8),
        "sample_id": ((8,), torch.int64),
        "seed": ((8,), torch.int64),
    }
    assert all(tensor.is_contiguous() for tensor in batch.values())
    for row in (0, 7):  # rebuilt by hand: the crops of one view come from one generator, one after the other
        sample_id = int(batch["sample_id"][row])
        seed = sample_seed(9, 2, sample_id)
        assert int(batch["seed"][row]) == (seed if seed < 1 << 63 else seed - (1 << 64))
        image = decode_image(grocery.read(sample_id)["jpg"])
        for number, view in enumerate(views):
            rng = ViewRandom(key(number, base=seed))
            crops = torch.stack([random_resized_crop(image, view, rng) for _ in range(view.times or 1)])
            if view.times is None:
                assert torch.equal(batch[view.name][row], crops[0])
            else:
                assert torch.equal(batch[view.name][:, row], crops)


def test_stream__crops_change_with_epoch_and_seed(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([8])
    first, second = steps(dataset, 2)
    other = steps(dataset, 1, seed=4)[0]
    ids = [[r[0] for r in part] for part in (first, second, other)]
    assert ids == [list(range(8))] * 3
    for part in (second, other):
        assert all(a[1] != b[1] for a, b in zip(first, part, strict=True))
        assert sum(a[2] != b[2] for a, b in zip(first, part, strict=True)) >= 7


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream__leaves_the_global_generators_alone(tiny_dataset: Tiny, num_workers: int) -> None:
    """Dropout and the like must draw the same after a resume as without one."""
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index]
    next(iter(stream(tiny_dataset([8]), num_workers=num_workers)))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # type: ignore[index]
    assert random.getstate() == before[2]


def test_stream__iterating_again_begins_at_its_state(tiny_dataset: Tiny) -> None:
    one = stream(tiny_dataset([7, 5]), state=StreamState(0, 3))
    first, again = (records(next(iter(one))) for _ in range(2))
    assert first == again


@pytest.mark.parametrize("how", ["del", "close", "break", "error"])
def test_stream__dropped_iterator_ends_its_workers(tiny_dataset: Tiny, how: str, no_process_left: None) -> None:
    before = loader_processes()
    batches = iter(stream(tiny_dataset([30]), num_workers=2))
    next(batches)
    assert loader_processes() == before + 2
    if how == "close":
        batches.close()  # type: ignore[attr-defined]
    elif how == "break":
        for _ in batches:
            break
    elif how == "error":
        with pytest.raises(RuntimeError):
            for _ in batches:
                raise RuntimeError
    del batches


def test_stream__process_ends_although_an_iterator_is_open(grocery: Dataset) -> None:
    code = (
        "import sys; from data_pipelines.shards.dataset import open_dataset\n"
        "from data_pipelines.streaming.stream import Stream\n"
        "from data_pipelines.views.kinds.images import ImageView\n"
        f"dataset = open_dataset({str(grocery.shards[0].path)!r})\n"
        "stream = Stream(dataset, [ImageView('image', 8)], global_batch_size=4, micro_batch_size=4, rank=0,\n"
        "                world_size=1, seed=0, num_workers=2)\n"
        "batches = iter(stream); print(sorted(next(batches)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['image', 'sample_id', 'seed']\n", "")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream__broken_sample_is_named_in_one_line(
    tmp_path: Path, write_tar: Write, grocery: Dataset, num_workers: int, no_process_left: None
) -> None:
    photos = [(f"{i}.jpg", grocery.read(i)["jpg"]) for i in range(6)]
    path = write_tar(tmp_path / "a.tar", [*photos, ("bad-one.jpg", b"not a picture")])
    batches = iter(stream(open_dataset(path), global_batch_size=1, micro_batch_size=1, num_workers=num_workers))
    with pytest.raises(DataError) as caught:
        list(itertools.islice(batches, 7))
    message = str(caught.value)
    assert message.startswith(f"shard {path}, sample 'bad-one', field jpg: not a JPEG") and "\n" not in message


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream__damage_while_running_is_named(tiny_dataset: Tiny, num_workers: int, no_process_left: None) -> None:
    dataset = tiny_dataset([6])
    path = dataset.shards[0].path
    os.truncate(path, 700)
    with pytest.raises(DataError, match=rf"{path}: needs bytes .*, the file ends at"):
        next(iter(stream(dataset, num_workers=num_workers)))


def _with_damage(tmp_path: Path, write_tar: Write, grocery: Dataset, num_bad: int) -> Dataset:
    """40 photos, `num_bad` of them (b00, b01, ...) not decodable, spread over the shard."""
    members = [(f"{i:02d}.jpg", grocery.read(i)["jpg"]) for i in range(40)]
    for number in range(num_bad):
        members[number * 40 // num_bad] = (f"b{number:02d}.jpg", b"\xff\xd8\xff no picture")
    return open_dataset(write_tar(tmp_path / f"damaged-{num_bad}.tar", members))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_stream__damaged_samples_are_replaced_and_positions_stay(
    tmp_path: Path, write_tar: Write, grocery: Dataset, num_workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = _with_damage(tmp_path, write_tar, grocery, 2)
    options = {"num_workers": num_workers, "max_corrupt_fraction": 0.05, "block_size": 8}
    whole = stream(dataset, **options)
    batches = list(itertools.islice(whole, 10))  # two epochs of 40
    ids = torch.cat([batch["sample_id"] for batch in batches])
    assert sorted(ids[:40].tolist()) == sorted(ids[40:].tolist()) == list(range(40))
    assert whole.num_corrupt == 4
    assert "replaced a damaged sample (1 so far): shard " in caplog.text and "sample 'b0" in caplog.text

    # The substitute depends on the sample alone: the same after a resume, on other ranks, with other loaders.
    resumed = stream(dataset, **options | {"num_workers": 1 - num_workers // 2}, state=StreamState(0, 24))
    for batch, again in zip(batches[3:], itertools.islice(resumed, 7), strict=True):
        assert all(torch.equal(batch[name], again[name]) for name in batch)


def test_stream__more_damage_than_allowed_ends_it(tmp_path: Path, write_tar: Write, grocery: Dataset) -> None:
    dataset = _with_damage(tmp_path, write_tar, grocery, 8)
    with pytest.raises(
        DataError, match=r"\d of \d+ samples read here were damaged, more than data.max_corrupt_fraction=0.1 "
    ):
        list(itertools.islice(stream(dataset, max_corrupt_fraction=0.1), 5))
    with pytest.raises(DataError, match=r"sample 'b0\d', field jpg: .*; data.max_corrupt_fraction=0.001 replaces such"):
        list(itertools.islice(stream(dataset), 5))


def test_stream__nothing_sound_left(tmp_path: Path, write_tar: Write) -> None:
    dataset = open_dataset(write_tar(tmp_path / "a.tar", [("1.jpg", b"none"), ("2.jpg", b"none")]))
    with pytest.raises(DataError, match=r"sample \d and 15 substitutes are damaged; the last: shard"):
        next(iter(stream(dataset, max_corrupt_fraction=0.4)))


def test_stream__mixture_goes_on_anywhere_with_any_number_of_ranks(tmp_path: Path, write_tar: Write) -> None:
    parts = []
    for name, count in (("a", 7), ("b", 20)):
        members = [(f"{name}{i}.png", _picture(i)) for i in range(count)]
        parts.append(Part(name, open_dataset(write_tar(tmp_path / f"{name}.tar", members)), weight=1.0))
    mixture = Mixture(parts)
    expected = torch.cat([batch["sample_id"] for batch in itertools.islice(stream(mixture), 12)])  # 96 samples
    assert (expected < 7).sum() == 48  # half of them, though a has a quarter of the samples
    position = 5 * 8
    state = StreamState(*divmod(position, mixture.num_samples))
    ranks = [stream(mixture, rank=rank, world_size=2, micro_batch_size=4, state=state) for rank in range(2)]
    for step, both in enumerate(itertools.islice(zip(*ranks, strict=True), 7)):
        seen = torch.cat([batch["sample_id"] for batch in both])
        assert sorted(seen.tolist()) == sorted(expected[position + 8 * step :][:8].tolist())


def _picture(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (value, value, value)).save(content, "PNG")
    return content.getvalue()


def test_stream__needs_an_image_field(tmp_path: Path, write_tar: Write) -> None:
    dataset = open_dataset(write_tar(tmp_path / "a.tar", [("1.cls", b"1"), ("1.txt", b"")]))
    with pytest.raises(DataError, match=r"no field jpg or jpeg or png or webp .*in every sample; every sample has cls"):
        stream(dataset)


def test_stream__reads_pictures_of_mixed_formats(tmp_path: Path, write_tar: Write) -> None:
    """Inside one shard, in one format per shard, and in one per part of a mixture: the pixels of each picture."""
    members = [(f"{n}.{('jpg', 'png', 'JPEG')[n % 3]}", _picture(10 * n)) for n in range(6)]
    within = open_dataset(write_tar(tmp_path / "within.tar", members))
    for number, (name, picture) in enumerate(members):
        write_tar(tmp_path / f"shard-{number}.tar", [(name, picture)])
    apart = open_dataset(tmp_path / "shard-*.tar")
    parts = [Part(str(n), open_dataset(tmp_path / f"shard-{n}.tar"), repeat=1) for n in range(6)]
    for dataset in (within, apart, Mixture(parts)):
        assert dataset.fields == {"jpg"}
        (batch,) = itertools.islice(stream(dataset, global_batch_size=6, micro_batch_size=6), 1)
        values = dict(zip(batch["sample_id"].tolist(), batch["image"][:, 0, 0, 0].tolist(), strict=True))
        assert values == {n: 10 * n for n in range(6)}


def test_stream__names_the_sample_without_a_picture(tmp_path: Path, write_tar: Write) -> None:
    write_tar(tmp_path / "a.tar", [("1.jpg", _picture(1)), ("1.cls", b"1"), ("2.cls", b"2"), ("3.png", _picture(3))])
    with pytest.raises(DataError, match=r"no field jpg .* every sample has none; shard .*a\.tar, sample '2' has cls$"):
        stream(open_dataset(tmp_path / "a.tar"))
    write_tar(tmp_path / "b.tar", [(f"cat.{n}.jpg", _picture(n)) for n in range(3)])
    with pytest.raises(DataError, match=r"sample 'cat' has 0\.jpg, 1\.jpg, 2\.jpg: a key ends at the first dot"):
        stream(open_dataset(tmp_path / "b.tar"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"global_batch_size": 10, "micro_batch_size": 4}, r"global_batch_size=10 is not a multiple of .* 1 \* 4 = 4"),
        ({"world_size": 3}, r"world_size \* micro_batch_size = 3 \* 8 = 24"),
        ({"global_batch_size": 0}, "global_batch_size=0 is not allowed; it is at least 1"),
        ({"micro_batch_size": 0}, "micro_batch_size=0"),
        ({"world_size": 0}, "world_size=0"),
        ({"rank": 1}, r"rank=1 is outside 0\.\.0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"prefetch_batches": 0}, "prefetch_batches=0"),
        ({"seed": -1}, "seed=-1"),
        ({"window": 0}, "window=0"),
        ({"state": StreamState(0, -1)}, r"StreamState\(epoch=0, position=-1\) is not allowed; epoch and position"),
        ({"state": StreamState(-1, 0)}, r"are from 0"),
        ({"views": ()}, "no view is asked for"),
        ({"views": (ImageView("a", 8), ImageView("a", 9))}, "view name 'a' is used twice"),
    ],
)
def test_stream__refuses(tiny_dataset: Tiny, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        stream(tiny_dataset([4, 5]), **changes)


def test_stream__order_signature_guards_resume(tiny_dataset: Tiny) -> None:
    dataset = tiny_dataset([4, 5])
    saved = stream(dataset).order_signature
    assert saved == {
        "version": 1,
        "dataset": dataset.digest,
        "num_samples": 9,
        "seed": 3,
        "block_size": 3,
        "window": 2,
        "num_streams": 4,
        "resampler": "pil",
        "scaled_decoding": False,
        "exif_rotation": True,
    }
    stream(dataset, world_size=4, micro_batch_size=1, num_workers=2).require_order(saved)
    changed = {"seed": 4, "block_size": 2, "window": 9, "num_streams": 8, "resampler": "torch"}
    for name, value in changed.items():
        with pytest.raises(DataError, match=rf"cannot resume exactly: {name} was {saved[name]!r}, is {value!r};"):
            stream(dataset, VIEWS, **{name: value}).require_order(saved)
    with pytest.raises(DataError, match=r"dataset was .*, num_samples was 9, is 10"):
        stream(tiny_dataset([4, 6])).require_order(saved)
    before = {name: value for name, value in saved.items() if name != "exif_rotation"}
    stream(dataset, exif_rotation=False).require_order(before)  # pictures were used as stored
    with pytest.raises(DataError, match="exif_rotation was False, is True; restore"):
        stream(dataset).require_order(before)
    with pytest.raises(DataError, match="version was None, is 1"):
        stream(dataset).require_order({name: value for name, value in saved.items() if name != "version"})


@pytest.mark.slow
def test_stream__cifar10_epoch_of_shared_data(shared_data: Path, no_process_left: None) -> None:
    dataset = open_dataset(shared_data / "cifar10" / "train-*.tar")
    whole = stream(
        dataset,
        (ImageView("image", 32),),
        global_batch_size=500,
        micro_batch_size=250,
        num_workers=2,
        block_size=256,
        window=16,
        num_streams=8,
    )
    batches = list(itertools.islice(whole, 40))
    ids = torch.cat([batch["sample_id"] for batch in batches])
    assert sorted(ids.tolist()) == list(range(10_000))
    labels = np.array([int(dataset.read(i)["cls"]) for i in ids[:500].tolist()])
    assert np.bincount(labels, minlength=10).min() > 25  # a batch mixes classes
