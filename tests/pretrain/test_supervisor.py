"""What runs inside a job: which ends of the command are worth another start. The commands are small scripts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from pretrain.record.run_dir import RunDir

SUPERVISOR = """
import sys
import pretrain.jobs.supervisor as supervisor
import pretrain.record.restarts as restarts
restarts.FIRST_PAUSE_S = float(sys.argv.pop(1))
supervisor.PASS_ON_S = 1.0
sys.exit(supervisor.main())
"""
# Appends a line to `starts`, then does what `ends` says for that start.
COMMAND = """
import json, os, signal, sys, time
from pathlib import Path
here = Path(sys.argv[1])
with (here / "starts").open("a") as file:
    file.write("x\\n")
ends = json.loads((here / "ends").read_text())
end = ends[min(len((here / "starts").read_text().split()), len(ends)) - 1]
for what, journal in (("publishes", here), ("run publishes", here.parents[1] / "tiny-7")):
    if what in end:
        with (journal / "journal.jsonl").open("a") as file:
            file.write(json.dumps({"time": 1.0, "kind": "checkpoint", "step": 1, "path": end[what]}) + "\\n")
if "stop" in end:
    (here / "stop").write_text(end["stop"])
if "signal" in end:
    os.kill(os.getpid(), end["signal"])
if "until_term" in end:
    heard = []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    (here / "ready").touch()
    while not heard:
        time.sleep(0.01)
    (here / "stop").write_text("a signal")
    time.sleep(end["until_term"])  # a step and its checkpoint, which a second signal would cost
    sys.exit(75 if len(heard) == 1 else 1)
sys.exit(end.get("code", 0))
"""


def start(run: Path, ends: list[dict[str, object]], retries: int, *more: str, pause_s: float = 0.0) -> subprocess.Popen:
    import json

    run.mkdir(exist_ok=True)
    (run / "ends").write_text(json.dumps(ends))
    (run / "command.py").write_text(textwrap.dedent(COMMAND))
    words = ["--run-dir", str(run), "--retries", str(retries), *more, "--", str(run / "command.py"), str(run)]
    command = [sys.executable, "-c", SUPERVISOR, str(pause_s), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def starts(run: Path) -> int:
    path = run / "starts"
    return len(path.read_text().split()) if path.exists() else 0


KILL: dict[str, object] = {"signal": signal.SIGKILL}


@pytest.mark.parametrize(
    ("ends", "retries", "code", "count"),
    [
        ([{"code": 0}], 3, 0, 1),
        ([{"code": 2}], 3, 2, 1),
        ([{"code": 1}, {"code": 0}], 1, 0, 2),
        ([KILL, KILL, {"code": 0}], 2, 0, 3),
        ([{"code": 1}], 2, 1, 3),
        ([{"code": 1, "publishes": "s1"}, {"code": 1, "publishes": "s2"}, {"code": 0}], 1, 0, 3),
        ([{"code": 75, "stop": "a signal"}, {"code": 0}], 1, 0, 2),
        ([{"code": 75, "stop": ""}], 3, 75, 1),
        ([{"code": 1}], 0, 1, 1),
    ],
)
def test_supervise__restarts_what_may_go_on(
    ends: list[dict[str, object]], retries: int, code: int, count: int, tmp_path: Path
) -> None:
    process = start(tmp_path / "run", ends, retries)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, starts(tmp_path / "run")) == (code, count), out + err
    assert out.count("it goes on in") == count - 1


@pytest.mark.parametrize(
    ("ends", "code", "count"),
    [
        ([{"code": 1}], 1, 1),  # its runs were begun again as often as they may
        ([{"code": 75}], 75, 1),
        ([KILL, {"code": 0}], 0, 2),
        ([KILL], -signal.SIGKILL, 2),
        ([KILL | {"run publishes": "s1"}, KILL | {"run publishes": "s2"}, {"code": 0}], 0, 3),
    ],
)
def test_supervise__a_sweep_begins_again_when_it_was_killed_itself(
    ends: list[dict[str, object]], code: int, count: int, tmp_path: Path
) -> None:
    sweep = tmp_path / "runs" / "sweeps" / "tiny-1"
    sweep.mkdir(parents=True)
    (tmp_path / "runs" / "tiny-7").mkdir()
    (sweep / "queue.jsonl").write_text('{"what": "began", "point": 0, "run_id": "tiny-7"}\n')
    process = start(sweep, ends, 1, "--sweep")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, starts(sweep)) == (code % 256, count), out + err
    assert out.count("the sweep ended by SIGKILL; it goes on in") == count - 1


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until, path
        time.sleep(0.05)


@pytest.mark.parametrize("reaches", ["both", "supervisor"])
def test_supervise__a_stop_ends_it_whoever_hears_it(reaches: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, [{"until_term": 3.0}], 5)
    wait_for(run / "ready")
    if reaches == "both":
        children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
        os.kill(int(children.stdout.split()[0]), signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, starts(run)) == (75, 1), out + err


def test_supervise__a_stop_while_it_waits_ends_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, [{"code": 1}], 5, pause_s=50.0)
    assert process.stdout is not None
    assert "restart 1 of 5" in process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert (process.returncode, starts(run)) == (75, 1)


def test_main__without_what_it_needs_the_command_does_not_begin(tmp_path: Path) -> None:
    process = start(tmp_path / "run", [{"code": 0}], 0, "--need", "NO_SUCH_THING", "--file", "X=/nowhere/x")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and starts(tmp_path / "run") == 0
    first, second = err.splitlines()
    assert first.startswith("error: --env X=@/nowhere/x: No such file or directory; mount")
    assert second.startswith("error: --env NO_SUCH_THING: not set on the node")


def test_main__sets_what_lies_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("open sesame\n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "show.py").write_text("import os; print(os.environ['X'])")
    words = ["--run-dir", str(run), "--file", f"X={tmp_path / 'secret'}", "--", str(run / "show.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.jobs.supervisor", *words], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "open sesame\n", done.stderr
    assert RunDir(run).path.is_dir()
