"""`stats` against numbers computed in another way, on generated and on real data."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_arrays, decode_image
from data_pipelines.errors import DataError
from data_pipelines.inspection.stats import Stats, stats
from data_pipelines.inspection.stats_text import readable_bytes, stats_lines
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.index import scan_shard, sidecar

Members = Sequence[tuple[str, bytes]]
WriteTar = Callable[[Path, Members], Path]

rng = np.random.default_rng(0)


def png(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos() -> list[np.ndarray]:
    shapes = [(8, 8, 3), (8, 16, 3), (24, 8, 3), (8, 8, 3), (9, 9, 3)]
    return [rng.integers(0, 256, shape, np.uint8) for shape in shapes]


@pytest.fixture
def folder(tmp_path: Path, photos: list[np.ndarray], write_tar: WriteTar) -> Path:
    """Five photos in two shards, classes 0, 0, 0, 2, 2 of four; the last one is the first one again."""
    members = [
        member
        for number, photo in enumerate([*photos, photos[0]])
        for member in ((f"{number}.cls", b"0" if number < 3 else b"2"), (f"{number}.png", png(photo)))
    ]
    write_tar(tmp_path / "a.tar", members[:4])
    write_tar(tmp_path / "b.tar", members[4:])
    (tmp_path / "dataset.json").write_text('{"classes": ["ant", "bee", "cat", "dog"]}')
    return tmp_path


def test_stats__images_and_classes(folder: Path, photos: list[np.ndarray]) -> None:
    seen: list[tuple[int, int]] = []
    found = stats(folder, progress=lambda done, total: seen.append((done, total)))
    pixels = np.concatenate([photo.reshape(-1, 3) for photo in [*photos, photos[0]]]) / 255
    values = found.fields["png"].values
    assert values["pixels"] == len(pixels)
    np.testing.assert_allclose(values["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(values["std"], pixels.std(axis=0), rtol=1e-12)
    assert values["width"] == {"min": 8, "p5": 8, "median": 8, "p95": 16, "max": 16}
    assert values["height"] == {"min": 8, "p5": 8, "median": 8, "p95": 24, "max": 24}
    assert found.fields["cls"].values == {
        "classes": {0: 3, 1: 0, 2: 3, 3: 0},
        "balance": {"min": 0, "max": 3, "entropy_bits": 1.0, "entropy_bits_max": 2.0},
    }
    assert (found.shards, found.samples, found.read, found.damaged) == (2, 6, 6, 0)
    assert (found.compared, found.duplicates) == ("png", 1)
    sizes = [len(png(photo)) for photo in [*photos, photos[0]]]
    assert found.fields["png"].total_bytes == sum(sizes)
    assert (found.fields["png"].bytes["min"], found.fields["png"].bytes["max"]) == (min(sizes), max(sizes))
    assert found.recipe["backbone.pixel_mean"] == [round(value, 4) for value in values["mean"]]
    assert seen[-1] == (6, 6)


def test_stats__processes_give_the_same_numbers(folder: Path) -> None:
    assert stats(folder, workers=2) == stats(folder)


@pytest.mark.parametrize("limit", [1, 2, 3, 6, 7])
def test_stats__limit_takes_the_first_samples(limit: int, folder: Path, photos: list[np.ndarray]) -> None:
    found = stats(folder, limit=limit)
    pixels = np.concatenate([photo.reshape(-1, 3) for photo in [*photos, photos[0]][:limit]]) / 255
    assert (found.read, found.samples) == (min(limit, 6), 6)
    np.testing.assert_allclose(found.fields["png"].values["mean"], pixels.mean(axis=0), rtol=1e-12)
    part = "all" if limit >= 6 else f"the first {limit}"
    assert stats_lines(found)[0].endswith(f"below: {part} of them")


def test_stats__masks_and_depth(tmp_path: Path, write_tar: WriteTar) -> None:
    masks = [rng.integers(0, 3, (6, 5), np.uint8), rng.integers(200, 300, (7, 5)).astype(np.uint16)]
    depths = [rng.integers(0, 5000, (4, 4)).astype(np.uint16) for _ in masks]
    members = [
        member
        for number, (mask, depth) in enumerate(zip(masks, depths, strict=True))
        for member in ((f"{number}.seg.png", png(mask)), (f"{number}.depth.png", png(depth)))
    ]
    found = stats(write_tar(tmp_path / "a.tar", members))
    values, counts = np.unique(np.concatenate([mask.ravel() for mask in masks]), return_counts=True)
    mask = found.fields["seg.png"].values
    assert mask["classes"] == dict(zip(values.tolist(), counts.tolist(), strict=True))
    assert [axis["max"] for axis in mask["shape"]] == [7, 5]
    (depth,) = found.fields["depth.png"].values["arrays"].values()
    assert depth["dtypes"] == ["uint16"] and depth["max"] == np.max(depths)
    np.testing.assert_allclose(depth["mean"], [np.mean(depths)], rtol=1e-12)
    assert found.recipe == {} and found.compared == "depth.png"


def test_stats__arrays_have_channels_where_they_look_like_images(tmp_path: Path, write_tar: WriteTar) -> None:
    """Far from zero, where sums of squares of float64 would lose digits; per channel, without what is not finite."""
    bands = [1e7 + rng.random((4, 8, 8 + number)) for number in range(3)]
    bands[1][2, 3, 4:6] = np.nan, np.inf
    volumes = [rng.integers(0, 255, (8, 9, 10), np.uint8) for _ in bands]
    members = [
        member
        for number, (band, volume) in enumerate(zip(bands, volumes, strict=True))
        for member in ((f"{number}.npy", npy(band)), (f"{number}.volume.npy", npy(volume)))
    ]
    found = stats(write_tar(tmp_path / "a.tar", members))
    pixels = np.concatenate([band.reshape(4, -1) for band in bands], axis=1)
    band = found.fields["npy"].values["arrays"][""]
    finite = [row[np.isfinite(row)] for row in pixels]
    np.testing.assert_allclose(band["mean"], [row.mean() for row in finite], rtol=1e-15)
    np.testing.assert_allclose(band["std"], [row.std() for row in finite], rtol=1e-7)
    assert band["not_finite"] == 2
    assert (band["min"], band["max"]) == (min(row.min() for row in finite), max(row.max() for row in finite))
    assert [(axis["min"], axis["max"]) for axis in band["shape"]] == [(4, 4), (8, 8), (8, 10)]
    volume = found.fields["volume.npy"].values["arrays"][""]
    np.testing.assert_allclose(volume["mean"], [np.mean(volumes)], rtol=1e-12)


def test_stats__damaged_samples_are_counted(folder: Path, write_tar: WriteTar) -> None:
    """One sample with another byte than its index says, one whose image does not decode, one whose label does not."""
    shard = folder / "a.tar"
    scan_shard(shard).save(Path(sidecar(str(shard))))
    content, written = bytearray(shard.read_bytes()), shard.stat().st_mtime_ns
    content[512] = ord("1")
    shard.write_bytes(content)
    os.utime(shard, ns=(written, written))  # as a disk that rots does
    write_tar(
        folder / "b.tar",
        [("x.cls", b"1"), ("x.png", b"no"), ("y.cls", b"?"), ("y.png", png(np.zeros((4, 4), np.uint8)))],
    )
    found = stats(folder)
    assert (found.read, found.damaged) == (4, 3)
    assert found.fields["cls"].values["classes"] == {0: 1, 1: 1, 2: 0, 3: 0}
    assert any(line.startswith("damaged: 3 samples; ") for line in stats_lines(found))


def test_stats__fields_of_which_nothing_decodes(tmp_path: Path, write_tar: WriteTar) -> None:
    shard = write_tar(tmp_path / "a.tar", [("x.cls", b"?"), ("y.jpg", b"?"), ("z.seg.png", b""), ("u.npy", b"")])
    found = stats(shard)
    assert found.damaged == 4 and all(field.values == {} for field in found.fields.values())
    assert any(line.startswith("jpg ") for line in stats_lines(found))


def test_stats__unknown_fields_have_sizes(tmp_path: Path, write_tar: WriteTar) -> None:
    found = stats(write_tar(tmp_path / "a.tar", [("x.flac", b"12345"), ("x.pkl", b"123"), ("x.json", b"{}")]))
    assert {name: (field.kind, field.total_bytes) for name, field in found.fields.items()} == {
        "flac": (None, 5),
        "json": ("json", 2),
        "pkl": (None, 3),
    }


def test_stats__survive_json(folder: Path) -> None:
    found = stats(folder)
    back = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert back["fields"]["cls"]["values"]["classes"] == {"0": 3, "1": 0, "2": 3, "3": 0}
    assert back["samples"] == 6 and set(back) == set(Stats.__dataclass_fields__)


def test_stats__damaged_shards_are_errors(folder: Path) -> None:
    (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"b\.tar"):
        stats(folder)


def test_stats_lines__name_the_classes_and_the_recipe(folder: Path) -> None:
    lines = stats_lines(stats(folder))
    assert lines[2].split() == ["field", "kind", "samples", "total", "min", "median", "p95", "max"]
    assert "cls: 4 classes, 0 to 3 samples each, entropy 1.00 of 2.00 bits" in lines
    assert "  ant 3, bee 0, cat 3, dog 0" in lines
    assert lines[-1].startswith("for the recipe: backbone.pixel_mean=[0.") and "] backbone.pixel_std=[0." in lines[-1]


def test_stats_lines__many_classes_are_shortened(tmp_path: Path, write_tar: WriteTar) -> None:
    members = [(f"{number}-{copy}.cls", b"%d" % number) for number in range(100) for copy in range(1 + (number == 70))]
    text = "\n".join(stats_lines(stats(write_tar(tmp_path / "a.tar", members))))
    assert "  70 2, 0 1, 1 1," in text and "..., 90 1," in text and "50 1" not in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 << 20, "5.0 MiB"), (3 << 50, "3072.0 TiB")]
)
def test_readable_bytes(count: int, text: str) -> None:
    assert readable_bytes(count) == text


def test_stats__real_photos(shared_data: Path) -> None:
    """Against a computation in float64 over all pixels at once."""
    source = shared_data / "cifar10" / "test-000000.tar"
    found = stats(source)
    dataset = open_dataset(source)
    pixels = (
        np.stack([decode_image(dataset.read(number)["jpg"]) for number in range(len(dataset))]).reshape(-1, 3) / 255
    )
    np.testing.assert_allclose(found.fields["jpg"].values["mean"], pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.fields["jpg"].values["std"], pixels.std(axis=0), rtol=1e-12)
    assert found.fields["cls"].values["balance"]["entropy_bits"] == pytest.approx(math.log2(10))
    assert found.class_names[9] == "truck"


def test_stats__real_masks(shared_data: Path) -> None:
    """The shares of pixels that whoever made the set published with it."""
    description = json.loads((shared_data / "camvid" / "dataset.json").read_bytes())
    counts = stats(f"{shared_data}/camvid/train-*.tar").fields["seg.png"].values["classes"]
    shares = [count / sum(counts.values()) for count in counts.values()]
    assert list(counts) == list(range(12))
    np.testing.assert_allclose(shares, description["train_pixel_frequency"], atol=6e-6)


def test_stats__real_volumes_and_points(shared_data: Path) -> None:
    source = shared_data / "volumes_hippocampus"
    description = json.loads((source / "dataset.json").read_bytes())
    arrays = stats(source).fields["npz"].values["arrays"]
    dataset = open_dataset(source)
    volumes = [decode_arrays(dataset.read(number)["npz"])["image"].ravel() for number in range(len(dataset))]
    assert [axis["min"] for axis in arrays["image"]["shape"]] >= description["shape_range"][0]
    assert [axis["max"] for axis in arrays["label"]["shape"]] <= description["shape_range"][1]
    np.testing.assert_allclose(arrays["image"]["mean"], [np.concatenate(volumes).mean()], rtol=1e-12)
    source = shared_data / "points_psb"
    train = json.loads((source / "dataset.json").read_bytes())["splits"]["train"]
    found = stats(f"{source}/train-*.tar")
    named = zip(found.class_names, found.fields["cls"].values["classes"].values(), strict=True)
    assert dict(named) == train["per_class"]
    assert [axis["max"] for axis in found.fields["points.npy"].values["arrays"][""]["shape"]] == [2048, 3]
