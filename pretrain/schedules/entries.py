"""The entries of a storage's schedule, one file each, and who may work on one: every change is made here.

An entry of `cron` is due at times, one of `on_checkpoint` whenever there is a checkpoint without its scores. Of due
times only the newest counts: what was missed while nobody looked is made up for once. `handled` is the newest time that
was begun or skipped, `running` that of the work that has not ended; work whose process has died, which its lock tells,
is begun again.

Not here: what is evaluated (`pretrain.schedules.work`), when anybody looks (`pretrain.schedules.service`).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from data_pipelines.files import write_atomically
from data_pipelines.parsing import parse_json
from evaluation.suites import SUITES
from pretrain.errors import RequestError, listed, nearest
from pretrain.record import lines
from pretrain.record.lock import hold, holder
from pretrain.schedules.cron import last_due

__all__ = ["Claim", "Entry", "Schedules", "decide", "parse_time", "text_of_time"]

log = logging.getLogger(__name__)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,63}")
FORMAT = 1
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_LONGEST_CHANGE_S = 30.0  # that another process is waited for; changes take milliseconds


@dataclass(frozen=True)
class Entry:
    """What is to be evaluated, and when.

    Attributes:
        name: Of its file.
        tasks: Names of protocols; none where there is a suite.
        data: Name -> directory with train-*.tar and test-*.tar.
        models: References to checkpoints, of an entry of `cron`.
        cron: Five fields, in the wall clock of `tz`.
        on_checkpoint: A directory of runs, whose new checkpoints are evaluated; in the place of `cron`.
        suite: One of `evaluation.suites.SUITES`: its protocols that fit a backbone and the labels of the data.
        webhook_url_env, webhook_secret_env: Names of environment variables of the service; None: no webhook.
        added, handled, running: UTC, as `text_of_time` writes them; see at the top.
    """

    name: str
    tasks: tuple[str, ...]
    data: Mapping[str, str]
    models: tuple[str, ...] = ()
    cron: str | None = None
    tz: str = "UTC"
    on_checkpoint: str | None = None
    suite: str | None = None
    webhook_url_env: str | None = None
    webhook_secret_env: str | None = None
    added: str = ""
    handled: str = ""
    running: str | None = None

    @property
    def when(self) -> str:
        """For people."""
        return f"{self.cron} {self.tz}" if self.cron else f"each checkpoint in {self.on_checkpoint}"

    @property
    def what(self) -> str:
        """For people."""
        return ", ".join(self.tasks) if self.suite is None else f"suite {self.suite}"


@dataclass
class Claim:
    """The right to work on an entry: nobody else has it until it is closed, here and in processes that inherited it."""

    entry: Entry
    due: datetime
    lock: IO[str] = field(repr=False)


Decision = tuple[Literal["run", "skip"], datetime]


def decide(entry: Entry, now: datetime, *, is_held: bool) -> Decision | None:
    """What to do about an entry of `cron`: run it, or skip a due time, for which its last work leaves no room.

    Args:
        entry: As its file says.
        now: UTC.
        is_held: Whether somebody works on it.
    """
    assert entry.cron is not None
    newest = last_due(entry.cron, entry.tz, now)
    is_new = newest > parse_time(entry.handled)
    if is_held:
        return ("skip", newest) if is_new else None
    if is_new:
        return "run", newest
    return ("run", parse_time(entry.running)) if entry.running else None


class Schedules:
    """The schedule of one storage; nothing is made before an entry is added."""

    def __init__(self, storage: Path) -> None:
        self.storage = storage
        self.path = storage / "schedules"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def outbox(self) -> Path:
        return self.path / "outbox"

    def log_of(self, name: str) -> Path:
        """Where the output of an entry's evaluations goes."""
        return self.path / "logs" / f"{name}.log"

    def entries(self) -> list[Entry]:
        """All that can be read, by name; of others a warning says which."""
        found = []
        for path in sorted(self.path.glob("*.json")):
            try:
                found.append(_read(path))
            except FileNotFoundError:  # just removed
                continue
            except (ValueError, TypeError, OSError) as error:
                log.warning("%s: no entry of a schedule, passed over (%s)", path, error)
        return found

    def entry(self, name: str) -> Entry:
        """The entry of that name.

        Raises:
            RequestError: There is none, or it is damaged.
        """
        path = self._file(name)
        if not NAME.fullmatch(name) or not path.is_file():
            known = [path.stem for path in sorted(self.path.glob("*.json"))]
            hint = nearest(name, known) or f"; there are: {listed(known)}"
            raise RequestError(f"schedule {name}: not in {self.path}{hint}")
        try:
            return _read(path)
        except (ValueError, TypeError) as error:
            raise RequestError(f"{path}: damaged ({error}); remove the file and add the entry again") from None

    def add(self, entry: Entry, now: datetime) -> None:
        """Write down a new entry; what was due before now is not.

        Raises:
            RequestError: There is one of this name.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._changing():
            if self._file(entry.name).exists():
                remedy = f"choose another name, or remove it first: pretrain schedule remove {entry.name}"
                raise RequestError(f"schedule {entry.name}: is in {self.path} already; {remedy}")
            began = text_of_time(now)
            self._write(replace(entry, added=began, handled=began, running=None))
            self.note(entry.name, "added", now)

    def remove(self, name: str, now: datetime) -> None:
        """Forget an entry; its history stays, and work that has begun goes on.

        Raises:
            RequestError: There is none of this name.
        """
        if not self._file(name).is_file():  # a damaged one can be removed, too
            self.entry(name)
        with self._changing():
            self._file(name).unlink(missing_ok=True)
            self.note(name, "removed", now)

    def claim(self, name: str, now: datetime, *, at_once: bool = False) -> Claim | None:
        """Begin what is due of an entry; None where nothing is, or somebody else is at it.

        A due time for which there is no room is skipped, and the history says so.

        Args:
            at_once: Whether it is due now, whatever its times say; an entry of `on_checkpoint` always is.
        """
        with self._changing():
            path = self._file(name)
            if not path.is_file():  # removed meanwhile
                return None
            entry = _read(path)
            lock = hold(self._lock(name))
            decision: Decision | None = ("run", now) if lock is not None else None
            if not at_once and entry.cron:
                decision = decide(entry, now, is_held=lock is None)
            if decision is None or lock is None:
                if lock is not None:
                    lock.close()
                if decision is not None:
                    self._write(replace(entry, handled=text_of_time(decision[1])))
                    why = f"the work of {entry.running or 'before'} goes on (process {holder(self._lock(name))})"
                    self.note(name, "skipped", now, due=text_of_time(decision[1]), why=why)
                return None
            _, due = decision
            if entry.running is not None:
                self.note(name, "interrupted", now, due=entry.running)
            handled = max(parse_time(entry.handled), due)
            entry = replace(entry, running=text_of_time(due), handled=text_of_time(handled))
            self._write(entry)
            self.note(name, "began", now, due=text_of_time(due))
            return Claim(entry, due, lock)

    def end(self, name: str, now: datetime, what: str, **facts: Any) -> None:
        """The work on an entry has ended, and is not begun again."""
        with self._changing():
            if self._file(name).is_file():
                self._write(replace(_read(self._file(name)), running=None))
            self.note(name, what, now, **facts)

    def note(self, name: str, what: str, now: datetime, **facts: Any) -> None:
        """Add a line to the history."""
        lines.append(self.history, {"time": text_of_time(now), "entry": name, "what": what, **facts})

    def past(self, name: str | None = None) -> list[dict[str, Any]]:
        """The history, of one entry or all."""
        return [line for line in lines.records(self.history)[0] if name in (None, line.get("entry"))]

    def holder(self, name: str) -> str:
        """The process that worked on an entry last."""
        return holder(self._lock(name))

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.json"

    def _lock(self, name: str) -> Path:
        return self.path / f".{name}.lock"

    def _write(self, entry: Entry) -> None:
        write_atomically(self._file(entry.name), json.dumps({"format": FORMAT, **asdict(entry)}, indent=1).encode())

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """One process at a time looks at an entry and writes it."""
        guard, deadline = self.path / ".lock", time.monotonic() + _LONGEST_CHANGE_S
        while (lock := hold(guard)) is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{guard}: process {holder(guard)} does not let go of it")
            time.sleep(0.02)
        with lock:
            yield


def text_of_time(when: datetime) -> str:
    """UTC to the second, as files have it."""
    return when.astimezone(UTC).strftime(_TIME)


def parse_time(text: str) -> datetime:
    """The inverse of `text_of_time`.

    Raises:
        ValueError: It is something else.
    """
    return datetime.strptime(text, _TIME).replace(tzinfo=UTC)


def _read(path: Path) -> Entry:
    record = parse_json(path.read_bytes())
    if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
        raise ValueError(f"not an entry of format {FORMAT}")
    known = {part.name for part in fields(Entry)}
    entry = Entry(**{key: value for key, value in record.items() if key in known})
    if entry.name != path.stem:
        raise ValueError(f"it says to be {entry.name!r}")
    if (entry.cron is None) == (entry.on_checkpoint is None) or not isinstance(entry.data, dict):
        raise ValueError("it does not say when, or of what data")
    if bool(entry.tasks) == (entry.suite is not None):
        raise ValueError("it names protocols and a suite, or neither")
    if entry.suite not in (None, *SUITES):
        raise ValueError(f"its suite {entry.suite!r} is none of {', '.join(SUITES)}")
    for text in (entry.added, entry.handled, *([entry.running] if entry.running else [])):
        parse_time(text)
    return replace(entry, tasks=tuple(entry.tasks), models=tuple(entry.models))
