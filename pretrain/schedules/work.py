"""What an entry has to evaluate, evaluated: scores go where those of training go, and regressions are told.

A score belongs to the run that published the checkpoint: a line of its `evaluations.jsonl`, and with it a point of its
MLflow run. What is known by weights, data and protocol is not computed again. Beside it stands a line of the history,
with what the next score of the same task is compared to.

A regression is a headline that is worse than the one before beyond noise (`pretrain.schedules.regressions`), on the
same test data: of an entry of models the score that the same reference had, of a run's checkpoints that of the one
before. It is a line in the log, the tag `warning/regression` of the MLflow run, and a message to the entry's webhook.

Not here: when (`pretrain.schedules.service`), sending (`pretrain.schedules.webhooks`, `pretrain.tracking`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from backbones.registry import IMAGE
from evaluation.protocol import CI_SUFFIXES, format_value
from pretrain.checkpoints import copies, references, store
from pretrain.config.load import in_storage, load_plan
from pretrain.config.schema import EvaluationTask
from pretrain.config.stages import Plan
from pretrain.config.suites import judged
from pretrain.errors import RequestError, RunFailed, last_line
from pretrain.evaluations import due, evaluate_tasks
from pretrain.record.events import CheckpointPublished, Evaluated, EvaluationFailed, Event, Warned
from pretrain.record.journal import Journal, read_events
from pretrain.record.lock import is_held
from pretrain.record.pictures import Drawn, keep
from pretrain.record.run_dir import RunDir, runs_in
from pretrain.schedules.entries import Entry, Schedules, parse_time, text_of_time
from pretrain.schedules.regressions import Scored, is_worse
from pretrain.schedules.webhooks import Alert, Outbox
from pretrain.tracking.cursor import Cursor

__all__ = ["NewCheckpoints", "Outcome", "done", "given_up", "is_sent"]

ABOUT = "regression"  # of the warning, and so of the tag in MLflow

Label = tuple[str, int, str, str]  # run, step, protocol, data
Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A checkpoint and what to evaluate on it.

    Attributes:
        subject: What its scores are compared by: a reference as the entry has it, or a run.
        location: Of the checkpoint.
        step: Of it.
        run: That published it, if it is in this storage.
        tasks: Some of the entry's.
    """

    subject: str
    location: str
    step: int
    run: RunDir | None
    tasks: tuple[EvaluationTask, ...]


@dataclass
class Outcome:
    """Of the work on an entry."""

    scores: int = 0
    failures: int = 0
    regressions: int = 0
    runs: dict[Path, RunDir] = field(default_factory=dict)  # with scores that MLflow may not have

    def __str__(self) -> str:
        counts = (("score", self.scores), ("failure", self.failures), ("regression", self.regressions))
        return ", ".join(
            f"{number} {what}{'s' * (number != 1)}" for what, number in counts if number or what == "score"
        )


class NewCheckpoints:
    """Checkpoints of an entry of `on_checkpoint` that lack scores of it, cheap to ask for again and again.

    Those count that runs published after the entry was added, as often as a run's own `evaluation.every` and `baseline`
    say. What a run evaluates by itself is left to it.
    """

    def __init__(self, entry: Entry) -> None:
        assert entry.on_checkpoint is not None
        self._storage, self._since = Path(entry.on_checkpoint), parse_time(entry.added).timestamp()
        self._entry = entry
        self._followed: dict[str, _Followed] = {}

    def due(self, given_up: Collection[Label]) -> list[Job]:
        """What is to be evaluated now, by run and step.

        Args:
            given_up: What has failed, and is not tried again.
        """
        found: list[Job] = []
        for run in runs_in(self._storage):
            followed = self._followed.setdefault(run.run_id, _Followed(run, self._entry, self._since))
            found += followed.due(given_up)
        return found


