"""Everything this package uses of Ray Train that Ray does not document, so that an upgrade fails in one place.

`tests/cluster/test_ray_internals.py` touches every name:

* modules of `ray.train.v2._internal`: two callbacks, the exception that carries a worker's own, the default failure
  policy and the fixed scaling policy, which are overridden here;
* methods of Ray Train's trainer and policies that the classes below override, and attributes that they read;
* `Worker.distributed_context` and `execute_single` of a worker group, which `Backend.on_start` is given.

Not here: what workers run and how many (`cluster.workers`).
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import ray
from ray.train import BackendConfig
from ray.train.backend import Backend
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

__all__ = ["PrivateTrainer", "TorchrunEnvironment", "Trainer"]


@dataclass
class TorchrunEnvironment(BackendConfig):
    """Rendezvous by environment variables: `ray.train.torch` would import torch in driver and controller as well."""

    loopback: bool = False  # a private instance: ranks meet on 127.0.0.1

    @property
    def backend_cls(self) -> type[Backend]:
        return _TorchrunBackend


class _TorchrunBackend(Backend):
    share_cuda_visible_devices = True  # LOCAL_RANK picks the device, as under torchrun

    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, TorchrunEnvironment)
        address, port = worker_group.execute_single(0, _address_and_free_port)
        local = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"} if backend_config.loopback else {}
        for rank, worker in enumerate(worker_group.get_workers()):
            context = worker.distributed_context
            worker_group.execute_single(
                rank,
                _set_environment,
                {
                    "MASTER_ADDR": address,
                    "MASTER_PORT": str(port),
                    "RANK": str(context.world_rank),
                    "LOCAL_RANK": str(context.local_rank),
                    "WORLD_SIZE": str(context.world_size),
                    "LOCAL_WORLD_SIZE": str(context.local_world_size),
                    **local,
                },
            )


def _address_and_free_port() -> tuple[str, int]:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return ray.util.get_node_ip_address(), probe.getsockname()[1]


def _set_environment(variables: dict[str, str]) -> None:
    import os

    os.environ.update(variables)


class _FixedLocalGroup(FixedScalingPolicy):
    """A fixed group on a private instance: there is no autoscaler to ask."""

    def after_controller_start(self, train_run_context: Any) -> None:
        self._coordinator_client = None

    def _maybe_send_resource_request(self) -> None:
        return None


class _MendableOnly(DefaultFailurePolicy):
    """Restart after what a restart can mend (a dead process or node, a lost connection), not after a wrong setting."""

    def __init__(self, failure_config: Any, fatal: tuple[type[BaseException], ...]) -> None:
        super().__init__(failure_config)
        self._fatal = fatal

    def _is_retryable_error(self, training_failed_error: Any) -> bool:
        failures = getattr(training_failed_error, "worker_failures", {}).values()
        raised = [failure._base_exc for failure in failures if isinstance(failure, UserExceptionWithTraceback)]
        if any(isinstance(error, self._fatal) for error in raised):
            return False
        return super()._is_retryable_error(training_failed_error)


class Trainer(DataParallelTrainer):
    """Ray Train with our failure policy."""

    fatal: tuple[type[BaseException], ...] = ()

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["failure_policy"] = _MendableOnly(self.run_config.failure_config, self.fatal)
        return super()._initialize_and_run_controller(**settings)


class PrivateTrainer(Trainer):
    """Ray Train on an instance of our own, without the three helper actors that serve shared clusters and Ray Data.

    Each of them imports pandas, pyarrow and Ray Data in a process of its own (about 4 CPU-seconds); a private instance
    has no datasets to split, no autoscaler, and its placement groups die with it.
    """

    def _create_default_callbacks(self) -> list[Any]:
        unneeded = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unneeded)]

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        settings["scaling_policy"] = _FixedLocalGroup(self.scaling_config)  # type: ignore[arg-type]  # Train v1 and v2
        return super()._initialize_and_run_controller(**settings)
