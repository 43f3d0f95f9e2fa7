"""What a run writes down of the samples that it learns from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from data_pipelines.streaming.unindexed import UnindexedSamples
from pretrain.config.data import open_data
from pretrain.config.schema import DataConfig, MixturePart
from pretrain.training.inputs import sources_of
from tests.small_data import NUM_CLOUDS, clouds


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """A copy of small shards, with a `dataset.json` of others that says more than can be understood."""
    shutil.copytree(clouds(), tmp_path / "packed", ignore=shutil.ignore_patterns("*.json"))
    splits = {"train": {"samples": NUM_CLOUDS}, "test": {"samples": "many"}, "val": 3}
    told = {"splits": splits, "duplicates": 5, "rejected": "none"}
    (tmp_path / "packed" / "dataset.json").write_text(json.dumps(told))
    return tmp_path / "packed"


def test_sources_of__one_data_set(packed: Path) -> None:
    data = DataConfig(train=f"{packed}/train-*.tar", limit=NUM_CLOUDS - 1)
    opened = open_data(data)
    (source,) = sources_of(opened, data, 7, "large")
    assert (source.step, source.stage, source.name, source.share) == (7, "large", "", 1.0)
    assert (source.shards, source.num_shards, source.samples) == (data.train, 1, NUM_CLOUDS - 1)
    assert source.digest == opened.digest and source.fields == ("cls", "points.npy")
    assert (source.splits, source.duplicates, source.rejected) == ({"train": NUM_CLOUDS}, 5, -1)


@pytest.mark.parametrize(("by", "shares"), [("share", [0.75, 0.25]), ("join", [1.0, 1.0])])
def test_sources_of__parts_of_a_mixture_with_their_shares(packed: Path, by: str, shares: list[float]) -> None:
    weights = (3.0, 1.0) if by == "share" else (None, None)
    names = zip(("some", "others"), ("train", "test"), weights, strict=True)
    parts = [MixturePart(name=name, shards=f"{packed}/{split}-*.tar", weight=weight) for name, split, weight in names]
    data = DataConfig(mixture=parts, mixture_by=by)
    found = sources_of(open_data(data), data, 0, "")
    assert [source.name for source in found] == ["some", "others"]
    assert [source.share for source in found] == shares and [source.samples for source in found] == [NUM_CLOUDS, 16]
    assert found[0].digest != found[1].digest


def test_sources_of__shards_that_nobody_has_counted(packed: Path) -> None:
    data = DataConfig(train=f"{packed}/train-*.tar", unindexed="stream")
    assert data.train is not None
    opened = UnindexedSamples(data.train, rank=0, world_size=1, seed=0)
    (source,) = sources_of(opened, data, 0, "")
    assert (source.samples, source.num_shards, source.duplicates) == (0, 1, -1)
