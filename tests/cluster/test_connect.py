"""How many GPUs each worker gets, without a cluster."""

from __future__ import annotations

import pytest

from cluster.connect import Cluster, gpus_per_worker


def _cluster(num_gpus: float, *, private: bool = False) -> Cluster:
    return Cluster("127.0.0.1" if private else "head:6379", private, num_gpus, has_evaluation_slots=private)


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.parametrize(("device", "num_gpus"), [("auto", 4.0), ("cuda", 4.0), ("auto", 9.0)])
def test_gpus_per_worker__one_for_each_where_there_are_enough(device: str, num_gpus: float, private: bool) -> None:
    assert gpus_per_worker(_cluster(num_gpus, private=private), device, 4) == (1.0, None)


@pytest.mark.parametrize("num_gpus", [0.0, 1.0, 8.0])
def test_gpus_per_worker__none_for_cpu(num_gpus: float) -> None:
    assert gpus_per_worker(_cluster(num_gpus), "cpu", 4) == (0.0, None)


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_gpus_per_worker__fewer_than_workers_are_refused_with_both_numbers(device: str) -> None:
    with pytest.raises(ValueError) as caught:
        gpus_per_worker(_cluster(3.0), device, 4)
    assert str(caught.value) == (
        "train.workers=4: the cluster at head:6379 has 3 GPUs, not one for each worker; use train.workers=3, "
        "cluster.gpus_per_worker=1 (wait until more have joined), or train.device=cpu"
    )
    with pytest.raises(ValueError, match=r"this machine has 1 GPU, .*; use train.workers=1, or train.device=cpu$"):
        gpus_per_worker(_cluster(1.0, private=True), device, 4)


def test_gpus_per_worker__a_cluster_without_any_trains_on_cpus_and_says_so() -> None:
    gpus, note = gpus_per_worker(_cluster(0.0), "auto", 4)
    assert gpus == 0.0 and note is not None and "\n" not in note
    assert "no GPU in the cluster at head:6379: training on CPUs" in note and "cluster.gpus_per_worker=1" in note
    assert gpus_per_worker(_cluster(0.0, private=True), "auto", 4) == (0.0, None)  # the start line names the device


def test_gpus_per_worker__cuda_waits_for_a_cluster_and_not_for_this_machine() -> None:
    assert gpus_per_worker(_cluster(0.0), "cuda", 4) == (
        1.0,
        "no GPU in the cluster at head:6379 yet: waiting for 4 to join",
    )
    with pytest.raises(ValueError, match=r"train\.device=cuda: this machine has no GPU"):
        gpus_per_worker(_cluster(0.0, private=True), "cuda", 4)
