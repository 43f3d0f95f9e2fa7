"""Threads of an evaluation: how many, of what priority, and that results come in order."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from evaluation.threads import NICENESS, Threads


@pytest.fixture(autouse=True)
def torch_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    assert torch.get_num_threads() == before


def test_map__as_many_at_a_time_as_there_are_and_in_order() -> None:
    together = threading.Barrier(3, timeout=20)

    def work(item: int) -> tuple[int, int]:
        together.wait()
        time.sleep(0.01 * (3 - item % 3))
        return item, torch.get_num_threads()

    assert list(Threads(3).map(work, range(9))) == [(item, 1) for item in range(9)]


def test_map__is_no_further_ahead_than_it_has_threads() -> None:
    begun: list[int] = []
    results = Threads(2).map(begun.append, range(100))
    next(results)
    time.sleep(0.2)
    assert len(begun) == 3
    results.close()  # type: ignore[attr-defined]


def test_map__beside_trainers_one_of_low_priority_and_all_when_they_are_gone() -> None:
    trainers = {"at work": True}
    threads = Threads(4, beside_trainers=lambda: trainers["at work"])

    def work(item: int) -> tuple[str, int]:
        time.sleep(0.05)
        return threading.current_thread().name, os.nice(0)

    own = os.nice(0)
    results = threads.map(work, range(40))
    first = [next(results) for _ in range(4)]
    trainers["at work"] = False
    rest = list(results)
    assert len(set(first)) == 1 and first[0][1] == own + NICENESS
    assert len({name for name, priority in rest[2:] if priority == own}) == 4 == len(set(rest[2:]))
    assert os.nice(0) == own


def test_map__an_error_ends_it_and_what_was_ahead() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        if item == 1:
            raise ValueError("damaged")
        done.append(item)

    with pytest.raises(ValueError, match="damaged"):
        list(Threads(2).map(work, range(50)))
    assert max(done) < 6


def test_run__beside_trainers_in_another_thread() -> None:
    def where(*, what: str) -> tuple[str, int, bool]:
        return what, os.nice(0), threading.current_thread() is threading.main_thread()

    own = os.nice(0)
    assert Threads(2).run(where, what="head") == ("head", own, True)
    assert Threads(2, beside_trainers=lambda: True).run(where, what="head") == ("head", own + NICENESS, False)
