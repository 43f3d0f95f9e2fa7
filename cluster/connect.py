"""Connect to Ray: a private instance bound to the loopback interface, or a cluster that is already there.

What is not here: placing workers (`cluster.workers`) and evaluation tasks (`cluster.tasks`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

__all__ = ["EVALUATION_SLOT", "Cluster", "connect", "gpus_per_worker"]

EVALUATION_SLOT = "evaluation_slot"  # custom Ray resource: bounds the evaluations that run beside the trainers
OBJECT_STORE_BYTES = 200 * 2**20  # only functions, settings and small results travel through Ray; data does not


@dataclass(frozen=True)
class Cluster:
    """A live connection. `private` is True when this process started the instance and takes it down again."""

    address: str
    private: bool
    num_gpus: float
    has_evaluation_slots: bool


def _quiet_environment() -> None:
    """Settings that Ray reads at import or start-up; values that the user has set win."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    os.environ.setdefault("RAY_TRAIN_METRICS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths mean the same in driver and workers
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "180")  # importing torch is slow on a busy machine


@contextmanager
def connect(address: str | None, *, num_cpus: int, num_gpus: int | None, evaluation_slots: int) -> Iterator[Cluster]:
    """Yield a connection to Ray and close it on exit.

    Args:
        address: Address of a running cluster (`host:port`, `ray://host:port`, `auto`), or None for a private instance.
            `RAY_ADDRESS` counts when no address is given.
        num_cpus: CPUs that the private instance declares; at least what the trainers ask for, so that they always fit.
        num_gpus: GPUs that the private instance declares; None: those that Ray finds.
        evaluation_slots: Evaluations that may run at the same time beside the trainers of the private instance.

    Raises:
        ConnectionError: No cluster answers at `address`.
    """
    address = address or os.environ.get("RAY_ADDRESS") or None
    _quiet_environment()
    if address is None:
        # Despite its name, this variable controls the rewriting of addresses: unset, Ray replaces 127.0.0.1 by a
        # routable one.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    import ray

    if address:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
    else:
        # Ray starts its workers at niceness 15; here trainers run at ours and evaluations lower theirs.
        os.environ.update(RAY_worker_niceness="0")
        ray.init(
            address="local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            resources={EVALUATION_SLOT: float(evaluation_slots)},
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",  # nothing of a private instance is reachable from outside this machine
        )
    try:
        resources = ray.cluster_resources()
        yield Cluster(
            address=address or "127.0.0.1",
            private=address is None,
            num_gpus=resources.get("GPU", 0.0),
            has_evaluation_slots=EVALUATION_SLOT in resources,
        )
    finally:
        ray.shutdown()


def gpus_per_worker(cluster: Cluster, device: str, num_workers: int) -> tuple[float, str | None]:
    """How many GPUs each worker gets when nobody has said it, and what a person should know of that, in one line.

    One for each, or none where there are none; never a part of them without a word.

    Args:
        cluster: What is there now; one with an autoscaler may have no GPU yet.
        device: `auto`, `cpu` or `cuda`.
        num_workers: Workers that train together.

    Raises:
        ValueError: There are GPUs, but not one for each worker; or `cuda` on a machine that has none.
    """
    if device == "cpu":
        return 0.0, None
    gpus, where = int(cluster.num_gpus), "this machine" if cluster.private else f"the cluster at {cluster.address}"
    if gpus >= num_workers:
        return 1.0, None
    wait = "" if cluster.private else "cluster.gpus_per_worker=1 (wait until more have joined), "
    if gpus:
        count = "1 GPU" if gpus == 1 else f"{gpus} GPUs"
        remedy = f"use train.workers={gpus}, {wait}or train.device=cpu"
        raise ValueError(f"train.workers={num_workers}: {where} has {count}, not one for each worker; {remedy}")
    if device == "auto":
        note = f"no GPU in {where}: training on CPUs; cluster.gpus_per_worker=1 waits for GPUs to join"
        return 0.0, None if cluster.private else note
    if cluster.private:
        raise ValueError("train.device=cuda: this machine has no GPU that Ray sees; use train.device=cpu or auto")
    return 1.0, f"no GPU in {where} yet: waiting for {num_workers} to join"
