"""A driver asks workers to begin again when a machine goes or has come, and only then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pretrain.driver.watching import PATIENCE_S, STEADY_S, Watch
from pretrain.record.heartbeat import beating
from pretrain.record.run_dir import RunDir
from pretrain.training.stopping import StopRequest, ask_to_regroup


@dataclass
class _Members:
    """Stands for `cluster.workers.Members`, which asks Ray."""

    size: int = 1
    leaving: frozenset[str] = frozenset()
    larger: int | None = None


class _Scene:
    def __init__(self, folder: Path) -> None:
        self.now, self.members = 0.0, _Members()
        self.run = RunDir(folder)
        self.watch = Watch(self.run, 10.0, clock=lambda: self.now)

    def after(self, seconds: int) -> Any:
        """What the watch says, asked once a second."""
        for _ in range(seconds):
            self.now += 1
            if (end := self.watch(self.members)) is not None:  # type: ignore[arg-type]
                return end
        return None

    def asked(self) -> str | None:
        return self.run.regroup_request.read_text().strip() if self.run.regroup_request.exists() else None


@pytest.fixture
def scene(tmp_path: Path) -> _Scene:
    return _Scene(tmp_path)


def test_watch__a_machine_that_goes_is_left_at_once_and_once(scene: _Scene) -> None:
    scene.after(5)
    assert scene.asked() is None
    scene.members.leaving = frozenset({"a"})
    scene.after(3)
    assert scene.asked() == "now a machine is taken away"
    scene.watch.starting()
    scene.after(5)  # if Ray puts the workers there again, there is no better place
    assert scene.asked() is None
    scene.members.leaving = frozenset({"a", "b"})
    scene.after(3)
    assert scene.asked() is not None


def test_watch__room_for_more_has_to_last_and_is_tried_once_in_a_while(scene: _Scene) -> None:
    scene.members.larger = 2
    scene.after(4)
    scene.members.larger = None
    scene.after(4)
    scene.members.larger = 2
    scene.after(4)
    assert scene.asked() is None
    scene.after(int(STEADY_S))
    assert scene.asked() == "checkpoint there is room for 2 workers instead of 1"
    scene.watch.starting()  # which found place for one all the same
    scene.after(60)
    assert scene.asked() is None
    scene.after(int(PATIENCE_S))
    assert scene.asked() is not None


def test_watch__ends_workers_that_hang(scene: _Scene) -> None:
    with beating(scene.run, 1, 0) as heartbeat:
        heartbeat.beat("step", 3)
        assert scene.after(9) is None
        end = scene.after(9)
    assert (end.kind, end.rank) == ("failed", 1) and "rank 1 in step 3" in end.reason


def test_regroup__becomes_more_urgent_and_gives_way_to_a_stop(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    request = StopRequest(run)
    assert not request.counts(checkpoint_is_due=True)
    assert ask_to_regroup(run, "checkpoint", "room") and not ask_to_regroup(run, "checkpoint", "more room")
    assert not request.counts(checkpoint_is_due=False) and request.counts(checkpoint_is_due=True)
    assert ask_to_regroup(run, "now", "it goes") and not ask_to_regroup(run, "checkpoint", "room")
    assert request.counts(checkpoint_is_due=False) and request.regroups() == "it goes"
    run.stop_request.touch()
    assert request.counts(checkpoint_is_due=False) and request.regroups() is None
    run.take_back_requests()
    assert not request.counts(checkpoint_is_due=True)
    assert not StopRequest(None).counts(checkpoint_is_due=True)
