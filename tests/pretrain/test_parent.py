"""The parent process of a run: it exits as its child does, and speaks for a child that could not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pretrain.record.events import Failed, Stopped
from pretrain.record.journal import Journal, read_events
from pretrain.record.run_dir import RunDir

Start = Callable[[str], subprocess.Popen[str]]
SCRIPT = """
import os, signal, subprocess, sys, time
from pathlib import Path
from pretrain.cli import parent as module
module.STOPPING_S, module.AT_ONCE_S = 1.0, 0.5
parent = module.Parent(wanted=True)
parent.watch()
parent.begun(Path(sys.argv[1]))
print("begun", os.getpid(), flush=True)
{end}
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a command with a parent whose child does what the given lines say, in the place of a run."""
    started: list[subprocess.Popen[str]] = []

    def run(end: str) -> subprocess.Popen[str]:
        (tmp_path / "run").mkdir()
        command = [sys.executable, "-c", SCRIPT.format(end=end), str(tmp_path / "run")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, start_new_session=True, **pipes))  # type: ignore[call-overload]
        return started[-1]

    yield run
    for process in started:
        process.kill()  # and its child with it
        process.wait()


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_parent__exits_as_the_child(code: int, start: Start, tmp_path: Path) -> None:
    process = start(f"parent.ended(); sys.exit({code})")
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")


@pytest.mark.parametrize(
    ("end", "how"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "SIGKILL"),
        ("os.abort()", "SIGABRT"),
        ("os._exit(1)", "exit code 1"),  # what Ray's C++ does when its raylet has died
    ],
)
def test_parent__says_what_a_child_could_not(end: str, how: str, start: Start, tmp_path: Path) -> None:
    """In one line, in the event log too; and what the child had started is ended."""
    sleeper = "left = subprocess.Popen(['sleep', '600']); print(left.pid, flush=True)"
    process = start(f"{sleeper}; {end}")
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    (line,) = errors.splitlines()
    assert line.startswith("error: ") and how in line
    assert line.endswith(f"go on with: pretrain resume run --storage {tmp_path}")
    (event,) = read_events(RunDir(tmp_path / "run").journal)[0]
    assert isinstance(event, Failed) and how in event.error
    assert _ends(int(output.split()[-1]))


def _ends(pid: int) -> bool:
    """Whether a process ends within a moment; whoever adopts it may not have asked for its exit code yet."""
    status = Path(f"/proc/{pid}/status")
    for _ in range(100):
        if not status.exists() or "(zombie)" in status.read_text():
            return True
        time.sleep(0.05)
    return False


def test_parent__without_a_run_still_says_it(tmp_path: Path) -> None:
    script = "from pretrain.cli.parent import Parent; import os; Parent(wanted=True).watch(); os.abort()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "SIGABRT" in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_parent__passes_signals_on_and_ends_a_child_that_hangs(signum: int, start: Start, tmp_path: Path) -> None:
    heard = "signal.signal(signal.SIGTERM, lambda *_: None); signal.signal(signal.SIGINT, lambda *_: None)"
    process = start(f"{heard}\nprint('ready', flush=True)\nwhile True: time.sleep(1)")
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    process.stdout.readline()
    os.killpg(process.pid, signum)  # as a terminal and a scheduler do: the child is in another group
    time.sleep(0.3)
    assert process.poll() is None
    with Journal(RunDir(tmp_path / "run").journal) as journal:
        journal.write(Stopped(step=7))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.startswith("stopped after step 7, with a checkpoint; go on with: pretrain resume run")
    assert _ends(child)


def test_parent__at_once_does_not_wait_for_what_a_child_closes(start: Start, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    process = start("print('ready', flush=True)\nwhile True: time.sleep(1)")
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    process.stdout.readline()
    run.stop_now_request.touch()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - began < 30 and process.returncode == 75
    assert errors.startswith("stopped at once; go on with: pretrain resume run")
    assert _ends(child) and not run.journal.exists()


def test_parent__a_request_of_the_process_before_ends_nothing(start: Start, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    process = start(
        "Path(sys.argv[1], 'stop-now').touch(); time.sleep(0.3)\n"
        "Path(sys.argv[1], 'stop-now').unlink(); time.sleep(2); parent.ended(); sys.exit(0)"
    )
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0
    assert not run.stop_now_request.exists()


def test_parent__takes_the_child_with_it(start: Start, tmp_path: Path) -> None:
    process = start("time.sleep(600)")
    assert process.stdout is not None
    child = int(process.stdout.readline().split()[1])
    process.kill()
    process.wait()
    assert _ends(child)


def test_parent__asked_to_stop_while_ray_is_ended_too_the_run_has_stopped(start: Start, tmp_path: Path) -> None:
    """As where a scheduler signals every process of a job: the run can go on, and 75 says so."""
    process = start(
        "signal.signal(signal.SIGTERM, lambda *_: os._exit(1))\nprint('ready', flush=True)\ntime.sleep(600)"
    )
    assert process.stdout is not None and [process.stdout.readline() for _ in range(2)][1] == "ready\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75
    assert errors.startswith("stopped, and Ray with it (exit code 1); go on with: pretrain resume run")
    assert not RunDir(tmp_path / "run").journal.exists()


def test_parent__asked_to_stop_before_a_run_began() -> None:
    script = "from pretrain.cli.parent import Parent; import time; Parent(wanted=True).watch(); print(1, flush=True); "
    command = [sys.executable, "-c", f"{script}time.sleep(600)"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "1\n"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (75, "stopped before anything began; the same command begins again\n")


@pytest.mark.parametrize("moment", ["before", "after"])
def test_parent__a_signal_while_it_forks_is_passed_on(moment: str) -> None:
    """Then the parent has a child and no handlers yet: it would end without a word, and its child be killed."""
    script = (
        "import os, signal, time\n"
        "from pretrain.cli.parent import Parent\n"
        "parent, fork = os.getpid(), os.fork\n"
        "def struck():\n"
        "    if MOMENT == 'before': os.kill(parent, signal.SIGTERM)\n"
        "    child = fork()\n"
        "    if MOMENT == 'after' and child: os.kill(parent, signal.SIGTERM)\n"
        "    return child\n"
        "os.fork = struck\n"
        "Parent(wanted=True).watch()\n"
        "time.sleep(600)\n"
    )
    command = [sys.executable, "-c", script.replace("MOMENT", repr(moment))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (75, "stopped before anything began; the same command begins again\n")
