"""What Ray runs on each worker: the loop of `pretrain.worker`, with its output in the run's log files."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pretrain.errors import RequestError
from pretrain.record.disk import naming_disk
from pretrain.record.events import Regrouping
from pretrain.record.run_dir import RunDir

__all__ = ["train_worker"]


def train_worker(settings: dict[str, Any]) -> bool:
    """What Ray runs on each worker: the same loop as under torchrun, with its output in the run's log files.

    Args:
        settings: `plan`, `run_dir` and `launched` as for `train`; `cache` is $PRETRAIN_CACHE of a working copy.

    Returns:
        Whether this rank knows that the workers are to begin again.

    Raises:
        RequestError: This machine does not see the run's directory. On rank 0 of a run that is to begin, before it has
            written anything: the model or the data refuse it. A worker looks at them since it imports torch anyway.
    """
    placed = time.time()
    run_dir = RunDir(Path(settings["run_dir"]))
    if not run_dir.logs.is_dir():
        remedy = "storage, and of a remote one PRETRAIN_CACHE, has to be a directory that all machines of a run see"
        raise RequestError(f"{run_dir.path}: is not there on {socket.gethostname()}, where a worker is; {remedy}")
    if settings["cache"] is not None:
        os.environ["PRETRAIN_CACHE"] = settings["cache"]
    with run_dir.worker_log(int(os.environ["RANK"])).open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    from pretrain.training.preflight import look_ahead, size_line
    from pretrain.worker import train

    is_new = os.environ["RANK"] == "0" and not run_dir.journal.exists()
    try:
        size = size_line(look_ahead(settings["plan"])) if is_new else ""
        with naming_disk(run_dir.path, "what belongs to the run"):
            end = train(settings["plan"], run_dir.path, size=size, launched=settings["launched"], placed=placed)
    except BaseException:
        traceback.print_exc()  # into the log; the driver gets the exception as well
        raise
    return isinstance(end, Regrouping)
