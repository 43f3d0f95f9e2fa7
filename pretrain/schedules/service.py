"""The service: looks at the entries of a storage every few seconds and has evaluated what is due, each in a process.

Several services may look after one storage; each due time is done by one of them. A service keeps nothing in memory
that it needs: whatever ends it, the next one goes on from the files.

Not here: what is due (`pretrain.schedules.entries`), the work (`pretrain.schedules.work`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Generic

from pretrain.errors import RequestError
from pretrain.processes import Handle, Launcher
from pretrain.record import lines
from pretrain.record.lock import hold, is_held
from pretrain.record.run_dir import RunDir
from pretrain.schedules.entries import Claim, Entry, Schedules, decide, text_of_time
from pretrain.schedules.history import told
from pretrain.schedules.webhooks import Outbox
from pretrain.schedules.work import NewCheckpoints, given_up, is_sent

__all__ = ["Service", "utc_now"]

POLL_S = 2.0
REST = timedelta(minutes=10)  # of an entry whose work has died, or of a run that MLflow does not take


class Service(Generic[Handle]):
    """Looks after the schedule of one storage.

    Args:
        schedules: The entries.
        launcher: Starts the work.
        clock: Gives the time, UTC.
        say: Gets lines for people.
        parallel: How many entries are worked on at a time.
    """

    def __init__(
        self,
        schedules: Schedules,
        launcher: Launcher[Handle],
        clock: Callable[[], datetime],
        say: Callable[[str], None],
        parallel: int = 1,
    ) -> None:
        self._schedules, self._launcher, self._clock, self._say = schedules, launcher, clock, say
        self._parallel = parallel
        self._at_work: dict[str, Handle] = {}
        self._sending: dict[Path, Handle] = {}
        self._new: dict[str, tuple[Entry, NewCheckpoints]] = {}
        self._resting: dict[str | Path, datetime] = {}
        self._runs: set[Path] = set()  # with scores of schedules
        self._once: set[str] | None = None  # entries that were worked on, where each is once
        self._offset = self._told_from = 0
        self._given_up: dict[str, list[dict[str, Any]]] = {}
        _, self._told_from = lines.records(schedules.history)

    def run_once(self, wait: Callable[[float], Any]) -> int:
        """Do what is due of each entry, once, and end; returns how many failures and regressions were found."""
        self._once, began = set[str](), self._told_from
        while self.tick() or self._at_work or self._sending:
            if wait(POLL_S):
                break
        found, _ = lines.records(self._schedules.history, began)
        return sum(line.get("what") in ("failed", "regressed") for line in found)

    def run(self, stopping: threading.Event) -> None:
        """Look again and again until somebody says to stop."""
        while not stopping.is_set():
            self.tick()
            stopping.wait(POLL_S)

    def stop(self, wait: Callable[[float], Any]) -> list[str]:
        """End what is at work, and return of which entries; the next service does it again."""
        ended = sorted(self._at_work)
        for handle in (*self._at_work.values(), *self._sending.values()):
            self._launcher.stop(handle)
        while any(self._launcher.poll(handle) is None for handle in (*self._at_work.values(), *self._sending.values())):
            wait(0.1)
        return ended

    def tick(self) -> bool:
        """One look; returns whether anything was started."""
        self._collect()
        self._read_history()
        started = False
        for entry in self._schedules.entries():
            started |= self._look_at(entry)
        self._deliver()
        return started | self._send_scores()

    def _look_at(self, entry: Entry) -> bool:
        now = self._clock()
        is_free = entry.name not in self._at_work
        is_over = self._once is not None and entry.name in self._once
        is_resting = is_over or self._resting.get(entry.name, now) > now
        if is_free and (len(self._at_work) >= self._parallel or is_resting):
            return False
        if entry.cron is None and not (is_free and self._has_new(entry)):
            return False
        if entry.cron is not None and decide(entry, now, is_held=not is_free) is None:  # asked again by the claim
            return False
        claim = self._schedules.claim(entry.name, now)
        if claim is not None:
            self._start(claim)
        return claim is not None

    def _start(self, claim: Claim) -> None:
        """In a process that holds the lock of the entry until it ends, whatever becomes of this one."""
        name, log = claim.entry.name, self._schedules.log_of(claim.entry.name)
        log.parent.mkdir(exist_ok=True)
        if self._once is not None:
            self._once.add(name)
        arguments = ("-m", "pretrain.schedules", str(self._schedules.storage), name, text_of_time(claim.due))
        with claim.lock:
            self._at_work[name] = self._launcher.start(arguments, log, locks=[claim.lock.fileno()])

    def _collect(self) -> None:
        now = self._clock()
        for name, handle in list(self._at_work.items()):
            if (code := self._launcher.poll(handle)) is None:
                continue
            del self._at_work[name]
            with suppress(RequestError):  # removed meanwhile
                if self._schedules.entry(name).running is None:
                    continue
                error = f"its process ended with {code}, see {self._schedules.log_of(name)}"
                self._schedules.end(name, now, "failed", error=error)
                self._resting[name] = now + REST
        for path, handle in list(self._sending.items()):
            if self._launcher.poll(handle) is not None:
                del self._sending[path]

    def _has_new(self, entry: Entry) -> bool:
        known = self._new.get(entry.name)
        if known is None or known[0].added != entry.added:  # of another entry of this name before
            known = self._new[entry.name] = (entry, NewCheckpoints(entry))
        return bool(known[1].due(given_up(self._given_up.get(entry.name, []))))

    def _read_history(self) -> None:
        """What has been written since the last look, by whoever: what is not tried again, and what there is to say."""
        new, self._offset = lines.records(self._schedules.history, self._offset)
        for line in new:
            if line.get("what") in ("failed", "left out"):
                self._given_up.setdefault(line["entry"], []).append(line)
            if line.get("what") == "scored" and line.get("run"):
                self._runs.add(self._storage_of(line["entry"]) / line["run"])
        for line in lines.records(self._schedules.history, self._told_from)[0] if new else ():
            self._say(f"{line.get('time')} {line.get('entry')}: {told(line)}")
        self._told_from = max(self._told_from, self._offset)

    def _storage_of(self, name: str) -> Path:
        try:
            return Path(self._schedules.entry(name).on_checkpoint or self._schedules.storage)
        except RequestError:
            return self._schedules.storage

    def _deliver(self) -> None:
        outbox = Outbox(self._schedules.outbox)
        if not outbox.path.is_dir() or (lock := hold(outbox.path / ".lock")) is None:  # another service is at it
            return
        with lock:
            for sent in outbox.deliver(self._clock()):
                what = "delivered" if sent.problem is None else "undelivered"
                facts = {} if sent.problem is None else {"problem": sent.problem, "is_over": sent.is_over}
                self._schedules.note(sent.alert.entry, what, self._clock(), key=sent.alert.key, **facts)

    def _send_scores(self) -> bool:
        """Have runs sent to MLflow whose driver has ended and could not, or is gone."""
        now, started = self._clock(), False
        for path in sorted(self._runs - self._sending.keys()):
            run = RunDir(path)
            if not run.is_run or is_sent(run):
                self._runs.discard(path)
                continue
            if self._resting.get(path, now) > now or self._at_work or is_held(run.sender_lock):
                continue
            self._resting[path] = now + REST
            log = self._schedules.path / "logs" / "mlflow.log"
            self._sending[path] = self._launcher.start(("-m", "pretrain.tracking", str(path)), log)
            started = True
        return started


def utc_now() -> datetime:
    """The clock of a service."""
    return datetime.now(UTC)
