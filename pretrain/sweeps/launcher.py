"""Where the runs of a sweep run: on this machine here; jobs of a cluster would have the same four verbs."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from pretrain.errors import last_words
from pretrain.processes import Handle, LocalProcesses
from pretrain.sweeps.queue import Job

__all__ = ["Launcher", "LocalRuns"]


class Launcher(Protocol[Handle]):
    """Starts the run of a point, follows it and stops it."""

    def start(self, job: Job, run_id: str, place: int) -> Handle:
        """Begin the run of that name, or go on with it, at one of the places that there are at a time."""
        ...

    def poll(self, handle: Handle) -> int | None:
        """The exit code of a run as `pretrain run` has it, negative after a signal; None while it runs."""
        ...

    def stop(self, handle: Handle) -> None:
        """Ask a run to end after a checkpoint; asked again, it ends at once."""
        ...

    def told(self, job: Job) -> str:
        """What a run said last, one line."""
        ...


class LocalRuns:
    """Processes `pretrain run --run-id ID` of this machine.

    Args:
        recipe: As named on the command line.
        address: Of a Ray cluster; None: as `pretrain run` without it.
        environments: Of each place, e.g. which GPUs its run may use.
        logs: A folder for what the runs say.
    """

    def __init__(self, recipe: str, address: str | None, environments: Sequence[Mapping[str, str]], logs: Path) -> None:
        self._recipe, self._environments, self._logs = recipe, environments, logs
        self._processes = LocalProcesses()
        self._address = () if address is None else ("--address", address)

    def start(self, job: Job, run_id: str, place: int) -> subprocess.Popen[bytes]:
        """As `Launcher.start`; the same command begins the run and goes on with it."""
        arguments = ("-m", "pretrain", "run", self._recipe, *job.point.settings, *self._address, "--run-id", run_id)
        self._logs.mkdir(exist_ok=True)
        return self._processes.start(arguments, self._log(job), environment=self._environments[place])

    def poll(self, handle: subprocess.Popen[bytes]) -> int | None:
        """As `Launcher.poll`."""
        return self._processes.poll(handle)

    def stop(self, handle: subprocess.Popen[bytes]) -> None:
        """As `Launcher.stop`."""
        self._processes.stop(handle)

    def told(self, job: Job) -> str:
        """As `Launcher.told`."""
        log = self._log(job)
        if not log.is_file():
            return "it said nothing"
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 4000))
            return last_words(file.read().decode(errors="replace")) or "it said nothing"

    def _log(self, job: Job) -> Path:
        return self._logs / f"point-{job.point.number:03d}.log"
