"""What one sample costs in a loader: CPU time over all its processes, and wall time, both without start-up.

Processes and queues are left to settle for some batches; what is counted is the CPU time that main process and
loader workers spend from then on. `data_peer_streaming` uses this file in another interpreter, so it needs the
standard library only. Linux.
"""

from __future__ import annotations

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["Cost", "Plan", "cost_per_sample"]


@dataclass(frozen=True)
class Plan:
    """How long to measure, in batches."""

    batch_size: int
    settle: int
    count: int


@dataclass(frozen=True)
class Cost:
    """Of one sample: CPU microseconds of the main process and the loader workers together, and samples per second."""

    cpu_us: float
    samples_per_s: float


def cost_per_sample(start: Callable[[], Iterator[Any]], plan: Plan) -> Cost:
    """Measure a loader.

    Args:
        start: begins a loader that goes on after `settle + count` batches, since the workers must still live then;
            they end when the iterator is deleted.
        plan: `settle` is enough to fill the queues.
    """
    batches = start()
    _take(batches, plan.settle)
    cpu_s, wall_s = _cpu_s(), time.perf_counter()
    _take(batches, plan.count)
    cpu_s, wall_s = _cpu_s() - cpu_s, time.perf_counter() - wall_s
    del batches
    gc.collect()
    samples = plan.count * plan.batch_size
    return Cost(cpu_s / samples * 1e6, samples / wall_s)


def _take(batches: Iterator[Any], number: int) -> None:
    for _ in range(number):
        next(batches)


def _cpu_s() -> float:
    """CPU seconds of this process and its children until now; `resource` tells those of a child when it has ended."""
    clocks = [(~child.pid << 3) | 2 for child in multiprocessing.active_children() if child.pid]  # clock_getcpuclockid
    return time.process_time() + sum(map(time.clock_gettime, clocks))
