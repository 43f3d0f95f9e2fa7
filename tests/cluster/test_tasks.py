"""What a queue asks Ray for, without a cluster."""

from __future__ import annotations

import pytest
import ray

from cluster import tasks
from cluster.connect import EVALUATION_SLOT, Cluster
from cluster.tasks import TaskQueue, gpu_share


def _cluster(num_gpus: float, *, slots: bool = True) -> Cluster:
    return Cluster("127.0.0.1", private=True, num_gpus=num_gpus, has_evaluation_slots=slots)


@pytest.mark.parametrize(
    ("num_gpus", "trainers", "tasks", "share"),
    [
        (0.0, 0.0, 1, 0.0),
        (2.0, 2.0, 1, 0.0),  # an evaluation that asked for one would wait until training has ended
        (1.0, 2.0, 1, 0.0),
        (3.0, 2.0, 1, 1.0),
        (3.0, 2.0, 2, 0.5),
        (8.0, 2.0, 2, 1.0),
        (1.0, 0.5, 1, 0.5),
    ],
)
def test_gpu_share__what_trainers_leave_over(num_gpus: float, trainers: float, tasks: int, share: float) -> None:
    assert gpu_share(_cluster(num_gpus), trainer_gpus=trainers, tasks=tasks) == share


def test_queue__asks_for_its_share_beside_a_slot_or_a_cpu() -> None:
    queue = TaskQueue(_cluster(3.0), gpus_per_task=0.5)
    assert queue._options == {"num_cpus": 0, "resources": {EVALUATION_SLOT: 1}, "max_retries": 2}
    assert queue.gpus_per_task == 0.5
    assert TaskQueue(_cluster(0.0, slots=False))._options == {"num_cpus": 1, "max_retries": 2}


class NoRay:
    """In the place of Ray: holds tasks until they are told to end, in the order in which they were handed over."""

    exceptions = ray.exceptions

    def __init__(self) -> None:
        self.running: list[object] = []
        self.ended: list[object] = []

    def remote(self, function: object) -> NoRay:
        return self

    def options(self, **_: object) -> NoRay:
        return _Handing(self)  # type: ignore[return-value]

    def wait(self, references: list[object], *, num_returns: int, timeout: float) -> tuple[list[object], list[object]]:
        done = [reference for reference in references if reference in self.ended][:num_returns]
        return done, [reference for reference in references if reference not in done]

    def get(self, reference: object) -> object:
        return reference


class _Handing:
    def __init__(self, ray: NoRay) -> None:
        self._ray = ray

    def remote(self, *arguments: object, **_: object) -> object:
        self._ray.running.append(arguments[0])
        return arguments[0]


def test_queue__hands_over_no_more_than_asked_for_and_nothing_while_it_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """All evaluations that were due took the CPUs of a cluster before the workers of the run could be placed."""
    scheduler = NoRay()
    monkeypatch.setattr(tasks, "ray", scheduler)
    queue = TaskQueue(_cluster(0.0, slots=False), at_once=1)
    queue.held = True
    for number in range(3):
        queue.submit(number, print, number)
    queue.submit(0, print, 0)  # a label is taken once
    assert scheduler.running == [] and queue.pending == {0, 1, 2}
    assert list(queue.finished()) == []
    queue.held = False
    assert list(queue.finished()) == [] and scheduler.running == [0]
    scheduler.ended.append(0)
    assert list(queue.finished()) == [(0, 0, None)]
    assert scheduler.running == [0, 1] and queue.pending == {1, 2}
    queue.held = True
    scheduler.ended.append(1)
    assert list(queue.finished()) == [(1, 1, None)]
    assert scheduler.running == [0, 1] and queue.pending == {2}
