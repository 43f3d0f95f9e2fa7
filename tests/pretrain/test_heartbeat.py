"""A rank that hangs is told from one that works, and leaves the stacks of its threads."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pretrain.record.heartbeat import Watchdog, beating, longest_s
from pretrain.record.run_dir import RunDir


class _Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


def test_watchdog__finds_the_rank_that_went_silent_first(run: RunDir) -> None:
    clock = _Clock()
    watchdog = Watchdog(run, 10.0, clock=clock)
    assert watchdog.look() is None  # nobody has begun
    with beating(run, 0, 0) as first, beating(run, 1, 0) as second:
        first.beat("step", 4)
        second.beat("data", 4)
        assert watchdog.look() is None
        clock.now += 8
        first.beat("step", 5)
        assert watchdog.look() is None
        clock.now += 4
        silence = watchdog.look()
        assert silence is not None and silence.rank == 1
        assert "12 s" in silence.text and "train.hang_after_s=10" in silence.text
        assert "rank 0 in step 5; rank 1 in data 4; stacks in logs/worker-*.stacks" in silence.text
        second.beat("data", 5)
        assert watchdog.look() is None
    assert run.heartbeats() == []  # what has ended is not watched


@pytest.mark.parametrize("phase", ["start", "checkpoint"])
def test_watchdog__starts_and_checkpoints_may_take_longer(run: RunDir, phase: str) -> None:
    clock = _Clock()
    watchdog = Watchdog(run, 10.0, clock=clock)
    with beating(run, 0, 0) as heartbeat:
        heartbeat.beat(phase, 10_000_000)  # type: ignore[arg-type]
        assert watchdog.look() is None
        clock.now += 29
        assert watchdog.look() is None
        clock.now += 5
        assert watchdog.look() is not None
        heartbeat.beat("step", 1)  # a shorter line leaves nothing of the longer one
        assert run.heartbeat(0).read_text().split() == ["step", "1"]


def test_watchdog__forgets_a_group_that_was_killed_and_may_be_switched_off(run: RunDir) -> None:
    clock = _Clock()
    run.heartbeat(3).parent.mkdir(parents=True)
    run.heartbeat(3).write_text("step 7\n")
    watchdog, off = Watchdog(run, 10.0, clock=clock), Watchdog(run, 0.0, clock=clock)
    assert watchdog.look() is None and off.look() is None
    clock.now += 1000
    assert off.look() is None and watchdog.look() is not None
    watchdog.forget()
    assert watchdog.look() is None and not run.heartbeat(3).exists()


_HANGS = """
import sys, time
from pathlib import Path
from pretrain.record.heartbeat import beating
from pretrain.record.run_dir import RunDir

def stuck_in_a_step():
    time.sleep(60)

with beating(RunDir(Path(sys.argv[1])), 2, float(sys.argv[2])) as heartbeat:
    heartbeat.beat("step", 1)
    print("ready", flush=True)
    stuck_in_a_step()
"""


@pytest.mark.parametrize("how", ["by itself", "asked by a signal"])
def test_heartbeat__stacks_of_a_rank_that_hangs_are_written(run: RunDir, how: str) -> None:
    asked = how == "asked by a signal"
    command = [sys.executable, "-c", _HANGS, str(run.path), "0" if asked else "0.5"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 30
        while "in stuck_in_a_step" not in (written := run.worker_stacks(2).read_text()):
            assert time.monotonic() < deadline, written
            if asked:  # again, for the first may come before the step
                os.kill(process.pid, signal.SIGUSR1)
            time.sleep(0.05)
    finally:
        process.kill()
        process.communicate()


def test_heartbeat__a_rank_that_never_hung_leaves_nothing(run: RunDir) -> None:
    with pytest.raises(RuntimeError, match="another end"), beating(run, 0, 60) as heartbeat:
        heartbeat.beat("step", 1)
        raise RuntimeError("another end")
    assert not run.heartbeat(0).exists() and not run.worker_stacks(0).exists()
    assert longest_s("data", 5) == 5
