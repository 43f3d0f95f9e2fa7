"""The right to drive a run of a remote storage: one object that its holder refreshes, and others watch.

Whoever asks for it while the holder has not said that it has ended waits: a lease that is refreshed meanwhile is
another's, one that is not for `EXPIRY_S` is taken. The clock of no machine decides, but for leases that are hours old.
The same working copy need not wait for itself: there a lock of this machine (`pretrain.record.lock`) tells whether a
process still drives the run, and has to be held by who takes the lease.

Object stores do not all know "replace if unchanged". Two who take an expired lease at the same moment both write it,
and the one whose object was replaced finds another's token in it: at once, or when it refreshes it.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from pretrain.remote.folder import RemoteFolder

__all__ = ["EXPIRY_S", "REFRESH_S", "Holder", "Lease", "LeaseHeld", "LeaseLost"]

REFRESH_S = 10.0
EXPIRY_S = 60.0
FORGOTTEN_S = 3600.0  # by the clocks of both machines: nobody waits for one who was last seen an hour ago
LOOK_S = 2.0  # between two looks while waiting
SETTLE_S = 1.0  # for the object of another who took the lease at the same moment


@dataclass(frozen=True)
class Holder:
    """Who drives a run, or has driven it last.

    Attributes:
        token: Of the working copy.
        host, process: For people.
        beat: Counts the refreshes.
        time: Of the last one, in Unix seconds by the clock of the host.
        ended: It does not any more.
    """

    token: str
    host: str
    process: int
    beat: int
    time: float
    ended: bool = False

    @classmethod
    def parse(cls, content: bytes) -> Holder:
        """What a lease says.

        Raises:
            ValueError: It is damaged.
        """
        try:
            return cls(**parse_json(content))
        except TypeError:
            raise ValueError("not a lease") from None

    def is_fresh(self, now: float) -> bool:
        """Whether it was refreshed lately, by the clocks of both machines."""
        return not self.ended and now - self.time < EXPIRY_S

    def __str__(self) -> str:
        return f"process {self.process} of {self.host}"


class LeaseHeld(Exception):
    """Another machine drives the run."""

    def __init__(self, holder: Holder) -> None:
        super().__init__(str(holder))
        self.holder = holder


class LeaseLost(LeaseHeld):
    """Another machine has taken over the run."""


class Lease:
    """The lease of one run.

    Args:
        folder: Of the run in the store.
        name: Of the object.
        token: A file of the working copy that keeps the token which the working copy writes into its leases.
        wait: As `time.sleep`.
        clock: As `time.time`.
    """

    def __init__(
        self,
        folder: RemoteFolder,
        name: str,
        token: Path,
        *,
        wait: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._folder, self._name, self._token, self._wait, self._clock = folder, name, token, wait, clock
        self._held: Holder | None = None

    def holder(self) -> Holder | None:
        """Who has it, or had it last; None when nobody ever had."""
        content = self._folder.read(self._name)
        if content is None:
            return None
        try:
            return Holder.parse(content)
        except ValueError:
            raise ValueError(f"{self._folder.uri}/{self._name}: damaged; delete it if nothing drives the run") from None

    def is_mine(self) -> bool:
        """Whether this working copy was the last to take it."""
        if not self._token.exists():
            return False
        holder = self.holder()
        return holder is not None and holder.token == self._token.read_text()

    def take(self, tell: Callable[[str], None]) -> None:
        """Become the holder; this may wait for `EXPIRY_S`.

        Args:
            tell: Gets one line, if there is something to wait for.

        Raises:
            LeaseHeld: Another machine drives the run.
        """
        mine = self._own_token()
        found = self.holder()
        may_live = found is not None and not found.ended and abs(self._clock() - found.time) < FORGOTTEN_S
        if found is not None and may_live and found.token != mine:
            tell(f"{found} drove it and has not ended: looking for up to {EXPIRY_S:.0f} s whether it still does")
            self._watch(found)
        beat = found.beat + 1 if found is not None else 0
        self._held = Holder(mine, socket.gethostname(), os.getpid(), beat, self._clock())
        self._write()
        if found is not None and found.token != mine:
            self._wait(SETTLE_S)
            self._require_held()

    def refresh(self) -> None:
        """Say that this process still drives the run.

        Raises:
            LeaseLost: Another one does.
        """
        self._say(ended=False)

    def end(self) -> None:
        """Say that this process does not drive the run any more.

        Raises:
            LeaseLost: Another one does.
        """
        self._say(ended=True)

    def withdraw(self) -> None:
        """Leave no trace of a run that has not begun.

        Raises:
            LeaseLost: Another machine has begun it.
        """
        self._require_held()
        self._folder.remove(self._name)

    def _say(self, *, ended: bool) -> None:
        """Write the next beat of what this process holds."""
        self._require_held()
        assert self._held is not None
        self._held = replace(self._held, beat=self._held.beat + 1, time=self._clock(), ended=ended)
        self._write()

    def _own_token(self) -> str:
        """Kept before it is used: a process that dies in between has taken nothing."""
        if not self._token.exists():
            write_atomically(self._token, secrets.token_hex(16).encode())
        return self._token.read_text()

    def _watch(self, found: Holder) -> None:
        """Return when the lease has ended, or was not refreshed for `EXPIRY_S`.

        Raises:
            LeaseHeld: It was.
        """
        waited = 0.0
        while waited < EXPIRY_S:
            self._wait(LOOK_S)
            waited += LOOK_S
            now = self.holder()
            if now is None or now.ended:
                return
            if (now.token, now.beat) != (found.token, found.beat):
                raise LeaseHeld(now)

    def _require_held(self) -> None:
        assert self._held is not None, "take it first"
        found = self.holder()
        if found is not None and (found.token != self._held.token or found.beat > self._held.beat):
            raise LeaseLost(found)

    def _write(self) -> None:
        self._folder.write(self._name, json.dumps(asdict(self._held)).encode() if self._held else b"")
