"""A run on several nodes loses one, goes on with what is left, grows again, leaves a drained one: no sample twice."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.record.events import CheckpointPublished, Event, Finished, Metrics, Regrouping, Start
from pretrain.record.journal import read_events
from tests.loopback_cluster import LoopbackCluster, loopback_cluster

pytestmark = [pytest.mark.integration, pytest.mark.long, pytest.mark.timeout(1500)]

Samples = Callable[[Path], dict[int, dict[int, list[int]]]]
EPOCH = 20  # steps of 32 of 640 samples
STEPS = 20 * EPOCH


@pytest.fixture
def nodes() -> Iterator[LoopbackCluster]:
    with loopback_cluster("a", "b") as cluster:
        yield cluster


def test_run__goes_on_with_fewer_workers_and_with_more_again(
    nodes: LoopbackCluster, recipe: Path, tmp_path: Path, samples: Samples, wait_for: Callable[..., None]
) -> None:
    storage, log = tmp_path / "storage", tmp_path / "run.log"
    settings = [f"storage={storage}", f"cluster.address={nodes.address}", "train.workers=[1,2]", "train.zero_stage=2"]
    settings += [f"train.steps={STEPS}", "train.checkpoint_every=20", "train.keep_last=2", "evaluation.enabled=false"]
    settings += ["data.record_samples=true", "train.pictures_every=0", "checkpoints.asynchronous=false"]
    environment = os.environ | {"RAY_AUTH_MODE": "disabled"}
    with log.open("w") as file:
        command = [sys.executable, "-m", "pretrain", "run", str(recipe), *settings]
        run = subprocess.Popen(command, stdout=file, stderr=file, env=environment)

    def events() -> list[Event]:
        return [event for path in storage.glob("small-*/journal.jsonl") for event in read_events(path)[0]]

    def starts() -> list[Start]:
        return [event for event in events() if isinstance(event, Start)]

    def newest() -> int:
        """The last step of the group at work."""
        found = events()
        begun = max((index for index, event in enumerate(found) if isinstance(event, Start)), default=len(found))
        return max((event.step for event in found[begun:] if isinstance(event, Metrics)), default=0)

    def published() -> int:
        return max((event.step for event in events() if isinstance(event, CheckpointPublished)), default=0)

    try:
        wait_for(lambda: published() >= 20 and newest() > 20, 300, log)
        assert [start.world_size for start in starts()] == [2]
        nodes.signal("b")
        wait_for(lambda: len(starts()) == 2 and newest() > 0, 120, log)
        assert starts()[-1].world_size == 1
        nodes.add("c")
        wait_for(lambda: len(starts()) == 3 and newest() > 0, 240, log)
        assert starts()[-1].world_size == 2
        (grown,) = [event for event in events() if isinstance(event, Regrouping)]
        assert "room for 2 workers instead of 1" in grown.why and grown.step % 20 == 0
        begun = starts()[-1].step
        assert begun == grown.step  # nothing is done twice for more workers
        assert run.wait(400) == 0, log.read_text()[-3000:]
    finally:
        run.kill()

    (run_dir,) = storage.glob("small-*")
    assert isinstance(events()[-1], Finished)
    steps = [event.step for event in events() if isinstance(event, Metrics)]
    assert set(steps) == set(range(1, STEPS + 1))
    repeated = len(steps) - len(set(steps))
    assert repeated < 40  # the steps since the last checkpoint, once
    by_world = samples(run_dir)
    for step in by_world[2].keys() & by_world[1].keys():  # done twice, after the node was lost
        assert by_world[2][step] == by_world[1][step]
    by_step = by_world[2] | by_world[1]
    assert set(by_step) == set(range(1, STEPS + 1))
    for first in range(1, STEPS + 1, EPOCH):  # every sample once in each pass over the data
        assert sorted(itertools.chain(*(by_step[step] for step in range(first, first + EPOCH)))) == list(range(640))
