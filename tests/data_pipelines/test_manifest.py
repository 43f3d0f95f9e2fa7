"""`dataset.json`: ours is read back whole, other people's is left alone, a broken one is named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipelines.errors import DataError
from data_pipelines.shards.manifest import ChannelStats, Manifest, ShardEntry, Split, read_manifest, split_digest

SHARDS = (
    ShardEntry("train-000000.tar", 2, 10240, "aa", "bb"),
    ShardEntry("train-000001.tar", 1, 20480, "cc", "dd"),
)
FULL = Manifest(
    name="pictures",
    fields={"jpg": "image", "cls": "label"},
    splits={
        "train": Split(3, split_digest(["bb", "dd"]), SHARDS, class_counts=(1, 2), sequences={"drive": ["000", "002"]})
    },
    options={"seed": 3, "splits": [["train", 1.0]]},
    classes=("cat", "dög"),
    ignore_index=255,
    stats=ChannelStats((0.1, 0.2, 0.3), (0.5, 0.5, 0.5), 12),
    duplicates=0,
    rejected=1,
    created_by="test",
)
BARE = Manifest(name="bare", fields={}, splits={"train": Split(3, "0", SHARDS)})


@pytest.mark.parametrize("manifest", [FULL, BARE], ids=["full", "bare"])
def test_read_manifest__gives_back_what_was_written(manifest: Manifest) -> None:
    content = manifest.to_bytes()
    again = read_manifest(content)
    assert again == dataclasses.replace(manifest)
    assert again is not None and again.to_bytes() == content
    assert read_manifest(json.loads(content)) == manifest


def test_to_bytes__leaves_out_what_is_not_known() -> None:
    content = json.loads(BARE.to_bytes())
    assert content["format"] == "pretrain-dataset/1"
    assert not content.keys() & {"classes", "ignore_index", "stats", "duplicates", "rejected"}
    assert set(content["splits"]["train"]) == {"samples", "digest", "shards"}


def test_manifest__counts_samples_and_finds_shards() -> None:
    assert FULL.num_samples == 3
    assert FULL.shards["train-000001.tar"] is SHARDS[1]


@pytest.mark.parametrize("content", [{}, {"name": "x", "fields": {"jpg": "a photo"}}, {"format": "other/1"}, ["a"], 1])
def test_read_manifest__knows_other_peoples_files(content: Any) -> None:
    assert read_manifest(json.dumps(content).encode()) is None


def test_read_manifest__of_every_shared_set_is_none(shared_data: Path) -> None:
    files = sorted(shared_data.glob("*/dataset.json"))
    assert files
    assert [read_manifest(path.read_bytes()) for path in files] == [None] * len(files)


def without(key: str) -> bytes:
    content = json.loads(FULL.to_bytes())
    del content[key]
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"{", "not valid JSON"),
        (without("splits"), "lacks 'splits'"),
        (FULL.to_bytes().replace(b'"samples": 3', b'"samples": "many"'), "malformed"),
        (FULL.to_bytes().replace(b'"sha256": "aa",', b""), "lacks 'sha256'"),
    ],
)
def test_read_manifest__names_what_is_wrong(content: bytes, named: str) -> None:
    with pytest.raises(DataError, match=named) as failure:
        read_manifest(content)
    assert "\n" not in str(failure.value)


def test_manifest__imports_nothing_heavy() -> None:
    code = (
        "import sys, data_pipelines.shards.manifest; print({'numpy', 'torch', 'fsspec'} & set(sys.modules) or 'light')"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "light"
