"""Packing: the same bytes whatever happens on the way, nothing half done, and a set that opens and reads back."""

from __future__ import annotations

import fcntl
import hashlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from data_pipelines.decode import decode_image
from data_pipelines.errors import DataError
from data_pipelines.inspection.verify import verify
from data_pipelines.packing.pack import pack
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.shards.manifest import read_manifest
from data_pipelines.shards.source import check_source

ROOT = Path(__file__).parents[2]
WritePictures = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> WritePictures:
    """`pictures(60)`: 60 random PNGs in the folders `cat` and `dog` of `tmp_path/pictures`."""

    def write(number: int, folder: str = "pictures", size: tuple[int, int] = (16, 12)) -> Path:
        rng = np.random.default_rng(0)
        for n in range(number):
            path = tmp_path / folder / ("cat", "dog")[n % 2] / f"{n:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(path)
        return tmp_path / folder

    return write


def files(folder: Path) -> dict[str, str]:
    """SHA-256 of everything below a folder."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def samples(source: Path) -> dict[str, dict[str, Any]]:
    """What can be read back, by the name of the source file."""
    dataset = open_dataset(source)
    read = [dataset.read(number) for number in range(dataset.num_samples)]
    dataset.close()
    return {json.loads(sample["json"])["source"]: sample for sample in read}


KILLED_RUN = """
import os, signal, sys
from data_pipelines.packing.pack import pack

