"""Processes that a service or a sweep starts and follows, by three verbs that jobs of a cluster have as well.

Not here: what is started, and when (`pretrain.schedules.service`, `pretrain.sweeps`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol, TypeVar

__all__ = ["Launcher", "LocalProcesses"]

_SET_PDEATHSIG = 1  # of prctl(2)

Handle = TypeVar("Handle")


class Launcher(Protocol[Handle]):
    """Where commands of `pretrain` run: on this machine, or as jobs of a cluster."""

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        locks: Sequence[int] = (),
    ) -> Handle:
        """Begin `python ARGUMENTS`, whose output goes to the end of `log`.

        Args:
            arguments: of the interpreter.
            log: a file.
            environment: what is other in it than here.
            locks: descriptors of files that stay locked for as long as the command runs.
        """
        ...

    def poll(self, handle: Handle) -> int | None:
        """The exit code, negative after a signal; None while the command runs."""
        ...

    def stop(self, handle: Handle) -> None:
        """Ask the command to end, as SIGTERM does."""
        ...


class LocalProcesses:
    """Processes of this machine, in sessions of their own: a Ctrl-C reaches them by `stop` only.

    They are asked to stop when the process that started them is gone, however it ended.
    """

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] = MappingProxyType({}),
        locks: Sequence[int] = (),
    ) -> subprocess.Popen[bytes]:
        """As `Launcher.start`."""
        parent, prctl = os.getpid(), ctypes.CDLL(None).prctl if sys.platform == "linux" else None

        def follow_parent() -> None:
            if prctl is not None:
                prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:  # gone before that was set
                os._exit(1)

        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, *arguments],
                env=os.environ | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(locks),
                preexec_fn=follow_parent,
            )

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """As `Launcher.poll`."""
        return handle.poll()

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        """As `Launcher.stop`."""
        handle.terminate()
