"""What Ray runs on each worker: the loop of `pretrain.worker`, with its output in the run's log files."""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from pretrain.record.disk import naming_disk
from pretrain.record.events import Regrouping
from pretrain.record.run_dir import RunDir

__all__ = ["train_worker"]


def train_worker(settings: dict[str, Any]) -> bool:
    """What Ray runs on each worker: the same loop as under torchrun, with its output in the run's log files.

    Returns:
        Whether this rank knows that the workers are to begin again.

    Raises:
        RequestError: On rank 0 of a run that is to begin, before it has written anything: the model or the data refuse
            it. A worker looks at them since it imports torch anyway.
    """
    placed = time.time()
    run_dir = RunDir(Path(settings["run_dir"]))
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
