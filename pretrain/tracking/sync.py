"""Sends a run to MLflow from what the run writes to disk, so that no server can stop or slow training.

A daemon thread tails the event log and the evaluations. How far the server has acknowledged them is kept beside them
(`pretrain.tracking.cursor`); everything else waits on disk, for as long as it takes, until the server answers or
somebody runs `python -m pretrain.tracking RUN_DIR`. The MLflow run is created on first contact and found again by the
tag `pretrain.run_id`, so the server may be down when training starts and the driver may die half-way.

What arrives:
    metrics       `train/NAME` with the time they were measured. After a restart training repeats the steps since its
                  last checkpoint: steps already sent are dropped, per metric.
    checkpoints   a logged model plus a version of the registered model. Step 0, the random backbone that scores are
                  compared with, is logged with its scores but not registered as a model version.
    warnings      tags `warning/collapse`, `warning/non_finite_loss`, `warning/accumulation` and, of schedules,
                  `warning/regression`, the last one of each.
    evaluations   `eval/PROTOCOL/DATA/METRIC` at the step of the checkpoint, on the run, the model and the version.
                  Each result of (step, protocol, data) once, however often a driver or a schedule reports it.
    alias best    the version with the best `select` score, over all runs that share the model name; without `select`,
                  and until a version has a score of it, the newest. The one before is `previous`.
    visualizations  as artifacts of that name.
Lines that cannot be understood or that MLflow refuses are parked in a file of their own.

Not here: the calls themselves (`pretrain.tracking.client`), reading a registry (`pretrain.checkpoints.references`).
"""

from __future__ import annotations

import logging
import math
import os
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_pipelines.storage.locations import redact
from pretrain.config.stages import written_stages
from pretrain.config.values import parse_yaml
from pretrain.errors import RequestError
from pretrain.record.events import (
    CheckpointPublished,
    DamagedEvent,
    Evaluated,
    EvaluationFailed,
    Event,
    Failed,
    Finished,
    Metrics,
    Rejected,
    Visualizations,
    Warned,
)
from pretrain.record.journal import Journal, Line, read_events, read_lines
from pretrain.record.lock import hold, holder
from pretrain.record.run_dir import RECIPE, RunDir
from pretrain.record.scores import selected
from pretrain.tracking.client import (
    MlflowRun,
    Point,
    checked_model_name,
    connect,
    default_database,
    verdict,
)
from pretrain.tracking.cursor import BESIDE, Cursor, Sent, Status

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["Status", "Tracker", "sync"]

log = logging.getLogger(__name__)

Exported = Callable[[Path, int], tuple[Path, str] | None]  # `pretrain.checkpoints.copies.exported`, which stands above

POLL_S = 1.0
MAX_BACKOFF_S = 30.0
MAX_TAG = 1000  # characters
LINES_PER_BATCH = 200  # with the eight training metrics about 0.5 s for SQLite, 0.3 s for a server
MALFORMED = (ValueError, ArithmeticError)  # what a damaged line raises, and numbers that nobody meant


class Busy(RuntimeError):
    """Another process is sending this run."""


