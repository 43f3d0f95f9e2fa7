"""Signs of life: each rank writes what it is doing into a file of its own, and a watchdog sees who has stopped.

A rank that hangs (a deadlock, a dead disk, a stopped process) raises nothing and ends nothing; all others wait for it
in a collective, and Ray does not notice. So every rank keeps one line, `PHASE STEP`, in `RunDir.heartbeat(rank)`,
rewritten in place whenever it goes on to something else: a few microseconds, also on a shared disk, since nothing is
flushed. The driver compares what it reads with what it read before, by its own clock: those of machines may differ.

A rank that has said nothing new for as long as its phase may take writes the stacks of all its threads beside its log
(`RunDir.worker_stacks`), from a thread of the interpreter that needs nothing of the others; a little later the driver
ends the group. SIGUSR1 to a worker writes them at any time.

Not here: what a driver does about it (`cluster.workers.run_workers`).
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pretrain.record.run_dir import RunDir

__all__ = ["Heartbeat", "Phase", "Silence", "Watchdog", "beating", "longest_s"]

Phase = Literal["start", "data", "step", "checkpoint"]

LONGER = 3.0  # than a step may a start take, which reads a model, and a checkpoint, which may go to a store far away
REARM_S = 1.0  # between two settings of the timer of stacks: each starts a thread
MARGIN = 0.1  # of its time is waited longer before a rank is given up, so that its stacks are written
_LENGTH = 40  # bytes of a line: a shorter one leaves nothing of a longer one behind


def longest_s(phase: str, hang_after_s: float) -> float:
    """Seconds that a rank may say nothing new in a phase."""
    return hang_after_s * (LONGER if phase in ("start", "checkpoint") else 1.0)


class Heartbeat:
    """What this rank is doing, for those who watch; see `beating`."""

    def __init__(self, line: int, stacks: int, hang_after_s: float) -> None:
        """
        Args:
            line, stacks: Open files for the line and for the stacks.
            hang_after_s: Seconds that a step may take; 0: nobody watches.
        """
        self._line, self._stacks, self._hang_after_s = line, stacks, hang_after_s
        self._armed = -REARM_S
        self._phase = ""

    def beat(self, phase: Phase, step: int) -> None:
        """This rank goes on to `phase`, on the way to `step` of the run."""
        os.pwrite(self._line, f"{phase} {step}".ljust(_LENGTH - 1).encode() + b"\n", 0)
        now = time.monotonic()
        if self._hang_after_s and (now - self._armed > REARM_S or longest_s(phase, 1) != longest_s(self._phase, 1)):
            faulthandler.dump_traceback_later(longest_s(phase, self._hang_after_s), file=self._stacks)
            self._armed, self._phase = now, phase


@contextmanager
def beating(run: RunDir, rank: int, hang_after_s: float) -> Iterator[Heartbeat]:
    """The heartbeat of a rank, until the end of the block.

    Args:
        run: Whose directory takes line and stacks.
        rank: Of this process.
        hang_after_s: Seconds that a step may take before the stacks are written; 0: never.
    """
    path, stacks = run.heartbeat(rank), run.worker_stacks(rank)
    path.parent.mkdir(parents=True, exist_ok=True)
    stacks.parent.mkdir(parents=True, exist_ok=True)
    # Both stay as they are until there is something to write: the stacks of an earlier hang are kept.
    with path.open("wb", buffering=0) as line, stacks.open("ab", buffering=0) as dump:
        faulthandler.register(signal.SIGUSR1, file=dump.fileno(), all_threads=True)
        try:
            yield Heartbeat(line.fileno(), dump.fileno(), hang_after_s)
        finally:
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink(missing_ok=True)
            if not os.fstat(dump.fileno()).st_size:
                stacks.unlink(missing_ok=True)


@dataclass(frozen=True)
class Silence:
    """A rank that has said nothing new for too long, and what there is to say of it in one line."""

    rank: int
    text: str


class Watchdog:
    """Looks at the heartbeats of a run again and again; ranks that have not begun to write are not judged."""

    def __init__(self, run: RunDir, hang_after_s: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            run: Which run.
            hang_after_s: Seconds that a step may take; 0: nothing is ever found.
            clock: Seconds, for tests.
        """
        self._run, self._hang_after_s, self._clock = run, hang_after_s, clock
        self._seen: dict[Path, tuple[bytes, float]] = {}  # line, and when it was new

    def forget(self) -> None:
        """Before a group starts: lines of ranks that were killed say nothing of the next ones."""
        self._seen.clear()
        for path in self._run.heartbeats():
            path.unlink(missing_ok=True)

    def look(self) -> Silence | None:
        """Whether some rank hangs; the one that went silent first."""
        if not self._hang_after_s:
            return None
        now, states = self._clock(), {}
        for path in self._run.heartbeats():
            try:
                line = path.read_bytes()
            except OSError:  # the rank has just ended, or the disk is away for a moment
                continue
            if not line:
                continue
            before = self._seen.get(path)
            since = now if before is None or before[0] != line else before[1]
            self._seen[path] = (line, since)
            states[path] = (line.decode(errors="replace").split(), since)
        silent = [
            (since, path)
            for path, ((phase, *_), since) in states.items()
            if now - since > longest_s(phase, self._hang_after_s) * (1 + MARGIN)
        ]
        if not silent:
            return None
        since, path = min(silent)
        rank = self._run.rank_of(path)
        where = "; ".join(f"rank {self._run.rank_of(at)} in {' '.join(words)}" for at, (words, _) in states.items())
        silence = f"no sign of life for {now - since:.0f} s (train.hang_after_s={self._hang_after_s:g})"
        # Those of all: silence does not tell which of the ranks keeps the others waiting.
        stacks = f"{self._run.relative(self._run.logs)}/worker-*.stacks"
        return Silence(rank, f"{silence}: {where}; stacks in {stacks}")
