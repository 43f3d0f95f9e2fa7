"""How throughput is counted: start-up steps, pauses and waiting, under a clock that the test moves."""

from __future__ import annotations

import time

import pytest

from pretrain.training.throughput import START_STEPS, StartupClock, Throughput


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(time, "time", clock)
    return clock


def _step(throughput: Throughput, clock: Clock, wait_s: float, work_s: float) -> None:
    with throughput.waiting():
        clock.now += wait_s
    clock.now += work_s
    throughput.step_ended()


def test_throughput__leaves_out_the_first_steps_and_pauses(clock: Clock) -> None:
    throughput = Throughput()
    for _ in range(START_STEPS):
        _step(throughput, clock, 50.0, 50.0)
    for _ in range(4):
        _step(throughput, clock, 0.5, 1.5)
        with throughput.paused():
            clock.now += 30.0
    assert throughput.report(64) == {"samples_per_s": 32.0, "step_s": 2.0, "data_wait_fraction": 0.25}


def test_throughput__each_report_begins_anew(clock: Clock) -> None:
    throughput = Throughput()
    for step_s in (4.0, 2.0, 1.0):  # logged after every step: there is nothing of the start-up left to leave out
        _step(throughput, clock, 0.0, step_s)
        assert throughput.report(8)["step_s"] == step_s


def test_startup_clock__parts_add_up(clock: Clock) -> None:
    startup = StartupClock(launched=90.0, placed=97.0)
    for what in ("joined", "built", "first_batch", "first_batch"):
        clock.now += 1.0
        startup.note(what)
    found = startup.startup()
    assert found.placed_s == 7.0 and found.imported_s == 3.0 and found.joined_s == found.built_s == 1.0
    assert found.first_batch_s == found.first_step_s == 1.0, "a time is noted once"
    assert found.total_s == 14.0 and found.worker_cpu_s > 0