def progress(done, total):
    if done == 25:
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    pack(sys.argv[1], sys.argv[2], splits={"train": 0.8, "val": 0.2}, shard_samples=10, workers=1, progress=progress)
"""


def test_pack__killed_and_resumed_equals_uninterrupted_with_any_number_of_workers(
    pictures: WritePictures, tmp_path: Path
) -> None:
    source, whole, killed = pictures(60), tmp_path / "whole", tmp_path / "killed"
    options: dict[str, Any] = {"splits": {"train": 0.8, "val": 0.2}, "shard_samples": 10}
    pack(source, whole, workers=1, **options)

    command = [sys.executable, "-c", KILLED_RUN, str(source), str(killed)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
    assert (killed / "train-000002.tar.tmp").exists(), "killed in the third shard"
    assert not (killed / "dataset.json").exists()
    for part in (killed, killed / "train-*.tar"):
        for refuse in (open_dataset, check_source, lambda source: verify(source, workers=1)):
            with pytest.raises(DataError, match=r"killed holds a part of a data set: its packing has not ended; wait "):
                refuse(part)
    assert len(open_dataset(killed / "train-000000.tar")) == 10  # by its name it is no whole
    (killed / "train-000001.tar.index").unlink()  # as if killed between the shard and its mark
    (killed / "train-000009.tar.index.tmp").write_bytes(b"stale")
    first = (killed / "train-000000.tar").stat()

    reports: list[tuple[int, int]] = []
    pack(source, killed, workers=2, progress=lambda done, total: reports.append((done, total)), **options)
    assert files(killed) == files(whole)
    again = (killed / "train-000000.tar").stat()
    assert (again.st_ino, again.st_mtime_ns) == (first.st_ino, first.st_mtime_ns), "finished shards stay"
    assert (reports[0], reports[-1]) == ((10, 60), (60, 60))
    assert reports == sorted(reports)


def test_pack__same_input_elsewhere_gives_the_same_bytes(pictures: WritePictures, tmp_path: Path) -> None:
    pack(pictures(20), tmp_path / "first", workers=1)
    shutil.copytree(tmp_path / "pictures", tmp_path / "other" / "pictures")
    pack(tmp_path / "other" / "pictures", tmp_path / "second", workers=1)
    assert files(tmp_path / "first") == files(tmp_path / "second")
    pack(tmp_path / "pictures", tmp_path / "third", workers=1, seed=1)
    assert files(tmp_path / "first") != files(tmp_path / "third")


def test_pack__opens_and_reads_back(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(30)
    manifest = pack(source, tmp_path / "set", workers=1, shard_samples=8, splits={"train": 0.7, "test": 0.3})
    assert manifest == read_manifest((tmp_path / "set" / "dataset.json").read_bytes())
    assert manifest.classes == ("cat", "dog")
    assert manifest.fields == {"cls": "label", "json": "json", "png": "image"}
    assert manifest.num_samples == 30
    found = samples(tmp_path / "set")
    assert set(found) == {str(path.relative_to(source)) for path in source.rglob("*.png")}
    for name, sample in found.items():
        assert sample["png"] == (source / name).read_bytes()
        assert sample["cls"] == (b"0" if name.startswith("cat") else b"1")
    assert sorted(sample["__key__"] for sample in found.values()) == [f"{n:09d}" for n in range(30)]
    for split, described in manifest.splits.items():
        dataset = open_dataset(tmp_path / "set" / f"{split}-*.tar")
        assert (dataset.num_samples, dataset.digest) == (described.samples, described.digest)
        assert dataset.fields == set(manifest.fields)
        labels = [int(dataset.read(number)["cls"]) for number in range(len(dataset))]
        assert described.class_counts == (labels.count(0), labels.count(1))
        dataset.close()


def test_pack__stats_are_those_of_the_pixels(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(9)
    stats = pack(source, tmp_path / "set", workers=1, shard_samples=2).stats
    pixels = np.concatenate([decode_image(path.read_bytes()).reshape(-1, 3) for path in source.rglob("*.png")]) / 255
    assert stats is not None
    assert stats.pixels == len(pixels) == 9 * 16 * 12
    np.testing.assert_allclose(stats.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(stats.std, pixels.std(0), rtol=1e-12)


def test_pack__writes_plain_ustar_that_webdataset_reads(pictures: WritePictures, tmp_path: Path) -> None:
    import webdataset

    pack(pictures(5), tmp_path / "set", workers=1)
    shard = tmp_path / "set" / "train-000000.tar"
    with tarfile.open(shard, "r:") as tar:
        members = tar.getmembers()
    assert [member.name for member in members] == [f"{n:09d}.{f}" for n in range(5) for f in ("cls", "json", "png")]
    blank = (tarfile.REGTYPE, 0o444, 0, 0, 0, "", "", {})
    for m in members:
        assert (m.type, m.mode, m.mtime, m.uid, m.gid, m.uname, m.gname, m.pax_headers) == blank
    assert shard.read_bytes()[257:265] == b"ustar\x0000"
    read = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [(s["__key__"], s["cls"], s["png"][:4]) for s in read] == [
        (sample["__key__"], sample["cls"], b"\x89PNG")
        for sample in sorted(samples(tmp_path / "set").values(), key=lambda sample: sample["__key__"])
    ]


def test_pack__is_done_once(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(12), tmp_path / "set"
    first = pack(source, dest, workers=1)
    before = {path.name: path.stat().st_mtime_ns for path in dest.iterdir()}
    assert pack(source, dest, workers=1) == first
    assert {path.name: path.stat().st_mtime_ns for path in dest.iterdir()} == before


def test_pack__refuses_a_folder_that_holds_something_else(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(12), tmp_path / "set"
    pack(source, dest, workers=1)
    before = files(dest)
    with pytest.raises(DataError, match="packed with seed=0, this request has 1; choose another folder"):
        pack(source, dest, workers=1, seed=1)
    with pytest.raises(DataError, match="packed with size=None, this request has 8"):
        pack(source, dest, workers=1, size=8)
    os.utime(source / "cat" / "000.png")
    with pytest.raises(DataError, match=r"input file cat/000\.png was changed after packing"):
        pack(source, dest, workers=1)
    (source / "cat" / "000.png").unlink()
    with pytest.raises(DataError, match="packed from other input files"):
        pack(source, dest, workers=1)
    assert files(dest) == before
    (dest / "train-000000.tar").unlink()
    (tmp_path / "pictures" / "cat" / "000.png").write_bytes(b"")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("dataset.json", b'{"name": "theirs"}', "of another origin"),
        ("train-000000.tar", b"theirs", "holds train-000000.tar, which no packing left"),
    ],
)
def test_pack__refuses_a_folder_of_other_origin(
    pictures: WritePictures, tmp_path: Path, name: str, content: bytes, named: str
) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(DataError, match=named):
        pack(pictures(3), tmp_path / "set", workers=1)
    assert [path.name for path in (tmp_path / "set").iterdir()] == [name]
    assert (tmp_path / "set" / name).read_bytes() == content


def test_pack__names_a_shard_that_is_missing(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(6), tmp_path / "set"
    pack(source, dest, workers=1)
    (dest / "train-000000.tar").unlink()
    with pytest.raises(DataError, match=r"train-000000\.tar is missing or cut"):
        pack(source, dest, workers=1)


def test_pack__one_writer_at_a_time(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(6), tmp_path / "set"

    def second(done: int, total: int) -> None:
        if done == 3:
            with pytest.raises(DataError, match="another process is packing into"):
                pack(source, dest, workers=1)

    pack(source, dest, workers=1, progress=second)
    assert len(samples(dest)) == 6


@pytest.mark.parametrize("moment", ["opening", "locking"])
def test_pack__a_writer_that_ends_while_the_next_one_begins_takes_no_lock_along(
    moment: str, pictures: WritePictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It removes its folder, with the lock that the next one has opened, or is about to."""
    source, dest = pictures(6), tmp_path / "set"
    module, name = (fcntl, "flock") if moment == "locking" else (os, "open")
    real, ended = getattr(module, name), []

    def after_the_other_ended(*arguments: Any, **named: Any) -> Any:
        if not ended and (moment == "locking" or str(arguments[0]).endswith(".packing/lock")):
            ended.append(True)
            shutil.rmtree(dest)
        return real(*arguments, **named)

    monkeypatch.setattr(module, name, after_the_other_ended)
    pack(source, dest, workers=1)
    assert ended and len(samples(dest)) == 6


