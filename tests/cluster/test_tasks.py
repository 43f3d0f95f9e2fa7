"""What a queue asks Ray for, without a cluster."""

from __future__ import annotations

import pytest

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