class _Followed:
    """One run, whose files are read on from where they were read before."""

    def __init__(self, run: RunDir, entry: Entry, since: float) -> None:
        self._run, self._entry, self._since = run, entry, since
        self._read = {run.journal: 0, run.evaluations: 0}
        self._steps: set[int] = set()
        self._done: set[tuple[int, str, str]] = set()
        self._plan: Plan | None = None
        self._asked: list[EvaluationTask] | None = None

    def due(self, given_up: Collection[Label]) -> Iterator[Job]:
        for event in self._new_events(self._run.journal):
            if isinstance(event, CheckpointPublished) and event.time >= self._since:
                self._steps.add(event.step)
        if not self._steps:
            return
        for event in self._new_events(self._run.evaluations):
            if isinstance(event, Evaluated):
                self._done.add((event.step, event.protocol, event.data))
        try:
            plan = self._plan = self._plan or load_plan(self._run.recipe, check_files=False)
        except RequestError:  # of a run that is being made, or damaged: without its recipe nobody knows what is due
            return
        if self._asked is None:
            asked = _tasks(self._entry, plan.recipe.backbone.kind)
            self._asked = [_as_the_run_has_it(task, plan.recipe.evaluation.tasks) for task in asked]
        steps = sorted(self._steps)
        left = {(step, task.protocol, task.data) for step, task in due(plan, steps, ())}
        failed = {label[1:] for label in given_up if label[0] == self._run.run_id}
        by_step: dict[int, list[EvaluationTask]] = {}
        for step, task in due(plan, steps, self._done | failed | left, self._asked):
            by_step.setdefault(step, []).append(task)
        for step, wanted in by_step.items():
            where = store.published_by_event(self._run.path, step).location
            yield Job(self._run.run_id, where, step, self._run, tuple(wanted))

    def _new_events(self, path: Path) -> list[Event]:
        """What was written since the last look; runs that ended before the entry was added are not read at all."""
        offset = self._read[path]
        if (
            not path.is_file()
            or (seen := path.stat()).st_size == offset
            or (not offset and seen.st_mtime < self._since)
        ):
            return []
        events, self._read[path] = read_events(path, offset)
        return events


def done(
    schedules: Schedules,
    entry: Entry,
    due_time: datetime,
    say: Say,
    clock: Callable[[], datetime],
    *,
    retry: bool = False,
) -> Outcome:
    """Evaluate what is due of an entry, send the scores to MLflow, and write down that it has ended.

    Each failure is written down and stops nothing else.

    Args:
        schedules: Where the entry is.
        entry: That the caller has claimed.
        due_time: Of the claim.
        say: Gets a line for people about each score and failure.
        clock: Gives the time, UTC.
        retry: Whether checkpoints of runs are tried again whose evaluation failed before.
    """
    outcome = _Work(schedules, entry, due_time, say, clock, retry).done()
    waiting = [run.run_id for run in outcome.runs.values() if not send(run)]
    if waiting:
        say(f"MLflow does not have all scores yet of {', '.join(waiting)}; they are sent later")
    schedules.end(entry.name, clock(), "ended", due=text_of_time(due_time), outcome=str(outcome))
    return outcome


