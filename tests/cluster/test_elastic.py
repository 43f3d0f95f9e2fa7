"""A group on several nodes: it goes on with fewer workers, and with more again, and leaves a node in time."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.connect import connect
from cluster.nodes import draining, fitting
from cluster.workers import End, Members, WorkerGroup, run_workers
from tests.loopback_cluster import LoopbackCluster, loopback_cluster, wait_for

GROUP = WorkerGroup(sizes=(2, 1), cpus_per_worker=1, gpus_per_worker=0, max_failures=1)


@pytest.mark.parametrize(
    ("bundle", "resources", "count"),
    [
        ({"CPU": 2}, {"CPU": 7.0, "GPU": 1.0}, 3),
        ({"CPU": 1, "GPU": 1}, {"CPU": 7.0, "GPU": 2.0}, 2),
        ({"CPU": 1, "GPU": 1}, {"CPU": 7.0}, 0),
        ({"CPU": 0.1}, {"CPU": 0.3}, 3),  # in floating point a little less
    ],
)
def test_fitting__counts_whole_workers(bundle: dict[str, float], resources: dict[str, float], count: int) -> None:
    assert fitting(bundle, resources) == count


@pytest.fixture
def nodes() -> Iterator[LoopbackCluster]:
    with loopback_cluster(RAY_health_check_period_ms="1000") as cluster:
        yield cluster


def _work(settings: dict[str, Any]) -> bool:
    """Note that this rank is there, then wait for a word of how to end."""
    folder, rank, world = Path(settings["folder"]), os.environ["RANK"], os.environ["WORLD_SIZE"]
    life = len(list(folder.glob(f"rank-{rank}-*")))
    (folder / f"rank-{rank}-{life}").write_text(json.dumps({"world": int(world)}))
    while True:
        for word in ("again", "done"):
            if (folder / f"{word}-{rank}-{life}").exists():
                return word == "again"
        time.sleep(0.05)


@pytest.mark.long
@pytest.mark.integration
def test_run_workers__shrinks_when_a_node_dies_and_grows_when_one_comes(
    nodes: LoopbackCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    nodes.add("a")
    nodes.add("b")
    seen: list[Members] = []
    ends: list[End] = []

    def there(rank: int, life: int) -> bool:
        return (tmp_path / f"rank-{rank}-{life}").exists()

    def run() -> None:
        run_workers(
            cluster,
            _work,
            {"folder": str(tmp_path)},
            GROUP,
            restarting=lambda end, pause_s: ends.append(end),
            watch=lambda members: seen.append(members),
        )

    with connect(nodes.address, num_cpus=2, num_gpus=None, evaluation_slots=1) as cluster:
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        wait_for(lambda: there(0, 0) and there(1, 0) and seen, 120, "no group of two")
        assert (seen[-1].size, len(seen[-1].nodes), seen[-1].larger) == (2, 2, None)
        nodes.signal("b")
        seconds = wait_for(lambda: there(0, 1), 120, "no group of one")
        assert seconds < 60 and not there(1, 1)
        assert len(ends) == 1 and ends[0].kind in ("failed", "preempted")

        nodes.add("c")
        wait_for(lambda: seen[-1].size == 1 and seen[-1].larger == 2, 60, "room for two was not seen")
        (tmp_path / "again-0-1").touch()  # what a rank does that was asked to begin again
        wait_for(lambda: there(0, 2) and there(1, 1), 120, "no group of two again")
        assert len(ends) == 1  # a wish is no failure

        wait_for(lambda: seen[-1].size == 2, 60, "nobody watches")
        (doomed, *_) = seen[-1].nodes
        nodes.drain(doomed, within_s=600)  # a node with work stays until then
        wait_for(lambda: seen[-1].leaving == {doomed}, 60, "the end of a node was not foreseen")
        assert draining() == {doomed}
        for rank, life in ((0, 2), (1, 1)):
            (tmp_path / f"again-{rank}-{life}").touch()
        wait_for(lambda: there(0, 3), 60, "no group beside the node that leaves")
        wait_for(lambda: seen[-1].size == 1, 60, "nobody watches")
        assert doomed not in seen[-1].nodes and seen[-1].larger is None
        (tmp_path / "done-0-3").touch()
        thread.join(30)
        assert not thread.is_alive()
