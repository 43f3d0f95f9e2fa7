"""The threads that an evaluation computes in: one of low priority beside trainers, as many as there are cores else.

Batches are computed side by side, each by one thread of torch: none waits for the slowest share of a batch, and no
number depends on how many there are. Whether trainers are at work is asked anew for each batch, so that an evaluation
that began beside them has all cores once they are gone. A low priority cannot be taken back without rights; but on
Linux it belongs to a thread and not to the process (setpriority(2)), and later batches are computed in other threads.

Not here: the loop over batches (`evaluation.extraction.forward`), who knows of trainers (`pretrain.evaluations`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["Threads"]

NICENESS = 10  # what computes beside trainers gets about a tenth of a contended core

Item = TypeVar("Item")
Result = TypeVar("Result")


class Threads:
    """They begin with the first work and end with the last reference to this object.

    Args:
        number: How many compute at a time where nothing trains.
        beside_trainers: Whether trainers are at work at the moment.
    """

    def __init__(self, number: int, *, beside_trainers: Callable[[], bool] = lambda: False) -> None:
        self._number, self._beside_trainers = number, beside_trainers
        # A thread begins with the priority of the one that submits, which is never lowered.
        self._all = ThreadPoolExecutor(number, initializer=_begin)
        self._low = ThreadPoolExecutor(1, initializer=_begin, initargs=(NICENESS,))

    def map(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """`function` of each item in their order, computed in these threads, no more ahead than keeps them at work."""
        import torch  # here, for its import takes seconds: see `run`

        torch_threads = torch.get_num_threads()
        ahead: deque[Future[Result]] = deque()
        try:
            for item in items:
                is_beside = self._beside_trainers()
                ahead.append((self._low if is_beside else self._all).submit(function, item))
                if len(ahead) > (1 if is_beside else self._number):
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            wait([future for future in ahead if not future.cancel()])
            torch.set_num_threads(torch_threads)  # what `_begin` set also holds for threads that others start later

    def run(self, function: Callable[..., Result], *arguments: object, **options: object) -> Result:
        """Its result, computed in this thread, or beside trainers in that of low priority."""
        if not self._beside_trainers():
            return function(*arguments, **options)
        return self._low.submit(function, *arguments, **options).result()


def _begin(niceness: int = 0) -> None:
    os.nice(niceness)
    import torch

    torch.set_num_threads(1)
