"""What the driver of a run in a remote storage does besides: it holds the lease and copies the record to the store.

Both happen in threads of their own, so that a store that is slow or away stops nothing. Of a run in a local directory
there is nothing to do.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from data_pipelines.storage.locations import redact
from pretrain.errors import RequestError, RunFailed, last_line
from pretrain.record.remote_runs import fetch_record, lease_of, push_record, push_results
from pretrain.record.run_dir import RunDir, resume_command
from pretrain.remote.folder import answering
from pretrain.remote.lease import REFRESH_S, LeaseHeld, LeaseLost
from pretrain.remote.places import uri_of
from pretrain.screen import say

__all__ = ["RemoteRecord"]

log = logging.getLogger(__name__)

EVERY_S = 10.0  # between two copies, if nothing of weight happens
SHARE = 0.05  # of the time that goes into copies, when they take long
LAST_S = 60.0  # for the store to take what is left at the end
RETRY_S = 5.0


class RemoteRecord:
    """Entered by the one process of this machine that drives the run, before it reads any of its files.

    Args:
        run: Which.

    Attributes:
        uri: Of the storage; None for a local one.

    Raises:
        RequestError: On entering: another machine drives the run, or the store refuses.
        RunFailed: The store does not answer.
    """

    def __init__(self, run: RunDir) -> None:
        self._run, self.uri, self._lease = run, uri_of(run.path.parent), lease_of(run)
        self._lost: LeaseLost | None = None
        self._is_away = False
        self._has_news, self._is_over, self._has_ended = threading.Event(), threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"remote-{name}", daemon=True)
            for name, work in (("record", self._copy), ("lease", self._refresh))
        ]

    def __enter__(self) -> RemoteRecord:
        if self._lease is None or self.uri is None:
            return self
        run_id = self._run.run_id
        with answering(self.uri):
            was_mine = self._lease.is_mine()
            try:
                self._lease.take(lambda line: say(f"run {run_id}: {line}", err=True))
            except LeaseHeld as held:
                remedy = "stop it there, or wait for its end"
                raise RequestError(f"run {run_id} is already driven by {held.holder}; {remedy}") from None
        if not was_mine:
            self._bring_again()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lease is None:
            return
        self._is_over.set()
        self._has_news.set()
        self._threads[0].join(LAST_S)
        began = self._run.journal.exists()
        is_kept = not began or self._lost is not None or self._copied_within(LAST_S)
        self._has_ended.set()
        self._threads[1].join(LAST_S)
        try:
            if began and is_kept:
                self._lease.end()
            elif not began:
                self._lease.withdraw()
        except LeaseLost:
            pass  # of a run of somebody else's there is nothing to end
        except Exception as problem:  # of any of a store's libraries
            is_kept = False
            self._warn(problem)
        if not is_kept:
            again = resume_command(self._run)
            log.warning("what %s lacks is in %s; send it from here with: %s", self.uri, self._run.path, again)

    def wake(self) -> None:
        """Something of weight has happened: copy now."""
        self._has_news.set()

    def look(self) -> None:
        """End the run that is not this machine's any more.

        Raises:
            RunFailed: Another machine drives it.
        """
        if self._lost is not None:
            raise RunFailed(f"run {self._run.run_id} is driven by {self._lost.holder} now, so it ends here")

    def _bring_again(self) -> None:
        """Who drove the run may have gone on until the lease was taken."""
        before = self._run.recipe.read_bytes() if self._run.is_run else None
        with answering(str(self.uri)):
            fetch_record(self._run)
        after = self._run.recipe.read_bytes() if self._run.is_run else None
        if before != after:
            raise RequestError(f"run {self._run.run_id}: was changed by another machine at this moment; try again")

    def _copy(self) -> None:
        pause_s = EVERY_S
        while not self._is_over.is_set() and self._lost is None:
            self._has_news.wait(pause_s)
            self._has_news.clear()
            began = time.monotonic()
            if not self._is_over.is_set():
                self._is_copied()
            pause_s = max(EVERY_S, (time.monotonic() - began) / SHARE)

    def _copied_within(self, seconds: float) -> bool:
        """What is left at the end; a store that is away is asked again."""
        until = time.monotonic() + seconds
        while not self._is_copied():
            if time.monotonic() > until or self._lost is not None:
                return False
            time.sleep(RETRY_S)
        return True

    def _is_copied(self) -> bool:
        if self._lost is not None or not self._run.journal.exists():
            return False
        try:
            push_record(self._run)
            push_results(self._run.path.parent)
        except Exception as error:  # of any of a store's libraries, or a full disk
            self._warn(error)
            return False
        if self._is_away:
            self._is_away = False
            log.warning("%s has the record of the run again", self.uri)
        return True

    def _warn(self, error: Exception) -> None:
        """Once for each time that the store is away."""
        if not self._is_away:
            text = redact(f"{type(error).__name__}: {last_line(error)}")
            log.warning("%s does not take the record of the run: %s; the run goes on, trying again", self.uri, text)
        self._is_away = True

    def _refresh(self) -> None:
        while not self._has_ended.wait(REFRESH_S):
            assert self._lease is not None
            try:
                self._lease.refresh()
            except LeaseLost as lost:
                self._lost = lost
                return
            except Exception as error:  # of any of a store's libraries
                self._warn(error)
