"""Run one function on a group of workers through Ray Train, restarted as a whole when a worker dies.

The function is started as `torchrun` would start it: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT are set and nothing else is done, so that the same training loop runs with and without Ray.

Not here: what the function does, how it finds its last checkpoint after a restart (it looks for itself), what Ray Train
does not document (`cluster.ray_internals`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig

from cluster.connect import Cluster
from cluster.ray_internals import PrivateTrainer, TorchrunEnvironment, Trainer

__all__ = ["WorkerGroup", "run_workers"]


@dataclass(frozen=True)
class WorkerGroup:
    """How many workers, what each of them gets, and how often the group may be restarted."""

    num_workers: int
    cpus_per_worker: float
    gpus_per_worker: float
    max_failures: int
    fatal: tuple[type[BaseException], ...] = ()  # raised by a worker, these end the run at once


def run_workers(
    cluster: Cluster,
    function: Callable[[dict[str, Any]], None],
    settings: dict[str, Any],
    group: WorkerGroup,
    *,
    name: str,
    storage: Path,
) -> None:
    """Run `function(settings)` on every worker of the group and wait until all have returned.

    Args:
        cluster: A live connection.
        function: Importable by the workers; finds its rank in the environment.
        settings: Passed to the function as it is.
        group: Size and resources. When a worker dies or raises, the whole group starts again, `max_failures` times.
        name: Name of the run in Ray.
        storage: Directory for Ray Train's own small state.

    Raises:
        RuntimeError: The group failed more often than `max_failures`; carries the traceback of the failing rank.
    """
    resources = {"CPU": group.cpus_per_worker}
    if group.gpus_per_worker:
        resources["GPU"] = group.gpus_per_worker
    trainer_class = PrivateTrainer if cluster.private else Trainer
    trainer = trainer_class(
        function,
        train_loop_config=settings,
        backend_config=TorchrunEnvironment(loopback=cluster.private),
        scaling_config=ScalingConfig(
            num_workers=group.num_workers, use_gpu=group.gpus_per_worker > 0, resources_per_worker=resources
        ),
        run_config=RunConfig(
            name=name, storage_path=str(storage), failure_config=FailureConfig(max_failures=group.max_failures)
        ),
    )
    trainer.fatal = group.fatal
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise RuntimeError(str(error)) from error
