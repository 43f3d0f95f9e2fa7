"""Batches on their way from loader processes: none is lost without notice, whatever becomes of a process.

A process puts the tensors of a batch into shared memory (`/dev/shm`), and a thread of it sends where they lie. What
goes wrong in that thread is printed there and the batch is gone for good, so tensors are shared before they are handed
to it, where a full `/dev/shm` can still be answered for. A process that dies is noticed at once (torch looks after its
children), one that hangs, and a batch that is lost otherwise, when the loader's time is up.

Not here: what a batch is made of (`stream`).
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from data_pipelines.errors import DataError, LoaderError

__all__ = ["leave_signals_to_parent", "loaded", "naming_losses", "share"]

_SHARED_MEMORY = "/dev/shm"
_LAST_SECONDS = 5.0  # for a process that is killed; the kernel may hold one back that waits for a broken disk
_OF_A_WORKER = "Caught "  # how torch begins what the code of a worker raised; that is passed on with its traceback
_OF_THE_LOADER = ("DataLoader worker", "DataLoader timed out", "Pin memory thread")


def leave_signals_to_parent(_: int) -> None:
    """In a loader process: SIGTERM and Ctrl-C reach all processes of a job, and the parent may finish a step.

    It ends its loader processes itself, and one whose parent has gone ends anyway.
    """
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)


def share(batch: Mapping[str, Tensor]) -> None:
    """Move the tensors of a batch to shared memory.

    Raises:
        DataError: there is no room; names its size and the remedy.
    """
    try:
        for tensor in batch.values():
            tensor.share_memory_()
    except RuntimeError as error:
        of_batch = sum(tensor.nbytes for tensor in batch.values())
        reason = str(error).splitlines()[0].rpartition(": ")[2]
        raise DataError(
            f"{_SHARED_MEMORY} {_room()} cannot take a batch of {of_batch / 1e6:.0f} MB from a loader process "
            f"({reason}): enlarge it (docker run --shm-size=8g), or set data.loader_workers=0"
        ) from None


def loaded(loader: DataLoader[Any]) -> Iterator[Any]:
    """What a loader gives; when it gives up, its processes are killed, hung ones too.

    Raises:
        LoaderError: a process died or hangs, or what it sent cannot be received.
    """
    if not loader.num_workers:
        yield from loader
        return
    others = set(multiprocessing.active_children())
    batches = iter(loader)
    processes = set(multiprocessing.active_children()) - others
    # A process that ends asks its children by SIGTERM, which these leave to it, and waits for them.
    at_exit = Finalize(None, _kill, args=(processes,), exitpriority=1)
    watch = _Watch(processes, loader.timeout)
    try:
        while True:
            try:
                with naming_losses(), watch.waiting():
                    batch = _received(batches)
            except StopIteration:
                return
            except LoaderError as error:
                _kill(processes)
                raise watch.explained(error) from None
            yield batch
    finally:
        watch.end()
        at_exit.cancel()


class _Watch:
    """Kills loader processes that hang while a batch of theirs is taken over, where torch's own limit is not asked.

    Args:
        processes: To kill.
        limit_s: Seconds that torch waits for a batch; 0: for ever, and nothing is watched.
    """

    def __init__(self, processes: Collection[BaseProcess], limit_s: float) -> None:
        self._processes, self._limit_s = processes, limit_s
        self._since: float | None = None
        self._has_killed = False
        self._ended = threading.Event()
        if limit_s:
            threading.Thread(target=self._look, daemon=True).start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def explained(self, error: LoaderError) -> LoaderError:
        """What to say when this has killed the processes of which the error speaks."""
        said = f"DataLoader timed out after {self._limit_s:g} seconds"
        return LoaderError(_said(TimeoutError(said))) if self._has_killed else error

    def end(self) -> None:
        self._ended.set()

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s + _LAST_SECONDS:
                self._has_killed = True
                for process in self._processes:
                    process.kill()
                return


@contextmanager
def naming_losses() -> Iterator[None]:
    """Put what torch says of a lost loader process into one line with a remedy.

    The death of a child interrupts whatever the main thread does, so this is also for what is done between two batches.

    Raises:
        LoaderError: instead of a RuntimeError of torch's loader; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, LoaderError) or not str(error).startswith(_OF_THE_LOADER):
            raise
        raise LoaderError(_said(error)) from None


def _kill(processes: Collection[BaseProcess]) -> None:
    """End loader processes that may hang; the end of this process would wait for theirs."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if is_main else None  # torch's would raise for each
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_LAST_SECONDS)
    if handler is not None:
        signal.signal(signal.SIGCHLD, handler)


def _received(batches: Iterator[Any]) -> Any:
    try:
        return next(batches)
    except (OSError, EOFError) as error:  # of the pipes and sockets between the processes, unless of a worker's code
        if str(error).startswith(_OF_A_WORKER):
            raise
        raise LoaderError(_said(error)) from None


def _said(error: Exception) -> str:
    what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    if "timed out" in what:
        return f"the loader processes gave no batch ({what}): one of them hangs; see data.loader_timeout_s"
    return (
        f"a loader process was lost ({what}): if it was killed for want of memory, lower data.loader_workers or "
        f"data.prefetch_batches; {_SHARED_MEMORY} {_room()}"
    )


def _room() -> str:
    """Size of the shared memory, and what is free of it."""
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError as error:
        return f"({error.strerror})"
    size, free = (blocks * found.f_frsize / 1e6 for blocks in (found.f_blocks, found.f_bavail))
    return f"({size:.0f} MB, {free:.0f} MB free)"
