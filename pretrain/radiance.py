"""Scenes to radiance grids as Ray tasks, of `pretrain data radiance`: several scenes at a time, here or on a cluster.

Nodes of a cluster read the scenes and keep their fits at the paths of this machine, on a disk that all of them share.

Not here: one scene (`data_pipelines.radiance`).
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipelines.worker_pool import run_jobs
from pretrain.errors import RequestError, RunFailed, last_line

__all__ = ["run_on_ray"]

_POLL_S = 0.5
_NOTED_EVERY_S = 0.5

Advance = Callable[[int], None]


def run_on_ray(address: str | None) -> Callable[..., Generator[Any, None, None]]:
    """What runs jobs as Ray tasks, with the arguments of `data_pipelines.worker_pool.run_jobs`.

    Args:
        address: of a running Ray; None for $RAY_ADDRESS, else a private instance of this machine.
    """

    def run(
        function: Callable[[Any, Advance], Any], jobs: Sequence[Any], workers: int, advance: Advance
    ) -> Generator[Any, None, None]:
        """
        Raises:
            RequestError: no Ray answers at the address.
            RunFailed: a task failed; names the job and says why.
        """
        if len(jobs) <= 1 and address is None:
            yield from run_jobs(function, jobs, 1, advance)  # in this process: nothing to be shared out
            return
        from cluster.connect import connect
        from cluster.tasks import TaskQueue

        workers = min(workers, len(jobs))
        done = [0] * len(jobs)  # pieces of work of each job
        with tempfile.TemporaryDirectory(prefix="pretrain-radiance-") as folder:
            notes = [Path(folder) / str(number) for number in range(len(jobs))]
            try:
                with connect(address, num_cpus=workers, num_gpus=0, evaluation_slots=workers) as cluster:
                    queue = TaskQueue(cluster)
                    for number, job in enumerate(jobs):
                        queue.submit(number, _noting, function, job, notes[number])
                    while queue.pending:
                        for number, ended, error in queue.finished(timeout_s=_POLL_S):
                            if error is not None:
                                raise RunFailed(f"{jobs[number].path}: {last_line(error)}")
                            result, total = ended
                            advance(total - done[number])
                            done[number] = total
                            yield result
                        for number in queue.pending:
                            noted = max(done[number], _read(notes[number]))
                            advance(noted - done[number])
                            done[number] = noted
            except ConnectionError as error:
                raise RequestError(f"--address {address}: no Ray answers there: {error}") from None

    return run


def _noting(function: Callable[[Any, Advance], Any], job: Any, note: Path) -> tuple[Any, int]:
    """Run a job, and write now and then how far it is where the caller is on the same machine."""
    done, noted = 0, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, noted
        done += count
        if time.monotonic() - noted >= _NOTED_EVERY_S and note.parent.is_dir():
            noted = time.monotonic()
            note.write_text(str(done))

    return function(job, advance), done


def _read(note: Path) -> int:
    """What a job has noted, if it has."""
    with suppress(OSError, ValueError):  # nothing yet, or just being written
        return int(note.read_text())
    return 0
