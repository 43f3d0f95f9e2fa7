"""Batches on their way from loader processes: none is lost without notice, whatever becomes of a process.

A process puts the tensors of a batch into shared memory (`/dev/shm`), and a thread of it sends where they lie. What
goes wrong in that thread is printed there and the batch is gone for good, so tensors are shared before they are handed
to it, where a full `/dev/shm` can still be answered for. A process that dies is noticed when a batch is waited for, at
once; one that hangs, and a batch that is lost otherwise, when the loader's time is up.

Not here: what a batch is made of (`stream`).
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from data_pipelines.errors import DataError, LoaderError

__all__ = ["leave_signals_to_parent", "loaded", "share"]

_SHARED_MEMORY = "/dev/shm"
_LAST_SECONDS = 5.0  # for a process that is killed; the kernel may hold one back that waits for a broken disk
_MOMENT_S = 1.0  # for a process whose socket has ended to end as well
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
    _hear_of_deaths()
    # A process that ends asks its children by SIGTERM, which these leave to it, and waits for them.
    at_exit = Finalize(None, _kill, args=(processes,), exitpriority=1)
    watch = _Watch(processes, loader.timeout)
    try:
        while True:
            try:
                with watch.waiting():
                    batch = next(batches)
            except StopIteration:
                return
            except (RuntimeError, OSError, EOFError) as error:
                if not _is_of_the_loader(error):
                    raise
                lost = watch.explained(error)
                _kill(processes)
                raise lost from None
            yield batch
    finally:
        watch.end()
        _end(batches, processes)
        at_exit.cancel()


class _Watch:
    """Notices loader processes that died, and kills those that hang, while a batch of theirs is waited for.

    Args:
        processes: Of one loader.
        limit_s: Seconds that torch waits for a batch; 0: for ever, and none counts as hanging. Torch does not look at
            its limit while it takes a batch over; that is looked after here.
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
        _WAITING.add(self)
        try:
            self.require_alive()
            yield
        finally:
            _WAITING.discard(self)
            self._since = None

    def require_alive(self) -> None:
        """Raises LoaderError when a process was killed or left; one that has done its work may end."""
        for process in self._processes:
            if process.exitcode and not self._has_killed:
                raise LoaderError(_lost(_how_it_ended(process)))

    def explained(self, error: Exception) -> LoaderError:
        """What to say when no batch came; `error` is what was noticed first, often an end of a socket only."""
        if self._has_killed:
            return LoaderError(_hung(f"DataLoader timed out after {self._limit_s:g} seconds"))
        if isinstance(error, LoaderError):
            return error
        what = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
        if "timed out" in what:
            return LoaderError(_hung(what))
        ending = multiprocessing.connection.wait([process.sentinel for process in self._processes], _MOMENT_S)
        for process in self._processes:
            if process.sentinel in ending:
                process.join(_MOMENT_S)  # its files are closed a moment before it has ended
        ended = [process for process in self._processes if process.exitcode]
        return LoaderError(_lost(_how_it_ended(ended[0]) if ended else what))

    def end(self) -> None:
        self._ended.set()
        _WAITING.discard(self)

    def _look(self) -> None:
        while not self._ended.wait(1.0):
            since = self._since
            if since is not None and time.monotonic() - since > self._limit_s + _LAST_SECONDS:
                self._has_killed = True
                for process in self._processes:
                    process.kill()
                return


_WAITING: set[_Watch] = set()  # of this process, for the handler of SIGCHLD


def _hear_of_deaths() -> None:
    """Take SIGCHLD over from torch, whose handler raises wherever the main thread happens to be.

    There it may hit a destructor, which drops it, or a file that is half written. Here a death is told to those who
    wait for a batch, and to others when they ask for the next one.
    """
    current = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is not threading.main_thread() or current is _tell_of_deaths:
        return
    signal.signal(signal.SIGCHLD, _tell_of_deaths)


def _tell_of_deaths(signum: int, frame: FrameType | None) -> None:
    for watch in tuple(_WAITING):
        watch.require_alive()


def _how_it_ended(process: BaseProcess) -> str:
    code = process.exitcode or 0
    if code >= 0:
        return f"process {process.pid} left with exit code {code}"
    return f"process {process.pid} was killed by {signal.Signals(-code).name}"


def _is_of_the_loader(error: Exception) -> bool:
    """Whether an error is of the way from the processes to here, not of the code that runs in one of them."""
    if isinstance(error, LoaderError):
        return True
    if isinstance(error, RuntimeError):
        return str(error).startswith(_OF_THE_LOADER)
    return not str(error).startswith(_OF_A_WORKER)


def _end(batches: Any, processes: Collection[BaseProcess]) -> None:
    """End the processes of a loader's iterator, now; torch would when its last reference goes, which a traceback holds.

    Its way begins with an event, whose lock all of them take for a moment, over and over. One that was killed while it
    held the lock would let this process wait for ever, so that what is left to be told of the end gets an event anew.
    """
    if any(process.exitcode for process in processes):
        _kill(processes)
        batches._workers_done_event = threading.Event()
    batches._shutdown_workers()
    _kill(processes)


def _kill(processes: Collection[BaseProcess]) -> None:
    """End loader processes that are left, hung ones too; the end of this process would wait for theirs."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(_LAST_SECONDS)


def _hung(what: str) -> str:
    return f"the loader processes gave no batch ({what}): one of them hangs; see data.loader_timeout_s"


def _lost(what: str) -> str:
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