def test_pack__damaged_files_stop_it_or_are_left_out_and_counted(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(20), tmp_path / "set"
    (source / "cat" / "004.png").write_bytes(b"no picture")
    (source / "dog" / "007.png").write_bytes((source / "dog" / "007.png").read_bytes()[:-50])
    os.utime(source / "cat" / "004.png", (1, 1))
    with pytest.raises(
        DataError, match=r"2 of 20 samples are damaged, 1 are allowed: cat/004\.png: not a JPEG"
    ) as failure:
        pack(source, dest, workers=1, max_bad=0.09)
    assert "dog/007.png: cannot decode" in str(failure.value) and "\n" not in str(failure.value)
    assert not (dest / "dataset.json").exists()
    with pytest.warns(UserWarning, match=r"left out 2 damaged samples: cat/004\.png"):
        manifest = pack(source, dest, workers=1, max_bad=0.1)
    assert (manifest.num_samples, manifest.rejected) == (18, 2)
    assert manifest.splits["train"].class_counts == (9, 9)
    found = samples(dest)
    assert not {"cat/004.png", "dog/007.png"} & set(found)
    assert len({sample["__key__"] for sample in found.values()}) == 18


def test_pack__a_shard_of_damaged_files_only_is_not_written(pictures: WritePictures, tmp_path: Path) -> None:
    source, dest = pictures(6), tmp_path / "set"
    (source / "cat" / "004.png").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="left out 1 damaged"):
        manifest = pack(source, dest, workers=1, max_bad=0.5, shard_samples=1)
    assert manifest.num_samples == len(samples(dest)) == len(manifest.shards) == 5
    for path in source.rglob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match="6 of 6 samples are damaged"):
        pack(source, tmp_path / "none", workers=1, max_bad=0.9)