class Tracker:
    """Follows one run directory.

    Args:
        run_dir: `runs/RUN_ID`; its name is the run id.
        uri: Tracking server or database; a password in it is used but never written down.
        experiment: MLflow experiment.
        recipe_yaml: The resolved recipe; becomes the artifact `config/recipe.yaml`.
        params: The same as (nested) settings; become parameters `a.b.c`. Long values are left to the artifact.
        tags: Tags of the run, its models and versions, e.g. objective, backbone, git commit.
        model_name: Registered model that gets the checkpoints.
        select: PROTOCOL/DATA/METRIC that moves the alias `best`; its direction comes with the scores. None: the newest
            is best.
        exported: Finds the exported files of a checkpoint, wherever it is stored.

    Attributes:
        problem: Why nothing arrives at the moment, in one line; None when all is well.

    Raises:
        RequestError: `model_name` is no name MLflow accepts.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        uri: str,
        experiment: str,
        recipe_yaml: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        model_name: str,
        select: str | None,
        exported: Exported,
    ) -> None:
        self.run = RunDir(Path(run_dir))
        self.problem: str | None = None
        self._exported = exported
        self._uri = uri
        self._recipe_yaml = recipe_yaml
        self._params = params
        asked = Cursor(
            uri=BESIDE if uri == default_database(self.run.path.parent) else redact(uri),
            experiment=experiment,
            model_name=checked_model_name(model_name),
            select=select,
            tags=dict(tags),
            created_ms=int(time.time() * 1000),
        )
        self._cursor = asked.continuing(Cursor.load(self.run.cursor))
        self._arrived = Sent(self.run.sent)
        self._client: MlflowClient | None = None
        self._mlflow: MlflowRun | None = None
        self._lock: IO[str] | None = None
        self._sent = False
        self._failures = 0
        self._told: set[str] = set()
        self._closing = threading.Event()
        self._deadline = math.inf
        self._end_ms: int | None = None
        self._thread = threading.Thread(target=self._follow, name="mlflow-tracker", daemon=True)

    @property
    def mlflow_run_id(self) -> str | None:
        """The id of the run in MLflow, once the server has answered."""
        return self._cursor.mlflow_run_id

    def start(self) -> None:
        """Begin to follow. MLflow is imported when there is a first record, away from the start of the workers."""
        if self._acquire():
            self._save()
        self._thread.start()

    def close(self, status: Status, deadline_s: float = 60.0, *, end_ms: int | None = None) -> bool:
        """Send the rest and end the MLflow run; call it after the last record was written.

        Args:
            status: How the run ended.
            deadline_s: When to give up, from now.
            end_ms: When the run ended, Unix milliseconds; None: now.

        Returns:
            Whether everything arrived. If not, it is still on disk and a warning says how to send it later.
        """
        self._cursor.status, self._end_ms = status, end_ms
        self._deadline = time.monotonic() + deadline_s
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(deadline_s + 1.0)
        if not self._sent:
            log.warning(
                "not everything has reached MLflow at %s (%s); it is kept on disk, send it later with: "
                "python -m pretrain.tracking %s",
                redact(self._uri),
                self.problem or "not enough time",
                self.run.path,
            )
        return self._sent

    # The thread -----------------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._sent:
            closing = self._closing.is_set()
            try:
                if self._push() and closing:
                    self._finish()
                self._recovered()
            except Exception as error:  # whatever a server, a proxy or a database does: training goes on
                self._failed(error)
                if closing and (verdict(error) == "denied" or isinstance(error, Busy)):
                    break
            if time.monotonic() >= self._deadline:
                break
            self._pause()
        if self._lock is not None:
            if not self._sent:
                self._save()  # how the run ended, for `sync`
            self._lock.close()

    def _pause(self) -> None:
        """Wait for more to do or for the server to come back; the beginning of `close` ends it."""
        delay = POLL_S
        if self._failures:
            delay = min(MAX_BACKOFF_S, 2.0 ** min(self._failures, 5)) * random.uniform(0.5, 1.0)
        if self._closing.is_set():  # a set event would not wait at all
            time.sleep(min(delay, POLL_S) if self._failures else 0.0)
        else:
            self._closing.wait(delay)

    def _push(self) -> bool:
        """Send what is on disk; True when all of it has arrived."""
        if self._mlflow is None:
            if next(self._unsent(self.run.journal, 0), None) is None:
                return True
            self._mlflow = self._bind()
        # Evaluations are read before the event log is emptied, so that the checkpoint of each is registered by then.
        evaluations = list(self._unsent(self.run.evaluations, self._cursor.evaluations_offset))
        while lines := list(self._unsent(self.run.journal, self._cursor.journal_offset)):
            self._send_journal(self._mlflow, lines)
            if time.monotonic() >= self._deadline:
                return False
        for line in evaluations:
            self._send_line(self._mlflow, line)
            self._cursor.evaluations_offset = line.end
            self._save()
        return not evaluations

    def _unsent(self, path: Path, offset: int) -> Iterator[Line]:
        # A server too slow for a full batch within its timeout gets smaller ones until one succeeds.
        return read_lines(path, offset, LINES_PER_BATCH >> min(self._failures, 5))

    def _bind(self) -> MlflowRun:
        """Make sure that we are the only sender, that the server answers, and which run on it is ours."""
        if not self._acquire():
            raise Busy(f"another process is sending {self.run.path}, its id is {holder(self.run.sender_lock)}")
        if self._client is None:
            self._client = connect(self._uri)
        cursor = self._cursor
        run = MlflowRun.bind(
            self._client, self._uri, cursor.experiment, self.run.run_id, cursor.created_ms, cursor.mlflow_run_id
        )
        if run.mlflow_run_id != cursor.mlflow_run_id:
            cursor.forget_progress()  # new to this server, or its database was replaced
            self._arrived.forget()
            cursor.mlflow_run_id = run.mlflow_run_id
            self._save()
        run.describe(self._recipe_yaml, self._params, cursor.tags)
        return run

    def _finish(self) -> None:
        assert self._cursor.status is not None
        if self._mlflow is not None:  # else there is no event: the run never began, and MLflow need not know
            self._mlflow.end(self._cursor.status, self._end_ms)
        self._save()
        self._sent = True

    def _acquire(self) -> bool:
        """Become the one process that sends this run; True if we are."""
        if self._lock is None:
            self._lock = hold(self.run.sender_lock)
        return self._lock is not None

    def _save(self) -> None:
        self._cursor.save(self.run.cursor)

    # What each record becomes ---------------------------------------------------------------------------------------

    def _send_journal(self, run: MlflowRun, lines: list[Line]) -> None:
        """Send consecutive metrics together and everything else one by one, in order."""
        metrics: list[tuple[Line, Metrics]] = []
        for line in lines:
            if isinstance(event := _read(line), Metrics):
                metrics.append((line, event))
                continue
            self._send_metrics(run, metrics)
            metrics = []
            self._send_line(run, line)
            self._cursor.journal_offset = line.end
            self._save()
        self._send_metrics(run, metrics)

    def _send_line(self, run: MlflowRun, line: Line) -> None:
        """Send what becomes of one event; park the line if we or MLflow cannot make sense of it."""
        event = _read(line)
        try:
            send = self._sender(event)
        except MALFORMED as error:
            self._park(line, error)
            return
        try:
            if send is not None:
                send(run)
        except Exception as error:
            if verdict(error) == "missing":
                run.check_exists()  # raises if the whole run is gone; else only the model was deleted
            elif verdict(error) != "invalid":
                raise
            self._park(line, error)

    def _send_metrics(self, run: MlflowRun, measured: list[tuple[Line, Metrics]]) -> None:
        if not measured:
            return
        last_step = dict(self._cursor.last_step)
        batch: list[tuple[Line, list[Point]]] = []
        for line, event in measured:
            try:
                batch.append((line, _new_points(event, last_step)))
            except MALFORMED as error:
                self._park(line, error)
        self._send_points(run, batch)
        self._cursor.last_step = last_step
        self._cursor.journal_offset = measured[-1][0].end
        self._save()

    def _send_points(self, run: MlflowRun, batch: list[tuple[Line, list[Point]]]) -> None:
        try:
            run.log_metrics([point for _, points in batch for point in points])
        except Exception as error:
            if verdict(error) != "invalid":
                raise
            if len(batch) == 1:
                self._park(batch[0][0], error)
            else:  # one bad record must not take its neighbours with it
                for item in batch:
                    self._send_points(run, [item])

    def _sender(self, event: Event | DamagedEvent | None) -> Callable[[MlflowRun], None] | None:
        """What to do about an event that is no metric; None where MLflow need not know. Raises what is damaged."""
        match event:
            case DamagedEvent():
                raise event
            case CheckpointPublished() if event.step > 0:
                return partial(self._send_checkpoint, event.step)
            case Visualizations() if (image := self.run.inside(event.path)).is_file():
                return lambda run: run.log_visualizations(image)
            case Warned():
                value = f"step {event.step}: {event.text}"[:MAX_TAG]
                return partial(MlflowRun.tag, key=f"warning/{event.about}", value=value)
            case Failed():
                return partial(MlflowRun.tag, key="error", value=event.error[:MAX_TAG])
            case EvaluationFailed() if not event.left_out and not self._is_sent(event):
                value = f"step {event.step}: {event.error}"[:MAX_TAG]
                return partial(MlflowRun.tag, key=f"eval/{event.task}/error", value=value)
            case Evaluated() if not self._is_sent(event):
                return partial(self._send_scores, event, int(event.time * 1000))
        return None

    def _is_sent(self, event: Evaluated | EvaluationFailed) -> bool:
        name, known = f"{event.step} {event.task}", self._arrived.evaluations
        if isinstance(event, EvaluationFailed) or name not in known:
            return name in known
        return known[name] in (None, event.key)  # data that have changed under their name give another result

    def _send_checkpoint(self, step: int, run: MlflowRun) -> None:
        cursor = self._cursor
        if step in self._arrived.versions:
            return
        found = self._exported(self.run.path, step)
        if found is None:
            log.warning("step %d can not be registered in MLflow; its scores are still recorded", step)
            return
        directory, location = found
        tags = {**cursor.tags, "run_id": self.run.run_id}
        version = run.register(directory, step, cursor.model_name, tags, location)
        if cursor.select is None:
            run.promote(cursor.model_name, version.version)
        else:
            run.promote_unscored(cursor.model_name, version.version, f"eval/{cursor.select}")
        self._arrived.add_version(step, version.model_id, version.version)

    def _send_scores(self, event: Evaluated, time_ms: int, run: MlflowRun) -> None:
        cursor = self._cursor
        model_id, version = self._arrived.versions.get(event.step, (None, None))
        scores = {f"eval/{event.task}/{name}": value for name, value in event.metrics.items()}
        run.log_metrics([Point(name, value, time_ms, event.step) for name, value in scores.items()], model_id)
        if version is not None:
            run.tag_version(cursor.model_name, version, {name: repr(value) for name, value in scores.items()})
            if (choice := selected(cursor.select, event)) is not None:
                metric, score = choice
                run.promote_best(cursor.model_name, version, f"eval/{cursor.select}", metric, score)
        self._arrived.add_evaluation(f"{event.step} {event.task}", event.key)

    # What can go wrong ----------------------------------------------------------------------------------------------

    def _park(self, line: Line, error: Exception) -> None:
        path = self.run.rejected
        log.warning("MLflow does not get one event, it is kept in %s: %s: %s", path, type(error).__name__, error)
        reason = f"{type(error).__name__}: {error}"
        with Journal(path) as rejected:
            rejected.write(Rejected(reason=reason, line=line.raw.decode(errors="replace")))

    def _failed(self, error: Exception) -> None:
        self._failures += 1
        self._mlflow = None  # whoever answers next may be another server: look the run up again
        reason = redact(str(error).partition("\n")[0]) or type(error).__name__
        problem, remedy = f"MLflow at {redact(self._uri)} does not take the run: {reason}", "trying again"
        if verdict(error) == "denied":
            problem = f"MLflow at {redact(self._uri)} refuses the run: {reason}"
            remedy = "check MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, and whether the run was deleted"
        if verdict(error) not in self._told:  # once per kind and outage
            self._told.add(verdict(error))
            log.warning("%s; training goes on, events wait in %s; %s", problem, self.run.path, remedy)
        self.problem = problem

    def _recovered(self) -> None:
        if self.problem is not None:
            log.info("MLflow at %s has caught up with the run", redact(self._uri))
        self._failures, self.problem = 0, None
        self._told.clear()


def sync(run_dir: Path, exported: Exported, *, uri: str | None = None, deadline_s: float = 600.0) -> bool:
    """Send what a run could not send while it ran; True when everything has arrived.

    Args:
        run_dir: `runs/RUN_ID`.
        exported: As for `Tracker`.
        uri: Where to; default: $MLFLOW_TRACKING_URI if set, else where the run was meant to go.
        deadline_s: When to give up.

    Raises:
        RequestError: The directory is not a tracked run.
    """
    run = RunDir(Path(run_dir))
    cursor = Cursor.load(run.cursor)
    if cursor is None or not run.is_run:
        expected = f"expected runs/RUN_ID with {run.cursor.name} and {RECIPE} in it"
        raise RequestError(f"{run.path}: not a tracked run; {expected}")
    recipe_yaml = run.recipe.read_text()
    tracker = Tracker(
        run.path,
        uri=uri
        or os.environ.get("MLFLOW_TRACKING_URI")
        or (default_database(run.path.parent) if cursor.uri == BESIDE else cursor.uri),
        experiment=cursor.experiment,
        recipe_yaml=recipe_yaml,
        params=written_stages(parse_yaml(recipe_yaml))[-1],
        tags=cursor.tags,
        model_name=cursor.model_name,
        select=cursor.select,
        exported=exported,
    )
    events, _ = read_events(run.journal)
    last = events[-1] if events else None
    end_ms = None if last is None else int(last.time * 1000)  # scores that a schedule adds later make no run longer
    tracker.start()
    return tracker.close(cursor.status or _ending(last), deadline_s, end_ms=end_ms)


def _ending(last: Event | None) -> Status:
    """How a run ended whose driver could not say it any more, by its last event."""
    match last:
        case Finished():
            return "FINISHED"
        case Failed():
            return "FAILED"
        case _:
            return "KILLED"


def _read(line: Line) -> Event | DamagedEvent | None:
    try:
        return line.event()
    except DamagedEvent as error:
        return error


def _new_points(event: Metrics, last_step: dict[str, int]) -> list[Point]:
    """The points beyond the steps in `last_step`, which is brought up to date."""
    time_ms = int(event.time * 1000)
    points = [Point(f"train/{name}", float(value), time_ms, event.step) for name, value in event.values.items()]
    new = [point for point in points if event.step > last_step.get(point.name, -1)]
    last_step.update({point.name: event.step for point in new})
    return new
