"""Which ends of the workers are worth another attempt, and how they are told."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError, RayTaskError

from cluster.workers import WorkersFailed, classify
from data_pipelines.errors import LoaderError, MissingFieldError
from pretrain.checkpoints.store import CheckpointError
from pretrain.driver.failures import FATAL, restart_reason, told
from pretrain.errors import RequestError


def _raised(error: Exception) -> RayTaskError:
    return RayTaskError("run", f"Traceback ...\n{error}", error)


LOST = _raised(RuntimeError("[gloo/transport/tcp/pair.cc:545] Read error: Connection reset by peer"))


@pytest.mark.parametrize(
    ("errors", "is_retried", "line"),
    [
        ({0: LOST, 1: ActorDiedError()}, True, "worker 1 died: The actor died unexpectedly before"),
        ({0: LOST}, True, "worker 0 has lost another one, or its machine ("),  # whose peers hear of it before Ray
        ({0: _raised(ConnectionResetError("by the store"))}, True, "ConnectionResetError: by the store"),
        ({1: _raised(LoaderError("a loader process died"))}, True, "a loader process died"),
        ({0: LOST, 1: _raised(AttributeError("no attribute 'x'"))}, False, "AttributeError: no attribute 'x'"),
        ({0: _raised(KeyError("view_3"))}, False, "KeyError: 'view_3'"),
        ({0: _raised(NotImplementedError("a RuntimeError too"))}, False, "NotImplementedError: a RuntimeError too"),
        ({0: _raised(CheckpointError("step-4: damaged"))}, False, "step-4: damaged"),
        ({0: _raised(MissingFieldError("no field image"))}, False, "no field image"),
        ({0: _raised(RequestError("a: wrong", "b: wrong"))}, False, "a: wrong b: wrong"),
    ],
)
def test_classify__what_a_restart_cannot_mend_ends_the_run(errors: dict[int, Any], is_retried: bool, line: str) -> None:
    """Mistakes in code were tried three times more, as if a machine had been lost."""
    end = classify(errors, FATAL)
    assert (end.kind == "failed") is is_retried
    failed = WorkersFailed(end, attempts=1)
    failed.__cause__ = end.cause
    assert restart_reason(end).startswith(line) and told(failed).startswith(line)
