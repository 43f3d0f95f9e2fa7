"""How fast a process trains and what it takes: the way to its first step, samples per second, memory.

Not here: where these numbers go (`pretrain.record`).
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pretrain.record.events import Startup

__all__ = ["StartupClock", "Throughput", "peak_memory_mb"]

START_STEPS = 2  # the first steps of a process pay for caches and allocations: they do not count as throughput


class StartupClock:
    """Unix times of what comes before the first step is done; each is noted once, in the order of `startup`.

    Args:
        launched: When the user asked for the run; None: now.
        placed: When this process was ready to import the training loop; None: now.
    """

    def __init__(self, launched: float | None, placed: float | None) -> None:
        now = time.time()
        self._times = {"launched": launched or now, "placed": placed or now, "entered": now}

    def note(self, what: str) -> None:
        """`joined` the process group, `built` the engine, have the `first_batch`."""
        self._times.setdefault(what, time.time())

    @property
    def is_running(self) -> bool:
        """Until the first step is done."""
        return "done" not in self._times

    def startup(self) -> Startup:
        """Where the time before the end of the first step went: seconds of wall clock, CPU seconds of this process."""
        self.note("done")
        times, now = self._times, self._times["done"]
        return Startup(
            total_s=now - times["launched"],
            placed_s=times["placed"] - times["launched"],
            imported_s=times["entered"] - times["placed"],
            joined_s=times["joined"] - times["entered"],
            built_s=times["built"] - times["joined"],
            first_batch_s=times["first_batch"] - times["built"],
            first_step_s=now - times["first_batch"],
            worker_cpu_s=time.process_time(),
        )


class Throughput:
    """Steps, time, and waiting for data since the last report."""

    def __init__(self) -> None:
        self._num_ended = 0  # of this process
        self._restart()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around what fetches the data of a step, which begins with it."""
        if self._num_ended == START_STEPS and self._steps > 1:
            self._restart()
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def step_ended(self) -> None:
        """One more step."""
        self._num_ended += 1
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is no part of a step: visualizations, checkpoints."""
        began = time.perf_counter()
        yield
        self._began += time.perf_counter() - began

    def report(self, global_batch_size: int) -> dict[str, float]:
        """Means over the steps since the last report, for people; begins anew."""
        elapsed = time.perf_counter() - self._began
        values = {
            "samples_per_s": self._steps * global_batch_size / elapsed,
            "step_s": elapsed / self._steps,
            "data_wait_fraction": self._waited / elapsed,
        }
        self._restart()
        return values

    def _restart(self) -> None:
        self._steps, self._waited, self._began = 0, 0.0, time.perf_counter()


def peak_memory_mb(device: torch.device) -> float:
    """MiB that tensors of this process have taken on a GPU, or the process itself in memory, at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
