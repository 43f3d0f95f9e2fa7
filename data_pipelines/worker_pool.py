"""Long jobs in several processes that report how far they are and never outlive the caller.

A pool of the standard library leaves its workers behind when the caller is killed: they wait for work for ever, or
go on writing files that a second run writes as well. Here each worker watches a pipe whose other end only the caller
holds; when it closes, whatever the reason, the worker ends at once. That is right for work that is committed by
renaming a finished file, and wrong for anything else.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from threading import Thread
from typing import TypeVar

__all__ = ["Advance", "WorkerDied", "run_jobs"]

Job = TypeVar("Job")
Result = TypeVar("Result")
Advance = Callable[[int], None]  # told how many more pieces of work are done

_REPORT_SECONDS = 0.2
_done: Synchronized[int]  # of this worker process; pieces of work done in all workers


class WorkerDied(RuntimeError):
    """A worker process ended before its work; the message says what to do."""


def run_jobs(
    function: Callable[[Job, Advance], Result], jobs: Sequence[Job], workers: int, advance: Advance
) -> Generator[Result, None, None]:
    """`function(job, advance)` for every job, results as they come; in this process when one worker is enough.

    Args:
        function: importable by name, since the workers are spawned, not forked.
        advance: called in this process with what the jobs pass to their own `advance`.

    Raises:
        WorkerDied: a worker was killed or could not start. What a job raises is raised here; the other jobs are then
            abandoned.
    """
    workers = min(workers, len(jobs))
    if workers <= 1:
        for job in jobs:
            yield function(job, advance)
        return
    context = multiprocessing.get_context("spawn")
    done = context.Value("q", 0)
    caller, alive = context.Pipe(duplex=False)
    with ProcessPoolExecutor(workers, context, _start_worker, (caller, done)) as pool:
        try:
            futures = [pool.submit(_call, function, job) for job in jobs]
            pool.submit(int)  # makes the pool look at its workers again; it misses the death of the last one otherwise
            yield from _as_completed(futures, done, advance)
        except BrokenProcessPool:
            raise WorkerDied(
                "a worker process ended early: killed for want of memory (take fewer workers), or started from a "
                "script without `if __name__ == '__main__':`"
            ) from None
        except BaseException:
            alive.close()  # the workers end now instead of after their jobs
            raise
    alive.close()
    caller.close()


def _as_completed(futures: list[Future[Result]], done: Synchronized[int], advance: Advance) -> Iterator[Result]:
    pending, reported = set(futures), 0
    while pending:
        finished, pending = wait(pending, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
        so_far = done.get_obj().value  # without the lock, which a killed worker may hold for ever
        if so_far > reported:
            advance(so_far - reported)
            reported = so_far
        for future in finished:
            yield future.result()


def _start_worker(caller: Connection, done: Synchronized[int]) -> None:
    global _done
    _done = done
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the caller, which closes the pipe
    Thread(target=_end_with, args=(caller,), daemon=True).start()


def _end_with(caller: Connection) -> None:
    try:
        caller.recv_bytes()
    except EOFError:
        os._exit(1)


def _call(function: Callable[[Job, Advance], Result], job: Job) -> Result:
    return function(job, _advance)


def _advance(count: int) -> None:
    with _done.get_lock():
        _done.value += count
