"""Loader processes that are killed, hang or find no room: one line, soon, and nothing of them is left."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from data_pipelines.errors import DataError, LoaderError
from data_pipelines.shards.dataset import Dataset
from data_pipelines.streaming.loader_processes import loaded, share
from data_pipelines.streaming.stream import Stream
from data_pipelines.views.kinds.images import ImageView


def stream(dataset: Dataset, size: int = 16, **settings: Any) -> Stream:
    layout: dict[str, Any] = {"global_batch_size": 8, "micro_batch_size": 8, "rank": 0, "world_size": 1, "seed": 0}
    return Stream(dataset, (ImageView("image", size),), **layout, num_workers=2, prefetch_batches=1, **settings)


def signalled(batches: Any, number: signal.Signals) -> list[multiprocessing.process.BaseProcess]:
    """The loader processes, after one batch and a signal to each of them."""
    others = set(multiprocessing.active_children())
    next(batches)
    processes = [process for process in multiprocessing.active_children() if process not in others]
    assert len(processes) == 2
    for process in processes:
        os.kill(process.pid or 0, number)
    return processes


def test_stream__lock_of_a_killed_process_is_not_waited_for(grocery: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch ends its processes by an event whose lock they take for a moment, over and over."""
    event = multiprocessing.get_context("fork").Event()
    monkeypatch.setattr(multiprocessing.get_context("fork"), "Event", lambda: event)
    batches = iter(stream(grocery))
    processes = signalled(batches, signal.SIGKILL)
    for process in processes:
        process.join()
    event._cond.acquire()  # type: ignore[attr-defined]  # as if one of them had held it
    with pytest.raises(LoaderError, match=r"^a loader process was lost"):
        next(batches)
    del batches
    gc.collect()  # hung here


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGBUS])
def test_stream__killed_loader_process_is_noticed(grocery: Dataset, number: signal.Signals) -> None:
    """As by the kernel that runs out of memory, or of room in /dev/shm."""
    batches = iter(stream(grocery))
    with pytest.raises(LoaderError, match=rf"^a loader process was lost \(process \d+ was killed by {number.name}\)"):
        signalled(batches, number)
        for _ in range(10):
            next(batches)
    # ... and not before a batch is asked for: whatever else the main thread does is not interrupted.
    batches = iter(stream(grocery))
    for process in signalled(batches, number):
        process.join()
    with pytest.raises(LoaderError, match=r"^a loader process was lost"):
        next(batches)


def test_stream__hung_loader_process_is_given_up_and_killed(grocery: Dataset) -> None:
    batches = iter(stream(grocery, loader_timeout_s=1))
    processes = signalled(batches, signal.SIGSTOP)
    with pytest.raises(LoaderError, match=r"gave no batch \(DataLoader timed out after 1 seconds\): one of them hangs"):
        for _ in range(10):
            next(batches)
    for process in processes:
        process.join()
        assert process.exitcode == -signal.SIGKILL


def in_child(work: Callable[[Any], str | None], argument: Any) -> str | None:
    """What `work(argument)` returns in a child of its own, whose limits it may change."""

    def run(answer: Connection) -> None:
        answer.send(work(argument))

    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=run, args=(sender,))
    child.start()
    sender.close()
    said: str | None = receiver.recv()
    child.join()
    return said


def first_error(dataset: Dataset) -> str:
    try:
        for _ in zip(range(10), stream(dataset, size=256), strict=False):
            pass
    except DataError as error:
        return str(error)
    return "no error"


def _with_limited_files(dataset: Dataset) -> str:
    """A limit on the size of files holds for shared memory, too."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    return first_error(dataset)


def _with_little_shared_memory(dataset: Dataset) -> str | None:
    """A tmpfs of 1 MB in a name space of its own; None where that is not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, private = 0x00020000, (1 << 18) | (1 << 14)  # CLONE_NEWNS; MS_PRIVATE | MS_REC
    if libc.unshare(new_mounts) or libc.mount(b"none", b"/", None, private, None):
        return None
    if libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=1m"):
        return None
    return first_error(dataset)


def test_stream__batch_that_cannot_be_shared_is_one_line(grocery: Dataset) -> None:
    said = in_child(_with_limited_files, grocery)
    assert said is not None and said.startswith("/dev/shm (")
    assert " cannot take a batch of 2 MB from a loader process (File too large (27)): enlarge it (docker run" in said


def test_stream__small_shared_memory_is_named_with_its_size_and_the_remedy(grocery: Dataset) -> None:
    said = in_child(_with_little_shared_memory, grocery)
    if said is None:
        pytest.skip("mounting needs root")
    assert said.startswith("/dev/shm (1 MB, 1 MB free) cannot take a batch of 2 MB from a loader process (No space")
    assert said.endswith("enlarge it (docker run --shm-size=8g), or set data.loader_workers=0") and "\n" not in said


def test_share__leaves_the_values() -> None:
    batch = {"image": torch.arange(10), "seed": torch.ones(2, 3)}
    share(batch)
    assert batch["image"].is_shared() and batch["image"].tolist() == list(range(10))


class _Broken:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        raise RuntimeError("a bug in a view")


def test_loaded__passes_errors_of_the_code_in_a_worker_on(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Caught RuntimeError in DataLoader worker.*a bug in a view"):
        list(loaded(DataLoader(_Broken(), num_workers=1, multiprocessing_context="fork")))  # type: ignore[arg-type]
    assert list(loaded(DataLoader(list(range(4)), num_workers=1, multiprocessing_context="fork", batch_size=None)))
