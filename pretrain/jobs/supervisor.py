"""What runs inside a job: checks its environment, then runs `pretrain run`, and with retries runs it again.

    python -m pretrain.jobs.supervisor --run-dir DIR [--retries N] [--sweep] [--need NAME]... [--file NAME=PATH]...
        -- COMMAND...

Ray never restarts a job. Here COMMAND, which goes on where its run is, is run again when it was killed, crashed or
failed, and when it stopped because a machine is taken away; not when a person asked it to stop, when it is done, or
when the request is wrong. `N` counts the restarts without a new checkpoint between them. Without retries the command
takes the place of this process.

A sweep begins its runs again by itself (`pretrain.sweeps.sweep`), each up to `N` times; what it ends with is the end.
Here it is begun again only when its own process was killed, and a checkpoint of any of its runs is progress.

A stop reaches this process and the command at once (Ray sends SIGTERM to all of a job); a signal that comes to this
process alone is passed on. Not one that the command has heard as well: a second signal would tell it to end at once.
Imports nothing heavy: this process lives as long as the run.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pretrain.errors import EXIT_STOPPED
from pretrain.record import lines
from pretrain.record.restarts import Restarts
from pretrain.record.run_dir import RunDir
from pretrain.record.standing import newest_checkpoint
from pretrain.screen import say
from pretrain.sweeps.queue import QUEUE

__all__ = ["main", "supervise"]

PASS_ON_S = 3.0  # how long a signal may take to reach the command by itself
POLL_S = 0.2


def supervise(command: Sequence[str], run_dir: RunDir, retries: int, *, is_sweep: bool = False) -> int:
    """Run a command until it is done, was asked to stop, or has failed too often; its last exit code.

    Args:
        command: Word by word; exit codes are those of `pretrain run`.
        run_dir: Of the run, or the sweep, that it goes on with.
        retries: Restarts without a new checkpoint between them.
        is_sweep: Whether it runs a sweep.
    """
    signals: list[float] = []
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda number, frame: signals.append(time.monotonic()))
    final = (0, 1, 2, EXIT_STOPPED) if is_sweep else (0, 2)
    restarts = Restarts(retries, lambda: _reached(run_dir) if is_sweep else newest_checkpoint(run_dir))
    while True:
        code = _run(command, run_dir, signals)
        if code in final or signals or (code == EXIT_STOPPED and run_dir.is_stop_wanted):
            return code
        if (seconds := restarts.pause()) is None:
            return code
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        say(f"the {'sweep' if is_sweep else 'run'} {how}; it goes on in {seconds:.0f} s ({restarts})")
        _wait(seconds, signals)


def _reached(sweep: RunDir) -> str:
    """The newest checkpoint of every run that a sweep has begun."""
    begun = {record["run_id"] for record in lines.records(sweep.path / QUEUE)[0] if "run_id" in record}
    storage = sweep.path.parents[1]
    return ", ".join(f"{run_id} {newest_checkpoint(RunDir(storage / run_id))}" for run_id in sorted(begun))


def _wait(seconds: float, signals: list[float]) -> None:
    """Until the time is over, or a signal has come."""
    until = time.monotonic() + seconds
    while not signals and (left := until - time.monotonic()) > 0:
        time.sleep(min(left, POLL_S))


def _run(command: Sequence[str], run_dir: RunDir, signals: list[float]) -> int:
    """The exit code of the command; negative is the signal that ended it."""
    if signals:
        return EXIT_STOPPED
    child = subprocess.Popen(command)
    passed_on = False
    while (code := child.poll()) is None:
        is_late = bool(signals) and time.monotonic() - signals[0] > PASS_ON_S
        if is_late and not passed_on and not run_dir.is_stop_asked:
            child.terminate()
            passed_on = True
        time.sleep(POLL_S)
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of the job."""
    parser = argparse.ArgumentParser(prog="pretrain.jobs.supervisor")
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--retries", type=int, default=0)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--need", action="append", default=[], metavar="NAME")
    parser.add_argument("--file", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    if problems := _prepare_environment(given.need, given.file):
        for problem in problems:
            say(f"error: {problem}", err=True)
        return 2
    sys.stdout.flush()
    command = [sys.executable, *given.command]
    if given.retries == 0:
        os.execv(sys.executable, command)
    return supervise(command, RunDir(given.run_dir), given.retries, is_sweep=given.sweep)


def _prepare_environment(needed: Sequence[str], files: Sequence[str]) -> list[str]:
    """Set what lies in files; returns what is missing, one line each."""
    problems = []
    for text in files:
        name, _, path = text.partition("=")
        try:
            os.environ[name] = Path(path).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            said = getattr(error, "strerror", None) or "is no text"
            problems.append(f"--env {name}=@{path}: {said}; mount the file on the node that jobs run on, the head")
    for name in needed:
        if not os.environ.get(name):
            problems.append(f"--env {name}: not set on the node that the job runs on; set it where `ray start` runs")
    return problems


if __name__ == "__main__":
    sys.exit(main())
