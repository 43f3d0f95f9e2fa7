"""Workers give results, report progress, and end with their caller."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from data_pipelines.worker_pool import Advance, run_jobs

SCRIPT = """
import os, signal, sys, time
from pathlib import Path
from data_pipelines.worker_pool import run_jobs

def job(number, advance):
    advance(10)
    (Path(sys.argv[2]) / f"{os.getpid()}").touch()
    if sys.argv[1] == "square":
        return number * number
    if sys.argv[1] == "fail" and number == 0:
        raise ValueError("job 0 failed")
    time.sleep(600)

if __name__ == "__main__":
    reports = []
    try:
        for result in run_jobs(job, range(4 if sys.argv[1] == "square" else 2), 2, reports.append):
            print(result)
        print("reported", sum(reports))
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pids").mkdir()
    return tmp_path / "script.py"


def start(script: Path, mode: str) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    command = [sys.executable, str(script), mode, str(script.parent / "pids")]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE, text=True)


def workers_of(script: Path, at_least: int) -> list[int]:
    pids: list[int] = []
    for _ in range(600):
        pids = [int(path.name) for path in (script.parent / "pids").iterdir()]
        if len(pids) >= at_least:
            break
        time.sleep(0.05)
    return pids


def gone(pids: Sequence[int]) -> bool:
    """Whether the processes end; zombies, which nobody may be there to collect, count as ended."""
    for _ in range(400):
        states = [Path(f"/proc/{pid}/stat") for pid in pids]
        if not any(state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z" for state in states):
            return True
        time.sleep(0.05)
    return False


def test_run_jobs__gives_every_result_and_sums_progress(script: Path) -> None:
    process = start(script, "square")
    output, _ = process.communicate(timeout=60)
    *results, reported = output.splitlines()
    assert sorted(map(int, results)) == [0, 1, 4, 9]
    assert reported == "reported 40"


def test_run_jobs__a_failure_ends_the_other_jobs(script: Path) -> None:
    process = start(script, "fail")
    output, _ = process.communicate(timeout=60)
    assert output.strip() == "ValueError job 0 failed"
    assert gone(workers_of(script, 1))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc to see processes")
def test_run_jobs__workers_end_when_the_caller_is_killed(script: Path) -> None:
    process = start(script, "sleep")
    pids = workers_of(script, 2)
    assert len(pids) == 2 and not gone_now(pids)
    process.kill()
    process.wait()
    assert gone(pids)


def gone_now(pids: Sequence[int]) -> bool:
    return not all(Path(f"/proc/{pid}").exists() for pid in pids)


def test_run_jobs__a_killed_worker_is_an_error(script: Path) -> None:
    process = start(script, "sleep")
    os.kill(workers_of(script, 1)[0], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert output.startswith("WorkerDied a worker process ended early")
    assert gone(workers_of(script, 1))


def test_run_jobs__one_worker_works_here() -> None:
    pids, reports = set(), list[int]()

    def job(number: int, advance: Advance) -> int:
        pids.add(os.getpid())
        advance(number)
        return -number

    assert list(run_jobs(job, [1, 2, 3], 1, reports.append)) == [-1, -2, -3]
    assert pids == {os.getpid()} and reports == [1, 2, 3]