class _Work:
    """On one entry, to the last score."""

    def __init__(
        self,
        schedules: Schedules,
        entry: Entry,
        due_time: datetime,
        say: Say,
        clock: Callable[[], datetime],
        retry: bool,
    ) -> None:
        self._schedules, self._entry, self._due = schedules, entry, due_time
        self._say, self._clock = say, clock
        counted = ("scored", "left out") if retry else ("scored", "left out", "failed")
        self._past = [line for line in schedules.past(entry.name) if line.get("what") in counted]
        self._outcome = Outcome()
        self._storage = Path(entry.on_checkpoint or schedules.storage)

    def done(self) -> Outcome:
        for job in self._new_checkpoints() if self._entry.on_checkpoint else self._models():
            for name, directory in self._entry.data.items():
                if tasks := [task for task in job.tasks if task.data == name]:
                    self._evaluate(job, tasks, directory)
        return self._outcome

    def _new_checkpoints(self) -> Iterator[Job]:
        """One at a time until there is no new one: some are published meanwhile."""
        new = NewCheckpoints(self._entry)
        before = None
        while jobs := new.due(given_up(self._past)):
            if jobs[0] == before:  # neither scores nor failures are on disk: trying again is no use
                raise RunFailed(f"{before.location}: its scores could not be written down")
            before = jobs[0]
            yield before

    def _models(self) -> Iterator[Job]:
        for reference in self._entry.models:
            try:
                checkpoint = references.resolve(reference, self._storage)
                manifest = store.read_manifest(checkpoint)
            except (RequestError, RunFailed, store.CheckpointError, OSError) as error:
                self._failed(last_line(error), subject=reference)
                continue
            run = RunDir(self._storage / str(manifest.get("run_id") or "."))
            known = run if run.is_run and run.path.parent == self._storage else None
            own = _recipe_tasks(known)
            tasks = tuple(_as_the_run_has_it(task, own) for task in _tasks(self._entry, _kind_of(checkpoint)))
            yield Job(reference, str(checkpoint), int(manifest["step"]), known, tasks)

    def _evaluate(self, job: Job, tasks: list[EvaluationTask], directory: str) -> None:
        """The tasks of a checkpoint on one data set, as a run evaluates them: they share its features."""
        facts = {"subject": job.subject, "run": job.run.run_id if job.run else None, "step": job.step}
        if problem := _other_data(job.run, tasks[0].data, directory):
            for task in tasks:
                self._failed(problem, **facts, protocol=task.protocol, data=task.data)
            return
        all_runs = runs_in(self._storage)
        training = next((run.training for run in all_runs if run.training.exists()), self._storage / "nothing-trains")
        events = evaluate_tasks(
            job.location,
            job.step,
            tasks,
            directory,
            str(self._storage),
            device=None,
            threads=len(os.sched_getaffinity(0)),
            training=str(training),
        )
        for event in events:
            if isinstance(event, EvaluationFailed) and event.left_out:
                self._note("left out", why=event.error, **facts, protocol=event.protocol, data=event.data)
            elif isinstance(event, EvaluationFailed):
                self._failed(event.error, **facts, protocol=event.protocol, data=event.data)
            elif isinstance(event, Evaluated):
                self._take(job, event, facts)
            else:
                self._keep(job, event)

    def _keep(self, job: Job, found: Drawn | Warned) -> None:
        """A picture, beside those of its run if it is not there yet, or a line about one that there is not."""
        if job.run is not None and isinstance(found, Drawn):
            if not job.run.visualizations(found.step, found.data, found.shows).exists():
                with Journal(job.run.evaluations) as journal:
                    journal.write(keep(job.run, found))
        elif isinstance(found, Warned):
            self._say(f"{job.subject} step {job.step}: {found.text}")

    def _take(self, job: Job, event: Evaluated, facts: Mapping[str, Any]) -> None:
        """Tell of a regression, then write a score down.

        The line of the run comes last: work that is ended before is done again, from the stored result, and then
        nothing is told twice, as a message has the same key and a score is not compared to itself.
        """
        now = {**facts, **_told(event), "data_digest": self._digest_of(event)}
        before = _before(self._past, now)
        self._say(f"{job.subject} step {job.step}: {event.task} {now['metric']} {now['text']}")
        if before is not None and is_worse(_scored(before), _scored(now), event.headline.better or "higher"):
            self._tell(job, event, before, now)
        self._note("scored", **now)
        self._outcome.scores += 1
        if job.run is not None:
            _record(job.run, event)
            self._outcome.runs[job.run.path] = job.run

    def _tell(self, job: Job, event: Evaluated, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        """Of a regression: the log, MLflow, the webhook and the history."""
        what = f"{job.subject}: {event.task} {now['metric']}"
        text = f"{what} is {now['text']} at step {job.step}, was {before['text']} at step {before['step']}"
        text += "; worse beyond noise"
        self._say(f"REGRESSION: {text}")
        if job.run is not None:
            with Journal(job.run.evaluations) as journal:
                journal.write(Warned(step=job.step, about=ABOUT, text=f"{text} (schedule {self._entry.name})"))
        if (alert := _alert(self._entry, text, before, now, self._clock())) is not None:
            Outbox(self._schedules.outbox).put(alert)
        self._note("regressed", text=text, **{key: now[key] for key in ("subject", "run", "step", "protocol", "data")})
        self._outcome.regressions += 1

    def _digest_of(self, event: Evaluated) -> str:
        """Of the data: a score on others is no score to compare with."""
        from evaluation.results import ResultStore

        result = ResultStore(self._storage).find(event.key)
        return "" if result is None else result.data_digest

    def _failed(self, error: str, **facts: Any) -> None:
        self._outcome.failures += 1
        self._note("failed", error=error, **facts)
        self._say(f"failed: {error}")

    def _note(self, what: str, **facts: Any) -> None:
        self._schedules.note(self._entry.name, what, self._clock(), due=text_of_time(self._due), **facts)
        self._past.append({"what": what, **facts})


def given_up(past: Iterable[Mapping[str, Any]]) -> set[Label]:
    """What the history says to have failed, or to be nothing for a checkpoint."""
    return {
        (line["run"], line["step"], line["protocol"], line["data"])
        for line in past
        if line["what"] in ("failed", "left out") and line.get("protocol") and line.get("run")
    }


def _tasks(entry: Entry, kind: str) -> list[EvaluationTask]:
    """What an entry asks of checkpoints with a backbone of a kind."""
    if entry.suite is None:
        return [EvaluationTask(protocol, name) for name in entry.data for protocol in entry.tasks]
    suites = [EvaluationTask(data=name, suite=entry.suite) for name in entry.data]
    return [
        replace(task, protocol=protocol)
        for task in suites
        for protocol, reason in judged(task, kind, entry.data[task.data]).items()
        if reason is None
    ]


def _kind_of(checkpoint: Path) -> str:
    from evaluation.runner import architecture_of  # with torch

    return str(architecture_of(checkpoint).get("kind", IMAGE))


def _as_the_run_has_it(task: EvaluationTask, own: Iterable[EvaluationTask]) -> EvaluationTask:
    """With the size of the task of the run's recipe that has this protocol and data, if there is one."""
    mine = next((mine for mine in own if (mine.protocol, mine.data) == (task.protocol, task.data)), task)
    return replace(task, image_size=mine.image_size, image_width=mine.image_width)


def _recipe_tasks(run: RunDir | None) -> list[EvaluationTask]:
    try:
        return [] if run is None else load_plan(run.recipe, check_files=False).recipe.evaluation.tasks
    except RequestError:
        return []


def _other_data(run: RunDir | None, name: str, directory: str) -> str | None:
    """Why scores may not be written down: the run has other data of this name, and nobody could tell them apart."""
    if run is None:
        return None
    try:
        recipe = load_plan(run.recipe, check_files=False).recipe
    except RequestError as error:
        return last_line(error)
    mine = recipe.evaluation.data.get(name)
    where = None if mine is None else Path(in_storage(mine, recipe.storage, str(run.path.parent)))
    if where is None or not where.is_dir() or where.resolve() == Path(directory).resolve():
        return None
    return f"--data {name}={directory}: {name} of run {run.run_id} is {where}; give the data another name"


def _told(event: Evaluated) -> dict[str, Any]:
    """What the history keeps of a score."""
    headline = event.headline
    low, high = (event.metrics.get(headline.name + suffix) for suffix in CI_SUFFIXES)
    score = format_value(event.metrics[headline.name], headline.unit)
    return {
        "protocol": event.protocol,
        "data": event.data,
        "metric": headline.name,
        "score": event.metrics[headline.name],
        "low": low,
        "high": high,
        "text": f"{score} ({event.interval})" if event.interval else score,
        "key": event.key,
        "known": event.cached,
    }


def _before(past: list[dict[str, Any]], now: Mapping[str, Any]) -> dict[str, Any] | None:
    """The score that this one is compared to: the last one on the same test data, if both have intervals.

    Step 0, with which training begins, is no score that training has to keep.
    """
    same = ("subject", "protocol", "data", "data_digest", "metric")
    last = next((line for line in reversed(past) if _like(line, now, same) and line["step"] > 0), None)
    if last is None or None in (last["low"], last["high"], now["low"], now["high"]):
        return None
    return last


def _like(line: Mapping[str, Any], now: Mapping[str, Any], keys: Iterable[str]) -> bool:
    return line["what"] == "scored" and all(line.get(key) == now[key] for key in keys)


def _scored(line: Mapping[str, Any]) -> Scored:
    return Scored(line["score"], line["low"], line["high"])


def _record(run: RunDir, event: Evaluated) -> None:
    """One line of the run's evaluations, unless the same result stands there, from the run or a schedule."""
    for known in read_events(run.evaluations)[0]:
        if isinstance(known, Evaluated) and (known.step, known.task, known.key) == (event.step, event.task, event.key):
            return
    with Journal(run.evaluations) as journal:
        journal.write(event)
        if journal.lost:
            raise OSError(f"{run.evaluations}: the score could not be written")


def _alert(entry: Entry, text: str, before: Mapping[str, Any], now: Mapping[str, Any], when: datetime) -> Alert | None:
    """The message to the webhook of an entry, if it has one."""
    if entry.webhook_url_env is None or entry.webhook_secret_env is None:
        return None
    occasion = json.dumps([entry.name, entry.added, before["key"], now["key"], now["subject"]])
    shown, at = ("run", "step", "score", "low", "high"), text_of_time(when)
    body = {
        "type": "evaluation.regressed",
        "time": at,
        "text": f"{entry.name}: {text}",
        "schedule": entry.name,
        **{key: now[key] for key in ("subject", "protocol", "data", "metric")},
        "before": {key: before[key] for key in shown},
        "after": {key: now[key] for key in shown},
    }
    key = hashlib.sha256(occasion.encode()).hexdigest()[:32]
    return Alert(key, entry.name, body, entry.webhook_url_env, entry.webhook_secret_env, tries=0, next_try=at)


def is_sent(run: RunDir) -> bool:
    """Whether MLflow has all scores of a run, or never gets any: the run is not tracked."""
    cursor = Cursor.load(run.cursor) if run.cursor.is_file() else None
    size = run.evaluations.stat().st_size if run.evaluations.is_file() else 0
    return cursor is None or cursor.evaluations_offset >= size


def send(run: RunDir) -> bool:
    """Send the scores of a run to MLflow; False where that has to wait, for its driver sends or MLflow is away."""
    if is_sent(run):
        return True
    if is_held(run.sender_lock):  # by the driver of the run, which sends them soon
        return False
    from pretrain.tracking.sync import sync

    return sync(run.path, copies.exported, deadline_s=60.0)