def test_pack__leaves_out_copies_and_counts_them(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(10)
    for n in (0, 2):
        shutil.copy(source / "cat" / f"{n:03d}.png", source / "dog" / f"copy{n}.png")
    manifest = pack(source, tmp_path / "set", workers=1, dedupe=True)
    assert (manifest.num_samples, manifest.duplicates) == (10, 2)
    assert not any("copy" in name for name in samples(tmp_path / "set"))
    assert pack(source, tmp_path / "all", workers=1).num_samples == 12


def test_pack__sequences_stay_together_and_in_order(tmp_path: Path) -> None:
    frames = {f"drive{d}": [f"drive{d}/{n}.png" for n in range(5 + d)] for d in range(8)}
    for number, path in enumerate(itertools.chain(*frames.values())):
        (tmp_path / "drives" / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((4, 4, 3), number, np.uint8)).save(tmp_path / "drives" / path)
    splits = {"train": 0.5, "val": 0.5}
    manifest = pack(tmp_path / "drives", tmp_path / "set", kind="sequences", splits=splits, shard_samples=7, workers=1)
    source_of = {sample["__key__"]: name for name, sample in samples(tmp_path / "set").items()}
    found = {
        name: [source_of[key] for key in keys]
        for split in manifest.splits.values()
        for name, keys in (split.sequences or {}).items()
    }
    assert found == frames
    sets = [set(split.sequences or {}) for split in manifest.splits.values()]
    assert all(sets) and not sets[0] & sets[1]


def test_pack__resize_and_re_encode(pictures: WritePictures, tmp_path: Path) -> None:
    manifest = pack(pictures(4, size=(40, 30)), tmp_path / "set", size=20, reencode="webp:80", workers=1)
    assert manifest.fields == {"cls": "label", "json": "json", "webp": "image"}
    assert {key: manifest.options[key] for key in ("size", "reencode")} == {"size": 20, "reencode": "webp:80"}
    for sample in samples(tmp_path / "set").values():
        assert decode_image(sample["webp"]).shape == (27, 20, 3)


def test_pack__mixed_formats_share_a_field_and_keep_their_bytes(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(6)
    Image.new("RGB", (5, 5)).save(source / "cat" / "one.jpg")
    (source / "cat" / "notes.txt").write_text("not a picture")
    with pytest.warns(UserWarning, match=r"not images: 1 \.txt"):
        manifest = pack(source, tmp_path / "set", workers=1)
    assert "png" in manifest.fields
    assert samples(tmp_path / "set")["cat/one.jpg"]["png"] == (source / "cat" / "one.jpg").read_bytes()


def test_pack__tars_again_with_other_shards(pictures: WritePictures, tmp_path: Path) -> None:
    pack(pictures(20), tmp_path / "first", workers=1, shard_samples=6)
    manifest = pack(tmp_path / "first", tmp_path / "second", workers=1, shard_samples=9, seed=4)
    assert manifest.classes == ("cat", "dog") and manifest.options["kind"] == "tars"
    first, second = samples(tmp_path / "first"), samples(tmp_path / "second")
    assert {name: s["png"] for name, s in first.items()} == {name: s["png"] for name, s in second.items()}
    assert [shard.samples for shard in manifest.shards.values()] == [9, 9, 2]


def test_pack__compressed_tars_leave_no_copies_behind(pictures: WritePictures, tmp_path: Path) -> None:
    source, folder = pictures(4), tmp_path / "packed"
    folder.mkdir()
    with tarfile.open(folder / "some.tar.gz", "w:gz") as tar:
        for path in sorted(source.rglob("*.png")):
            tar.add(path, path.relative_to(source))
    assert pack(folder, tmp_path / "set", workers=1).num_samples == 4
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == [
        "dataset.json",
        "train-000000.tar",
        "train-000000.tar.index",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"kind": "image"}, "kind='image' is not allowed; kinds are auto, images.*did you mean 'images'"),
        ({"kind": "list"}, "cannot pack .* as kind='list'"),
        ({"kind": "pairs"}, "pairs need a folder of masks"),
        ({"kind": "sequences", "masks": "."}, "only pairs and volumes take one"),
        ({"splits": {"train": 0.5, "val": 0.4}}, "add up to 0.9; they must give 1"),
        ({"splits": {"train": 1.0, "a-b": 0.0}}, "split 'a-b': 0.0 is not allowed"),
        ({"splits": {"train": 0.9999, "tiny": 0.0001}}, "split 'tiny' gets none of the 4 samples"),
        ({"size": 0}, "size=0 is not allowed"),
        ({"workers": 0}, "workers=0 is not allowed"),
        ({"max_bad": 1.0}, "max_bad=1.0 is not allowed"),
        ({"reencode": "gif"}, "cannot re-encode as 'gif'"),
    ],
)
def test_pack__wrong_requests_leave_nothing_behind(
    pictures: WritePictures, tmp_path: Path, options: dict[str, Any], named: str
) -> None:
    source = pictures(4)
    with pytest.raises(DataError, match=named):
        pack(source, tmp_path / "set", **{"workers": 1, **options})
    assert not (tmp_path / "set").exists()


