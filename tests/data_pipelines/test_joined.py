"""Data sets side by side: one sample of each, in orders of their own, resumed exactly."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import open_dataset
from data_pipelines.streaming.joined import Joined
from data_pipelines.streaming.mixture import Part
from data_pipelines.streaming.stream import Stream, StreamState
from data_pipelines.views.specs import views_from
from tests.small_data import write_shard

VIEWS = [{"name": "a", "kind": "label", "field": "a.cls"}, {"name": "b", "kind": "label", "field": "b.cls"}]


@pytest.fixture
def joined(tmp_path: Path) -> Joined:
    """Twelve samples of one part, five of the other, each with a label that is its number."""
    parts = []
    for name, number in (("a", 12), ("b", 5)):
        shard = tmp_path / f"{name}.tar"
        write_shard(
            shard, {f"{name}{i:02d}": {f"{name}.cls": str(i).encode(), "cls": name.encode()} for i in range(number)}
        )
        parts.append(Part(name, open_dataset(str(shard))))
    return Joined(parts)


def stream(joined: Joined, *, rank: int = 0, world_size: int = 1, state: StreamState | None = None) -> Stream:
    return Stream(
        joined,
        views_from(VIEWS),
        global_batch_size=4,
        micro_batch_size=4 // world_size,
        rank=rank,
        world_size=world_size,
        seed=3,
        state=state or StreamState(0, 0),
        block_size=2,
        num_streams=1,
    )


def labels(batches: list[dict[str, torch.Tensor]], name: str) -> list[int]:
    return [int(label) for batch in batches for label in batch[name]]


def test_joined__each_part_runs_through_epochs_of_its_own(joined):
    batches = list(islice(iter(stream(joined)), 15))  # 60 samples: 5 epochs of one part, 12 of the other
    a, b = labels(batches, "a"), labels(batches, "b")
    assert joined.num_samples == 12
    for begin in range(0, 60, 12):
        assert sorted(a[begin : begin + 12]) == list(range(12))
    for begin in range(0, 60, 5):
        assert sorted(b[begin : begin + 5]) == list(range(5))
    assert a[:12] != a[12:24] and len(set(zip(a, b, strict=True))) > 30  # other pairs in each epoch


def test_joined__goes_on_exactly_and_does_not_depend_on_ranks(joined):
    whole = list(islice(iter(stream(joined)), 8))
    state = stream(joined).state_at(5)
    assert state == StreamState(1, 8)
    again = list(islice(iter(stream(joined, state=state)), 3))
    for one, other in zip(whole[5:], again, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    ranks = [list(islice(iter(stream(joined, rank=rank, world_size=2)), 8)) for rank in range(2)]
    for step, batch in enumerate(whole):
        together = sorted(ranks[0][step]["sample_id"].tolist() + ranks[1][step]["sample_id"].tolist())
        assert together == sorted(batch["sample_id"].tolist())


def test_joined__a_sample_is_one_of_each(joined):
    sample = joined.read(7 * 5 + 3)
    assert (sample["a.cls"], sample["b.cls"], sample["cls"], sample["__key__"]) == (b"7", b"3", b"a", "a07")
    assert joined.fields == {"a.cls", "b.cls", "cls"}
    assert "a: " in joined.where(38) and " with b: " in joined.where(38)
    assert "a07" in joined.where(38) and "b03" in joined.where(38)
    assert joined.require_field("b.cls") == "b.cls"
    with pytest.raises(DataError, match=r"a with b"):
        joined.require_field("jpg")


def test_joined__order_and_content_of_parts_are_its_identity(joined):
    turned = Joined(joined.parts[::-1])
    assert turned.digest != joined.digest and Joined(joined.parts).digest == joined.digest


def test_joined__names_are_its_own(joined):
    with pytest.raises(DataError, match=r"joined parts \(a, a\): give at least one, each with a name of its own"):
        Joined([joined.parts[0], joined.parts[0]])
    with pytest.raises(DataError, match="give at least one"):
        Joined([])
