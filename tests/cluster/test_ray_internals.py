"""Names of Ray Train that it does not document: an upgrade that changes one fails here, and says which."""

from __future__ import annotations

import dataclasses
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback, WorkerHealthCheckTimeoutError
from ray.train.v2._internal.execution.context import DistributedContext
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.scaling_policy.fixed import FixedScalingPolicy
from ray.train.v2._internal.execution.worker_group.worker import Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.exceptions import WorkerGroupError

from cluster import ray_internals
from cluster.ray_internals import PrivateTrainer, TorchrunEnvironment, Trainer

OVERRIDDEN = [
    (FixedScalingPolicy, ray_internals._FixedLocalGroup, "after_controller_start"),
    (FixedScalingPolicy, ray_internals._FixedLocalGroup, "_maybe_send_resource_request"),
    (DefaultFailurePolicy, ray_internals._MendableOnly, "_is_retryable_error"),
    (DataParallelTrainer, Trainer, "_initialize_and_run_controller"),
    (DataParallelTrainer, PrivateTrainer, "_create_default_callbacks"),
]


@pytest.mark.parametrize(("base", "ours", "name"), OVERRIDDEN)
def test_overridden_methods__are_there_and_take_what_ours_take(base: type, ours: type, name: str) -> None:
    theirs, mine = inspect.signature(getattr(base, name)), inspect.signature(getattr(ours, name))
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in (*theirs.parameters.values(), *mine.parameters.values()))
    assert takes_anything or list(theirs.parameters) == list(mine.parameters)


def test_controller__is_given_the_policies_that_we_replace() -> None:
    source = inspect.getsource(DataParallelTrainer.fit)
    assert "_initialize_and_run_controller" in source
    assert "failure_policy=" in source and "scaling_policy=" in source


def test_failure_policy__fatal_errors_of_workers_are_not_retried() -> None:
    policy = ray_internals._MendableOnly(FailureConfig(max_failures=3), (ValueError,))

    def failed_with(error: Exception) -> Any:
        return WorkerGroupError("failed", {1: error})

    wrong = UserExceptionWithTraceback(ValueError("a wrong setting"), "traceback")
    assert wrong._base_exc.args == ("a wrong setting",)
    assert not policy._is_retryable_error(failed_with(wrong))
    assert policy._is_retryable_error(failed_with(UserExceptionWithTraceback(ConnectionError("lost"), "traceback")))
    assert policy._is_retryable_error(failed_with(WorkerHealthCheckTimeoutError("killed")))


def test_scaling_policy__asks_no_autoscaler() -> None:
    policy = ray_internals._FixedLocalGroup(ScalingConfig(num_workers=2))
    policy.after_controller_start(SimpleNamespace())
    assert policy._coordinator_client is None
    policy._maybe_send_resource_request()


def test_private_trainer__leaves_out_two_callbacks_and_no_other() -> None:
    def kinds(trainer: DataParallelTrainer) -> set[type]:
        return {type(callback) for callback in trainer._create_default_callbacks()}

    given = kinds(Trainer(print, backend_config=TorchrunEnvironment()))
    assert {DatasetsCallback, PlacementGroupCleanerCallback} <= given
    private = kinds(PrivateTrainer(print, backend_config=TorchrunEnvironment()))
    assert given - private == {DatasetsCallback, PlacementGroupCleanerCallback} and private <= given


@pytest.mark.parametrize("loopback", [True, False])
def test_backend__tells_each_worker_its_place_as_torchrun_would(
    loopback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts = [
        DistributedContext(world_rank=rank, world_size=2, local_rank=rank, local_world_size=2, node_rank=0)
        for rank in range(2)
    ]
    told: dict[int, dict[str, str]] = {}

    class Group:
        def execute_single(self, rank: int, function: Any, *arguments: Any) -> Any:
            if not arguments:
                return "10.0.0.1", 29500
            assert function is ray_internals._set_environment
            told[rank] = arguments[0]

        def get_workers(self) -> list[SimpleNamespace]:
            return [SimpleNamespace(distributed_context=context) for context in contexts]

    assert {"execute_single", "get_workers"} <= set(dir(WorkerGroup))
    assert "distributed_context" in dir(Worker)
    assert {field.name for field in dataclasses.fields(DistributedContext)} >= {"world_rank", "local_world_size"}
    config = TorchrunEnvironment(loopback=loopback)
    backend = config.backend_cls()
    assert backend.share_cuda_visible_devices is True
    backend.on_start(Group(), config)  # type: ignore[arg-type]
    address = "127.0.0.1" if loopback else "10.0.0.1"
    place = {"MASTER_ADDR": address, "MASTER_PORT": "29500", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for rank in range(2):
        assert {name: told[rank][name] for name in place} == place
        assert (told[rank]["RANK"], told[rank]["LOCAL_RANK"]) == (str(rank), str(rank))
        assert (told[rank].get("GLOO_SOCKET_IFNAME") == "lo") is loopback
