"""A small parent process for a run. Libraries of Ray can end the process that drives it from C++, without a word of
Python's: when a raylet or the head dies. Then the parent says what happened, on the terminal and in the event log.

The command goes on in the child, a session of its own, so that a signal to the command's process group reaches the
parent alone, not Ray's processes. The parent holds nothing but the checked request. It passes signals on, and it exits
as the child does. Not here: what the child does with a signal (`pretrain.driver`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType

from pretrain.errors import EXIT_STOPPED
from pretrain.record.events import Failed, Stopped
from pretrain.record.journal import Journal, read_events
from pretrain.record.run_dir import RunDir, resume_command, stopped_line
from pretrain.screen import say

__all__ = ["Parent"]

ENDED = "ended"  # what the child says last
POLL_S = 0.2
STOPPING_S = 15.0  # from the workers' last checkpoint to the end of the child, Ray's included
AT_ONCE_S = 3.0  # from a request to end at once to the end of the child: what it closes meanwhile is only the better
PASSED_ON = (signal.SIGTERM, signal.SIGINT)
_SET_PDEATHSIG = 1  # of prctl(2)


class Parent:
    """Of the process that runs a command, once it has called `watch`; until then nothing.

    Args:
        wanted: False leaves `watch` without effect, for who calls the command line from a program.
    """

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._pipe: int | None = None

    def watch(self) -> None:
        """Go on in a child process; the parent never returns. Call it before anything starts a thread."""
        if not self._wanted:
            return
        reader, writer = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)  # of those that come now the parent hears later
        child = os.fork()
        if child:
            os.close(writer)
            os._exit(_wait(child, reader, before))
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.close(reader)
        self._pipe = writer
        os.setsid()
        if sys.platform == "linux":  # who kills the command means the run
            ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    def begun(self, run_dir: Path) -> None:
        """Tell the parent which run it is that goes on."""
        self._tell(str(run_dir))

    def ended(self) -> None:
        """Tell the parent that all has been said."""
        self._tell(ENDED)

    def _tell(self, line: str) -> None:
        if self._pipe is not None:
            os.write(self._pipe, f"{line}\n".encode())


def _wait(child: int, reader: int, mask: Iterable[int]) -> int:
    """In the parent: the exit code of the child, or one of ours when the child was ended from outside Python.

    Signals wait until here, where `mask` holds again.
    """

    signals: list[int] = []

    def pass_on(signum: int, frame: FrameType | None) -> None:
        signals.append(signum)
        os.kill(child, signum)

    for signum in PASSED_ON:
        signal.signal(signum, pass_on)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.set_blocking(reader, False)
    told: list[str] = []
    stopped_at: float | None = None
    at_once_since: float | None = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        told += _read(reader).splitlines()
        if ended:
            break
        if signals and stopped_at is None and _stopped(told) is not None:
            stopped_at = time.monotonic()
        if stopped_at is not None and time.monotonic() - stopped_at > STOPPING_S:  # it waits for a Ray that is gone
            os.kill(child, signal.SIGKILL)
        if not _is_to_end_at_once(told):
            at_once_since = None  # or it was for the process before, and is taken back
        elif at_once_since is None:
            at_once_since = time.monotonic()
        elif time.monotonic() - at_once_since > AT_ONCE_S:  # workers, MLflow and Ray may take long to close
            os.kill(child, signal.SIGKILL)
        time.sleep(POLL_S)
    _end_session(child)
    code = os.waitstatus_to_exitcode(status)
    return code if ENDED in told else _explain(told, code, was_asked=bool(signals))


def _explain(told: list[str], code: int, *, was_asked: bool) -> int:
    """Say how a child ended that could not say it any more; the exit code of the command.

    One that was asked to stop has stopped, even if whoever asked it asked Ray's processes as well.
    """
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    what = f"the process that drives the run was ended from outside ({how}): a part of Ray has died, or memory ran out"
    if not told and was_asked:
        say("stopped before anything began; the same command begins again", err=True)
        return EXIT_STOPPED
    if not told:
        say(f"error: {what}", err=True)
        return 1
    run_dir = RunDir(Path(told[0]))
    if (step := _stopped(told)) is not None:
        say(stopped_line(run_dir, step), err=True)
        return EXIT_STOPPED
    if _is_to_end_at_once(told):
        say(f"stopped at once; go on with: {resume_command(run_dir)}", err=True)
        return EXIT_STOPPED
    if was_asked:
        say(f"stopped, and Ray with it ({how}); go on with: {resume_command(run_dir)}", err=True)
        return EXIT_STOPPED
    with Journal(run_dir.journal) as journal:
        journal.write(Failed(error=what))
    say(f"error: {what}; go on with: {resume_command(run_dir)}", err=True)
    return 1


def _stopped(told: list[str]) -> int | None:
    """The step after which the workers of the run have stopped on request, if that is the last that happened."""
    events = read_events(RunDir(Path(told[0])).journal)[0] if told else []
    return events[-1].step if events and isinstance(events[-1], Stopped) else None


def _is_to_end_at_once(told: list[str]) -> bool:
    """Whether anybody asks for that, by the file of the run."""
    return bool(told) and RunDir(Path(told[0])).stop_now_request.exists()


def _read(reader: int) -> str:
    """What was written since the last call."""
    try:
        return os.read(reader, 1 << 16).decode()
    except BlockingIOError:
        return ""


def _end_session(leader: int) -> None:
    """What the child leaves behind: processes of Ray, which notice by themselves within a minute that it has ended."""
    import psutil  # type: ignore[import-untyped]

    for pid in psutil.pids():
        try:
            if os.getsid(pid) == leader:
                os.kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # ended meanwhile; or another user's, and so not ours
            continue