def test_pack__wrong_places_are_named(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(2)
    for bad, named in (
        (tmp_path / "picture", "no such file or folder to pack: .*did you mean 'pictures'"),
        ("s3://bucket/prefix", "no such file or folder to pack"),
        (source / "cat" / "000.png", "cannot pack .*000.png as kind='auto'"),
    ):
        with pytest.raises(DataError, match=named):
            pack(bad, tmp_path / "set", workers=1)
    with pytest.raises(DataError, match="it lies inside the source"):
        pack(source, source / "set", workers=1)
    with pytest.raises(DataError, match="give a local folder"):
        pack(source, "s3://bucket/set", workers=1)
    with pytest.raises(DataError, match="it is a file"):
        pack(source, source / "cat" / "000.png", workers=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to pack"):
        pack(tmp_path / "empty", tmp_path / "set", workers=1)
    assert not (tmp_path / "set").exists()
    assert not (source / "set").exists()


# Real data, exported from `../shared` to files as their owners would have them.


def export(shared_data: Path, name: str, dest: Path, number: int) -> dict[str, dict[str, bytes]]:
    """Write the members of the first samples of a shared set to a folder; the samples."""
    dataset = open_dataset(shared_data / name / "train-*.tar")
    taken = {}
    for sample_id in range(number):
        sample = dataset.read(sample_id)
        key = sample.pop("__key__")
        taken[key] = sample
        for field, data in sample.items():
            (dest / field).mkdir(parents=True, exist_ok=True)
            (dest / field / f"{key}.{field.rpartition('.')[2]}").write_bytes(data)
    dataset.close()
    return taken


def stem(name: str) -> str:
    return Path(name).stem


def test_pack__camvid_pairs(shared_data: Path, tmp_path: Path) -> None:
    taken = export(shared_data, "camvid", tmp_path / "camvid", 12)
    classes = json.loads((shared_data / "camvid" / "dataset.json").read_text())["classes"]
    manifest = pack(
        tmp_path / "camvid" / "jpg",
        tmp_path / "set",
        masks=tmp_path / "camvid" / "seg.png",
        classes=classes,
        ignore_index=11,
        workers=1,
    )
    assert (manifest.fields["seg.png"], manifest.ignore_index, len(manifest.classes or ())) == ("mask", 11, 11)
    for name, sample in samples(tmp_path / "set").items():
        assert {field: sample[field] for field in ("jpg", "seg.png")} == taken[stem(name)]


def test_pack__photos_by_list(shared_data: Path, tmp_path: Path) -> None:
    taken = export(shared_data, "photos_caltech", tmp_path / "photos", 20)
    rows = [f"jpg/{key}.jpg,class{sample['cls'].decode()}\n" for key, sample in taken.items()]
    (tmp_path / "photos" / "list.csv").write_text("path,label\n" + "".join(rows))
    manifest = pack(tmp_path / "photos" / "list.csv", tmp_path / "set", size=96, workers=1)
    for name, sample in samples(tmp_path / "set").items():
        assert min(decode_image(sample["jpg"]).shape[:2]) == 96
        label = (manifest.classes or ())[int(sample["cls"])]
        assert label == f"class{taken[stem(name)]['cls'].decode()}"


def test_pack__points_of_all_formats(shared_data: Path, tmp_path: Path) -> None:
    taken = export(shared_data, "points_psb", tmp_path / "psb", 6)
    clouds = {key: np.load(io.BytesIO(sample["points.npy"])) for key, sample in taken.items()}
    folder = tmp_path / "clouds"
    folder.mkdir()
    for suffix, (key, cloud) in zip((".npy", ".npz", ".txt", ".off", ".ply", ".npy"), clouds.items(), strict=True):
        text = "".join(" ".join(map(repr, row)) + "\n" for row in cloud.astype(float).tolist())
        head = "ply\nformat ascii 1.0\nelement vertex 2048\nproperty float x\nproperty float y\nproperty float z\n"
        if suffix == ".npy":
            np.save(folder / f"{key}.npy", cloud)
        elif suffix == ".npz":
            np.savez_compressed(folder / f"{key}.npz", points=cloud)
        else:
            header = {".txt": "", ".off": "OFF\n2048 0 0\n", ".ply": f"{head}end_header\n"}[suffix]
            (folder / f"{key}{suffix}").write_text(header + text)
    manifest = pack(folder, tmp_path / "set", kind="points", workers=1)
    assert manifest.fields == {"json": "json", "points.npy": "points"}
    found = samples(tmp_path / "set")
    assert {stem(name) for name in found} == set(clouds)
    for name, sample in found.items():
        points = np.load(io.BytesIO(sample["points.npy"]), allow_pickle=False)
        assert points.dtype == np.float32
        np.testing.assert_array_equal(points, clouds[stem(name)].astype(np.float32))


def test_pack__volumes(shared_data: Path, tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    taken = export(shared_data, "volumes_hippocampus", tmp_path / "volumes", 4)
    folder = tmp_path / "volumes" / "npz"
    volumes = {key: dict(np.load(io.BytesIO(sample["npz"]))) for key, sample in taken.items()}
    as_nifti = next(iter(volumes))
    (folder / f"{as_nifti}.npz").unlink()
    nibabel.save(nibabel.Nifti1Image(volumes[as_nifti]["image"], np.eye(4)), folder / f"{as_nifti}.nii.gz")
    assert pack(folder, tmp_path / "set", workers=1).fields == {"json": "json", "volume.npy": "volume"}
    for name, sample in samples(tmp_path / "set").items():
        key, volume = name.partition(".")[0], np.load(io.BytesIO(sample["volume.npy"]))
        image = volumes[key]["image"]
        np.testing.assert_array_equal(volume, image.T if key == as_nifti else image)
        if key == as_nifti:
            assert json.loads(sample["json"])["spacing"] == [1.0, 1.0, 1.0]
        else:
            np.testing.assert_array_equal(np.load(io.BytesIO(sample["seg.npy"])), volumes[key]["label"])


def test_pack__volumes_with_channels_last(tmp_path: Path) -> None:
    (tmp_path / "volumes").mkdir()
    for name in "ab":
        np.save(tmp_path / "volumes" / f"{name}.npy", np.full((8, 9, 10, 2), ord(name), np.uint8))
    with pytest.raises(DataError, match=r"array of shape \(8, 9, 10, 2\) looks like .* add --channels last") as refused:
        pack(tmp_path / "volumes", tmp_path / "set", kind="volumes", workers=1)
    assert "a.npy" in str(refused.value) and not (tmp_path / "set").exists()  # else it would refuse what it says
    packed = pack(tmp_path / "volumes", tmp_path / "set", kind="volumes", channels="last", workers=1)
    assert packed.options["channels"] == "last"
    assert {np.load(io.BytesIO(one["volume.npy"])).shape for one in samples(tmp_path / "set").values()} == {
        (2, 8, 9, 10)
    }
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "a.jpg")
    with pytest.raises(DataError, match=r"--channels last: is of volumes, and .*photos holds images; leave it out"):
        pack(tmp_path / "photos", tmp_path / "other", channels="last", workers=1)


@pytest.mark.slow
def test_pack__cifar10_has_the_known_mean_and_deviation(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    for number in range(5):
        name = f"train-{number:06d}.tar"
        (tmp_path / "cifar10" / name).symlink_to(shared_data / "cifar10" / name)
    stats = pack(tmp_path / "cifar10", tmp_path / "set", workers=1).stats
    assert stats is not None and stats.pixels == 5000 * 32 * 32
    np.testing.assert_allclose(stats.mean, (0.4911, 0.4808, 0.4444), atol=5e-5)
    np.testing.assert_allclose(stats.std, (0.2463, 0.2444, 0.2622), atol=5e-5)


def test_pack__keeps_the_splits_of_folders_and_of_tars(tmp_path: Path) -> None:
    """A class that val lacks keeps its index, and packing the shards again moves no sample from test to train."""
    colors = {"cat": (220, 30, 30), "dog": (30, 220, 30), "fox": (30, 30, 220)}
    for split, names in (("train", ("cat", "dog", "fox")), ("test", ("cat", "fox"))):
        for name in names:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for n in range(3):
                path = tmp_path / "set" / split / name / f"{n}.png"
                Image.new("RGB", (8, 8), tuple(c + n + 9 * (split == "test") for c in colors[name])).save(path)
    manifest = pack(tmp_path / "set", tmp_path / "packed", workers=1)
    assert manifest.classes == ("cat", "dog", "fox")
    assert {name: split.class_counts for name, split in manifest.splits.items()} == {
        "train": (3, 3, 3),
        "test": (3, 0, 3),
    }
    for sample in samples(tmp_path / "packed").values():
        described = json.loads(sample["json"])
        assert described["class_name"] == manifest.classes[int(sample["cls"])] == described["source"].split("/")[1]
    again = pack(tmp_path / "packed", tmp_path / "again", workers=1)
    assert {name: split.class_counts for name, split in again.splits.items()} == {
        "train": (3, 3, 3),
        "test": (3, 0, 3),
    }
    with pytest.raises(DataError, match="has the splits train, test already; leave --split out"):
        pack(tmp_path / "set", tmp_path / "drawn", splits={"train": 0.5, "test": 0.5}, workers=1)
    apart = pack(tmp_path / "set" / "test", tmp_path / "apart", classes=("cat", "dog", "fox"), workers=1)
    assert apart.splits["train"].class_counts == (3, 0, 3)


@pytest.mark.parametrize(
    ("classes", "named"), [(("cat", "dog", "cat"), "'cat' is named twice"), (("cat", " "), "a name is empty")]
)
def test_pack__classes_are_distinct_names(tmp_path: Path, classes: tuple[str, ...], named: str) -> None:
    with pytest.raises(DataError, match=named):
        pack(tmp_path, tmp_path.parent / "dest", classes=classes)


def test_pack__says_which_samples_of_a_split_are_in_another(pictures: WritePictures, tmp_path: Path) -> None:
    source = pictures(6, "set/train")
    (tmp_path / "set" / "test" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "test" / "dog").mkdir()
    for number in (2, 4):
        shutil.copy(source / "cat" / f"{number:03d}.png", tmp_path / "set" / "test" / "cat" / f"renamed-{number}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "set" / "test" / "dog" / "own.png")
    with pytest.warns(UserWarning, match="^2 samples of test have the content of some of train, the first is number"):
        pack(tmp_path / "set", tmp_path / "packed", workers=1)


def test_pack__of_copies_in_several_splits_the_one_that_is_tested_on_stays(
    pictures: WritePictures, tmp_path: Path
) -> None:
    pictures(4, "set/train"), pictures(2, "set/val")  # the same two pictures are in both
    manifest = pack(tmp_path / "set", tmp_path / "packed", dedupe=True, workers=1)
    assert {name: split.samples for name, split in manifest.splits.items()} == {"train": 2, "val": 2}


def test_pack__tars_of_mixed_formats_give_one_field(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "mixed.tar", "w") as tar:
        for number, suffix in enumerate(("jpg", "png", "jpeg", "jpg", "txt")):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (number, 0, 0)).save(content, "PNG")
            member = tarfile.TarInfo(f"{number}.{suffix}")
            member.size = content.tell()
            content.seek(0)
            tar.addfile(member, content)
    with pytest.raises(DataError, match=r"1 of 5 samples are damaged.*mixed\.tar/4: has no picture"):
        pack(tmp_path / "mixed.tar", tmp_path / "strict", workers=1)
    with pytest.warns(UserWarning, match="left out 1 damaged samples"):
        manifest = pack(tmp_path / "mixed.tar", tmp_path / "packed", max_bad=0.3, workers=1)
    assert manifest.fields == {"jpg": "image", "json": "json"}


def test_pack__says_once_that_pictures_are_transparent(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for number, alpha in enumerate((0, 200, 255)):
        Image.new("RGBA", (8, 8), (255, 0, 255, alpha)).save(tmp_path / "set" / f"{number}.png")
    with pytest.warns(UserWarning, match="^2 samples have transparent pictures; these are seen on white$"):
        manifest = pack(tmp_path / "set", tmp_path / "packed", workers=1)
    assert manifest.stats is not None and manifest.stats.mean[1] == pytest.approx((255 + 55 + 0) / 3 / 255, abs=2e-3)
