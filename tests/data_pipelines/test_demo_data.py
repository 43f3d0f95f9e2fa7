"""The pictures that ship with the package: small, whole, licensed, described truly, made by the script."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from data_pipelines.decode import decode_image, decode_label, decode_mask
from data_pipelines.shards.dataset import open_dataset

REPOSITORY = Path(__file__).resolve().parents[2]


def test_demo_data__is_small_and_holds_nothing_else(demo_data: Path) -> None:
    files = [path for path in demo_data.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    expected = r"(NOTICE\.md|(grocery|chair)/(dataset\.json|(train|test)-\d{6}\.tar))"
    assert [str(path) for path in files if not re.fullmatch(expected, str(path.relative_to(demo_data)))] == []


def test_demo_data__notice_carries_the_licences(demo_data: Path) -> None:
    notice = (demo_data / "NOTICE.md").read_text()
    for words in ("MIT License", "Copyright (c) 2019 Marcus Klasson", "Permission is hereby granted", "CC0", "1DInc"):
        assert words in notice
    assert 'THE SOFTWARE IS PROVIDED "AS IS"' in notice and notice.count("Changed:") == 2


@pytest.mark.parametrize("name", ["grocery", "chair"])
def test_demo_data__description_is_true(demo_data: Path, name: str) -> None:
    described = json.loads((demo_data / name / "dataset.json").read_text())
    assert described["name"] == name and described["licence"] and described["origin"]
    for split, content in described["splits"].items():
        dataset = open_dataset(demo_data / name / f"{split}-*.tar")
        assert dataset.num_samples == content["samples"] and dataset.fields == set(described["fields"])
        for shard, entry in zip(dataset.shards, content["shards"], strict=True):
            assert (shard.path.name, shard.num_samples, shard.num_bytes) == (
                entry["file"],
                entry["samples"],
                entry["bytes"],
            )
            assert hashlib.sha256(shard.path.read_bytes()).hexdigest() == entry["sha256"]


@pytest.mark.parametrize("name", ["grocery", "chair"])
def test_demo_data__tars_are_deterministic(demo_data: Path, name: str) -> None:
    for path in (demo_data / name).glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert path.read_bytes()[257:263] == b"ustar\0"


@pytest.mark.parametrize(("split", "samples", "shards", "per_class"), [("train", 640, 4, 32), ("test", 200, 1, 10)])
def test_demo_data__grocery(demo_data: Path, split: str, samples: int, shards: int, per_class: int) -> None:
    dataset = open_dataset(demo_data / "grocery" / f"{split}-*.tar")
    assert (dataset.num_samples, len(dataset.shards)) == (samples, shards)
    contents = [dataset.read(i) for i in range(samples)]
    labels = [decode_label(content["cls"]) for content in contents]
    assert np.bincount(labels).tolist() == [per_class] * len(dataset.description["classes"])
    assert len(set(labels[:20])) == 20  # interleaved, so any prefix is balanced
    assert len({content["__key__"] for content in contents}) == samples
    assert all(min(decode_image(content["jpg"]).shape[:2]) == 96 for content in contents)


def test_demo_data__grocery_splits_share_no_picture(demo_data: Path) -> None:
    pictures = {}
    for split in ("train", "test"):
        dataset = open_dataset(demo_data / "grocery" / f"{split}-*.tar")
        pictures[split] = {dataset.read(i)["jpg"] for i in range(dataset.num_samples)}
    assert not pictures["train"] & pictures["test"]


@pytest.mark.parametrize(("split", "samples", "shards"), [("train", 100, 2), ("test", 60, 1)])
def test_demo_data__chair_masks_are_neither_trivial_nor_empty(
    demo_data: Path, split: str, samples: int, shards: int
) -> None:
    dataset = open_dataset(demo_data / "chair" / f"{split}-*.tar")
    assert (dataset.num_samples, len(dataset.shards)) == (samples, shards)
    assert dataset.description["ignore_index"] == 255 and dataset.description["classes"] == ["background", "chair"]
    images = np.stack([decode_image(dataset.read(i)["jpg"]) for i in range(samples)])  # (n, 96, 96, 3)
    masks = np.stack([decode_mask(dataset.read(i)["seg.png"]) for i in range(samples)])  # (n, 96, 96)
    assert images.shape == (samples, 96, 96, 3) and masks.shape == (samples, 96, 96)
    assert masks.dtype == np.uint8 and np.unique(masks).tolist() == [0, 1]
    share = masks.mean(axis=(1, 2))
    assert share.min() > 0.03 and share.max() < 0.7
    is_chair = masks == 1
    assert (images[~is_chair].min(axis=-1) > 240).mean() < 0.05  # the background is not white
    prior = np.minimum(is_chair.mean(axis=0), 1 - is_chair.mean(axis=0))
    assert prior.mean() > 0.15  # nor does the place alone tell: this is the error of the best fixed mask


@pytest.mark.slow
def test_demo_data__script_makes_these_bytes(demo_data: Path, shared_data: Path, tmp_path: Path) -> None:
    script = REPOSITORY / "scripts" / "make_demo_data.py"
    command = [sys.executable, str(script), "--source", str(shared_data), "--destination", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300, cwd=REPOSITORY)
    made, shipped = (
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()} for f in (tmp_path, demo_data)
    )
    assert made.keys() == shipped.keys()
    assert [name for name in made if made[name] != shipped[name]] == []
