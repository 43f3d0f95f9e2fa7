"""The driver of a run: starts Ray and the workers, follows their events, queues evaluations, prunes, reports.

The driver computes nothing. Workers write events and publish checkpoints; the driver reads the events and reacts.
If it dies, nothing is lost: `pretrain resume RUN_ID` starts another one, which catches up on training and evaluations.

What is not here: the training loop (`pretrain.worker`), placement (`cluster`), MLflow (`pretrain.tracking.sync`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.connect import AlreadyConnected
from data_pipelines.files import write_atomically
from data_pipelines.storage.locations import redact, redacted
from pretrain.checkpoints import copies, store
from pretrain.checkpoints.initialization import checked_plan
from pretrain.config.load import load_for_resume
from pretrain.config.schema import EvaluationTask, Recipe
from pretrain.config.stages import Plan, plan_yaml
from pretrain.errors import RequestError, RunFailed, RunStopped, last_line, said_by_system
from pretrain.evaluations import evaluate_tasks
from pretrain.known_checkpoints import KnownCheckpoints
from pretrain.machine import misfit, this_machine
from pretrain.record.disk import DiskFull, naming_disk
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    EvaluationFailed,
    Event,
    Failed,
    Finished,
    Start,
    Stopped,
)
from pretrain.record.interrupts import heard
from pretrain.record.journal import Journal, read_events
from pretrain.record.lock import hold, holder
from pretrain.record.run_dir import RunDir, find_run, resume_command, stopped_line
from pretrain.reporting.progress import shown_while
from pretrain.reporting.summary import TrainingSoFar, print_summary
from pretrain.reporting.terminal import Terminal, finished_line
from pretrain.screen import say
from pretrain.training.schedules import schedules_line

if TYPE_CHECKING:
    from cluster.connect import Cluster
    from cluster.tasks import TaskQueue
    from cluster.workers import End
    from pretrain.tracking.also import Mirrors
    from pretrain.tracking.sync import Status

__all__ = ["RunResult", "resume", "run", "train_worker"]

POLL_S = 0.2
ECHO_S = 1.0
NODES_EVERY_S = 5.0


@dataclass(frozen=True)
class RunResult:
    """What a run leaves.

    Attributes:
        run_id: Its name under the storage directory.
        run_dir: Its directory.
        checkpoint: The newest checkpoint.
        metrics: Last value of each training metric, and of each score as `PROTOCOL/DATA/METRIC`.
    """

    run_id: str
    run_dir: Path
    checkpoint: Path | None
    metrics: dict[str, float]


OnStart = Callable[[Path], None]


def run(recipe: Plan | Recipe | str, overrides: Sequence[str] = (), *, on_start: OnStart | None = None) -> RunResult:
    """Train, evaluate and record a new run.

    Args:
        recipe: A resolved recipe or plan of stages, or the name or file of one.
        overrides: `key=value` texts for a recipe given by name.
        on_start: Called with the run's directory before anything is started.

    Raises:
        RequestError: The recipe is wrong.
        RunFailed: Training failed more often than `train.max_failures`.
        RunStopped: SIGTERM or Ctrl-C ended it, after a checkpoint of the step that was at work.
    """
    if isinstance(recipe, str):
        from pretrain.photos import load

        recipe = load(recipe, overrides)
    plan = Plan.single(recipe) if isinstance(recipe, Recipe) else recipe
    launched = time.time()
    _require_room_for_workers(plan.recipe)
    run_id = f"{plan.recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    run_dir = RunDir(Path(plan.recipe.storage) / run_id)
    plan = checked_plan(plan, run_dir.path)
    # A cluster may be long in giving workers a place, and a teacher may not fit; of other runs the workers look.
    if _address(plan.recipe) or any(stage.recipe.teacher_from is not None for stage in plan.stages):
        with shown_while("looking at the model and the data"):
            from pretrain.training.preflight import look_ahead  # imports torch

            look_ahead(plan)
    new = [folder for folder in run_dir.path.parents if not folder.exists()]
    run_dir.path.mkdir(parents=True)
    try:
        return _Driver(plan, run_dir, launched).drive(on_start)
    except (RequestError, RunStopped):
        if not run_dir.journal.exists():  # what never began leaves nothing behind; a run that began is never deleted
            shutil.rmtree(run_dir.path)
            with suppress(OSError):  # another run has been put there meanwhile
                for folder in new:
                    folder.rmdir()
        raise


def resume(
    run_id: str,
    storage: str | os.PathLike[str] = "runs",
    overrides: Sequence[str] = (),
    *,
    on_start: OnStart | None = None,
) -> RunResult:
    """Go on with a run from its newest complete checkpoint, with the recipe it was started with.

    Args:
        run_id: Name of the run.
        storage: Directory of the runs.
        overrides: `key=value` texts for what may change, such as `train.workers=1`; kept for later resumes.
        on_start: Called with the run's directory before anything is started.

    Raises:
        RequestError: There is no such run, another process drives it, or an override is not allowed.
        RunFailed, RunStopped: As for `run`.
    """
    launched = time.time()
    run_dir = find_run(run_id, Path(storage).absolute())
    plan = load_for_resume(run_dir.recipe, overrides)
    if any(text.startswith(("train.steps=", "train.epochs=")) for text in overrides):
        newest = store.latest(run_dir.path)
        done = newest.step if newest else 0
        if plan.total_steps < done:
            raise RequestError(
                f"train.steps={plan.total_steps}: {done} steps of the run are done; give that many or more"
            )
        before = load_for_resume(run_dir.recipe, ())
        if before.total_steps != plan.total_steps:
            say(schedules_line(before.recipe, plan.recipe, done))
    _require_room_for_workers(plan.recipe)
    plan = checked_plan(plan, run_dir.path)
    return _Driver(plan, run_dir, launched).drive(on_start)


def train_worker(settings: dict[str, Any]) -> None:
    """What Ray runs on each worker: the same loop as under torchrun, with its output in the run's log files.

    Raises:
        RequestError: On rank 0 of a run that is to begin, before it has written anything: the model or the data refuse
            it. A worker looks at them since it imports torch anyway.
    """
    placed = time.time()
    run_dir = RunDir(Path(settings["run_dir"]))
    with run_dir.worker_log(int(os.environ["RANK"])).open("a") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    from pretrain.training.preflight import look_ahead, size_line
    from pretrain.worker import train

    is_new = os.environ["RANK"] == "0" and not run_dir.journal.exists()
    try:
        size = size_line(look_ahead(settings["plan"])) if is_new else ""
        with naming_disk(run_dir.path, "what belongs to the run"):
            train(settings["plan"], run_dir.path, size=size, launched=settings["launched"], placed=placed)
    except BaseException:
        traceback.print_exc()  # into the log; the driver gets the exception as well
        raise


class _Driver:
    def __init__(self, plan: Plan, run_dir: RunDir, launched: float) -> None:
        self.plan, self.run_dir, self.launched = plan, run_dir, launched
        self.recipe = plan.recipe  # what is asked of it below is the same in all stages
        self.terminal = Terminal(plan, run_dir=run_dir.path)
        self.known = KnownCheckpoints(plan, run_dir.path)
        self._trained = TrainingSoFar(launched=launched)
        self._last_event: Event | None = None
        self._offset = 0
        self._evaluation_options: dict[str, Any] = {}  # known when Ray is connected
        self._is_training = False  # from the first event of the workers to their end
        self._stop_asked: float | None = None  # when, by the monotonic clock

    def drive(self, on_start: OnStart | None = None) -> RunResult:
        """Everything from connecting to Ray to the closing table."""
        self.run_dir.logs.mkdir(exist_ok=True)
        with _only_driver(self.run_dir), self.terminal, heard(self._on_signal) as listen_again:
            if on_start is not None:
                on_start(self.run_dir.path)
            self.run_dir.stop_request.unlink(missing_ok=True)  # it was for the workers that it has stopped
            self.run_dir.training.unlink(missing_ok=True)  # of a driver that was killed
            self.terminal.say(f"run {self.run_dir.run_id} in {self.run_dir.path}")
            for event in read_events(self.run_dir.evaluations)[0]:
                self.known.see(event)
            self.known.look()
            if not self.run_dir.recipe.exists():
                self._write_recipe()
            tracker = self._tracker()
            status: Status | None = None
            self._mirrors = self._open_mirrors()
            try:
                self._follow(show=False)  # a resumed run: what happened before
                if self._is_trained() and not self.known.due:
                    self.terminal.say(finished_line(self.plan, resume_command(self.run_dir)))
                    self._write_recipe()
                    self.known.prune()
                    tracker.start()
                else:
                    self.terminal.wait_for(self._place())
                    with self._cluster() as cluster:
                        listen_again()  # Ray has put its own handler in place of ours
                        gpus = self._gpus_per_worker(cluster)
                        tracker.start()
                        status = "KILLED"
                        self._train_and_evaluate(cluster, gpus)
                status = "FINISHED"
            except RunFailed:
                status = "FAILED"
                raise
            except ConnectionError as error:
                if status is not None:  # connected once: a lost cluster, not a wrong address
                    message = f"lost the cluster; go on with: {resume_command(self.run_dir)}"
                    raise RunFailed(message, self.run_dir.logs) from error
                raise RequestError(
                    f"cluster.address={_address(self.recipe)}: no Ray answers there ({last_line(error)})"
                ) from None
            except AlreadyConnected as error:
                raise RequestError(str(error)) from None
            except KeyboardInterrupt:
                raise RunStopped(self._stopped_at_once()) from None
            finally:
                self.run_dir.training.unlink(missing_ok=True)  # of workers that a signal ended while they began
                self._mirrors.close()
                if status is not None and not tracker.close(status):
                    self.terminal.say(f"MLflow has not received everything yet: {tracker.problem}")
        with heard(lambda: None):  # all is done but to say it
            return self._finish()

    def _stopped_at_once(self) -> str:
        """What there is to go on with."""
        if self.known.newest_step > 0 or store.latest(self.run_dir.path) is not None:
            return f"stopped at once; go on with: {resume_command(self.run_dir)}"
        if self.run_dir.journal.exists():
            return f"stopped before the first checkpoint; this begins at step 0 again: {resume_command(self.run_dir)}"
        return "stopped before the first step: nothing was trained; the same command begins again"

    def _write_recipe(self) -> None:
        """Also what a resume changed, once that has begun: what is taken back before leaves nothing behind."""
        write_atomically(self.run_dir.recipe, plan_yaml(self.plan).encode())

    def _place(self) -> str:
        address = _address(self.recipe)
        return f"connecting to Ray at {redact(address)}" if address else "starting Ray"

    def _cluster(self) -> AbstractContextManager[Cluster]:
        from cluster.connect import connect

        settings, workers = self.recipe.cluster, self.recipe.train.workers
        return connect(
            settings.address,
            num_cpus=max(1, workers * settings.cpus_per_worker),
            num_gpus=None if settings.gpus_per_worker is None else workers * settings.gpus_per_worker,
            evaluation_slots=self.recipe.evaluation.slots,
        )

    def _train_and_evaluate(self, cluster: Cluster, gpus_per_worker: float) -> None:
        from cluster.connect import is_alive
        from cluster.tasks import TaskQueue, gpu_share
        from cluster.workers import WorkerGroup, run_workers

        slots = self.recipe.evaluation.slots
        trainer_gpus = self.recipe.train.workers * gpus_per_worker
        queue = TaskQueue(cluster, gpus_per_task=gpu_share(cluster, trainer_gpus=trainer_gpus, tasks=slots))
        self._evaluation_options = {
            "device": None if queue.gpus_per_task else "cpu",
            "threads": max(1, cluster.spare_cores // slots),
            "training": str(self.run_dir.training),
        }
        # The evaluations of the last checkpoint then have the GPUs that the trainers leave.
        last_ones_wait = cluster.private and cluster.num_gpus > 0 and not queue.gpus_per_task
        group = WorkerGroup(
            num_workers=self.recipe.train.workers,
            cpus_per_worker=self.recipe.cluster.cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            max_failures=self.recipe.train.max_failures,
            fatal=(RequestError, ValueError, ArithmeticError, DiskFull, store.CheckpointError),
        )
        arguments = {"plan": self.plan, "run_dir": str(self.run_dir.path), "launched": self.launched}

        def train() -> None:
            self.run_dir.training.touch()
            try:
                run_workers(
                    cluster, train_worker, arguments, group, progress=self._newest_step, restarting=self._say_restart
                )
            finally:
                self.run_dir.training.unlink(missing_ok=True)

        training = _Background(train)
        if not (last_ones_wait and self._is_trained()):
            self._queue_evaluations(queue)
        if not self._is_trained():
            self.terminal.wait_for(f"starting workers: {self.recipe.train.workers}")
            training.start()
        else:
            self._write_recipe()
        is_training, looked = True, time.monotonic()
        while is_training or (queue.pending and self._stop_asked is None):
            if time.monotonic() - looked > NODES_EVERY_S:
                looked = time.monotonic()
                if not is_alive(cluster):
                    died = RunFailed(f"Ray has died; go on with: {resume_command(self.run_dir)}", self.run_dir.logs)
                    self._record_failure(died)
                    raise died
            is_training = training.is_alive()  # asked first: the events are read once more after its end
            is_new = self._follow()
            if last_ones_wait and not is_training:
                last_ones_wait, is_new = False, True
                queue.gpus_per_task = gpu_share(cluster, trainer_gpus=0.0, tasks=slots)
                self._evaluation_options["device"] = None
            if is_new and not (last_ones_wait and self._is_trained()):
                self._queue_evaluations(queue)
            self._collect(queue)
            time.sleep(POLL_S)
            self._is_training = self._is_training and is_training
            if not is_training and queue.pending and self._stop_asked is None:
                self.terminal.wait_for("running the last evaluations")
        if isinstance(self._last_event, Stopped):
            raise RunStopped(stopped_line(self.run_dir, self._last_event.step))
        if training.error is None and queue.pending:
            done = "stopped before the last evaluations, all steps are done"
            raise RunStopped(f"{done}; go on with: {resume_command(self.run_dir)}")
        if training.error is not None:
            refused = training.error.__cause__
            if isinstance(refused, RequestError) and not self.run_dir.journal.exists():
                raise refused
            store.discard_unpublished(self.run_dir.path)
            self._record_failure(training.error)
            raise RunFailed(f"training failed: {last_line(training.error)}", self.run_dir.logs)

    def _follow(self, *, show: bool = True) -> bool:
        """Read what the workers have written since the last call; returns whether it may tell of checkpoints."""
        new, self._offset = read_events(self.run_dir.journal, self._offset)
        self._mirrors.show(new)
        for event in new:
            self._trained.add(event)
            self._last_event = event
        for event in new if show else ():
            self.terminal.show(event)
            self.known.see(event)
            if isinstance(event, Start):
                self._is_training = True
                self._write_recipe()
        return any(isinstance(event, Start | CheckpointPublished | Finished) for event in new)

    def _queue_evaluations(self, queue: TaskQueue) -> None:
        """What is due by now: the tasks of a checkpoint on one data set share a process, and so their features."""
        groups: dict[tuple[store.Published, str], list[EvaluationTask]] = {}
        for checkpoint, task in self.known.take_due().values():
            groups.setdefault((checkpoint, task.data), []).append(task)
        for (checkpoint, _), tasks in groups.items():
            self._submit(queue, checkpoint, *tasks)
        self.known.prune()

    def _submit(self, queue: TaskQueue, checkpoint: store.Published, *tasks: EvaluationTask) -> None:
        data = self.recipe.evaluation.data[tasks[0].data]
        arguments = (checkpoint.location, checkpoint.step, tasks, data, self.recipe.storage)
        queue.submit((checkpoint, tasks), evaluate_tasks, *arguments, **self._evaluation_options)

    def _collect(self, queue: TaskQueue) -> None:
        """Write down the evaluations that have ended; a failed one is recorded and stops nothing."""
        for (checkpoint, tasks), events, error in queue.finished():
            if error is None:
                for event in events:
                    self._record(event)
            elif len(tasks) > 1:
                # The process died, and nobody knows of which task: each has one of its own now. Scores are found again.
                for task in tasks:
                    self._submit(queue, checkpoint, task)
            else:
                of = {"step": checkpoint.step, "protocol": tasks[0].protocol, "data": tasks[0].data}
                self._record(EvaluationFailed(**of, error=last_line(error)))

    def _record(self, event: Evaluated | EvaluationFailed) -> None:
        if isinstance(event, Evaluated):
            self._mirrors.show([event])
        with Journal(self.run_dir.evaluations) as journal:
            journal.write(event)
        self.terminal.show(event)
        self.known.see(event)
        self.known.prune()

    def _is_trained(self) -> bool:
        return self.known.newest_step >= self.plan.total_steps

    def _newest_step(self) -> int:
        """By a look at the storage: workers that have just died may have published without telling."""
        newest = store.latest(self.run_dir.path)
        return -1 if newest is None else newest.step

    def _say_restart(self, end: End, pause_s: float) -> None:
        wait = f" in {pause_s:.0f} s" if pause_s else ""
        self.terminal.say(f"{end.reason}; the workers start again{wait}")

    def _gpus_per_worker(self, cluster: Cluster) -> float:
        """As the recipe says, or as many as there are for each.

        Raises:
            RequestError: There are some, but too few.
        """
        from cluster.connect import gpus_per_worker

        wanted = self.recipe.cluster.gpus_per_worker
        if wanted is not None or self._is_trained():
            return wanted or 0.0
        try:
            gpus, note = gpus_per_worker(cluster, self.recipe.train.device, self.recipe.train.workers)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if note is not None:
            self.terminal.say(note)
        return gpus

    def _tracker(self) -> Any:
        from pretrain.tracking.client import default_uri
        from pretrain.tracking.sync import Tracker

        tags = {"objective": self.recipe.objective.name, "backbone": self.recipe.backbone.name, **_git_tags()}
        if len(self.plan.stages) > 1:  # parameters are those of the last one
            tags["stages"] = ", ".join(f"{stage.name} ({stage.recipe.train.steps} steps)" for stage in self.plan.stages)
        return Tracker(
            self.run_dir.path,
            uri=default_uri(Path(self.recipe.storage)),
            experiment=self.recipe.tracking.experiment,
            recipe_yaml=plan_yaml(self.plan),
            params=redacted(asdict(self.recipe)),
            tags=tags,
            model_name=self.recipe.tracking.model_name or self.recipe.name,
            select=self.recipe.evaluation.select,
            exported=copies.exported,
        )

    def _open_mirrors(self) -> Mirrors:
        """The trackers beside MLflow, which know the scores of before."""
        from pretrain.tracking.also import Mirrors

        tracking, settings = self.recipe.tracking, redacted(asdict(self.recipe))
        mirrors = Mirrors(tracking.also, self.run_dir.path, tracking.experiment, settings)
        mirrors.show(self.known.scores)
        return mirrors

    def _on_signal(self) -> None:
        """While steps are trained, let the workers end after the next one; in any other moment, or asked again, end.

        Raises:
            KeyboardInterrupt: To end at once.
        """
        now = time.monotonic()
        if self._stop_asked is not None and now - self._stop_asked < ECHO_S:
            return  # sent to the whole process group: it came directly and through the parent process
        if self._stop_asked is not None or not self._is_training:
            self.terminal.say("ending at once: closing what is open")
            raise KeyboardInterrupt
        self._stop_asked = now
        self.run_dir.stop_request.touch()
        self.terminal.say("stopping after the next step, with a checkpoint; again to end at once")

    def _record_failure(self, error: BaseException) -> None:
        try:
            self.run_dir.driver_log.write_text(redact(f"{error}\n", marked=True))
        except OSError as problem:  # a full disk is what may have ended the run; the line that says so must not be lost
            self.terminal.say(f"the log of the failure could not be written: {said_by_system(problem)}")
        with Journal(self.run_dir.journal) as journal:
            journal.write(Failed(error=last_line(error)))

    def _finish(self) -> RunResult:
        from pretrain.reporting.page import write_report

        report = write_report(self.run_dir.path)
        print_summary(self.terminal.console, self.recipe, self.run_dir.path, self._trained, self.known.scores, report)
        last = dict(self._trained.last.values) if self._trained.last else {}
        for event in sorted(self.known.scores, key=lambda event: event.step):
            last.update({f"{event.task}/{name}": value for name, value in event.metrics.items()})
        newest = store.latest(self.run_dir.path)
        return RunResult(self.run_dir.run_id, self.run_dir.path, copies.local(newest) if newest else None, last)


def _require_room_for_workers(recipe: Recipe) -> None:
    """Warn of workers that are many on this machine, which a private Ray would start without a word.

    Raises:
        RequestError: There are so many that it cannot be meant, or not the GPUs that they need.
    """
    found = misfit(recipe, this_machine())
    if found is not None and found.is_refused:
        raise RequestError(found.text)
    if found is not None:
        say(f"warning: {found.text}", err=True)


def _address(recipe: Recipe) -> str | None:
    """Of the cluster that a run is for; None: a private Ray."""
    return recipe.cluster.address or os.environ.get("RAY_ADDRESS")


class _Background(threading.Thread):
    """A function in a thread, with its exception."""

    def __init__(self, function: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._function = function
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._function()
        except BaseException as error:
            self.error = error


@contextmanager
def _only_driver(run_dir: RunDir) -> Iterator[None]:
    """Hold the run's lock: two drivers would train into the same checkpoints."""
    lock = hold(run_dir.driver_lock)
    if lock is None:
        raise RequestError(f"run {run_dir.run_id} is already driven by process {holder(run_dir.driver_lock)}")
    with lock:
        yield


def _git_tags() -> dict[str, str]:
    """Commit of the working directory, if it is in a repository."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": answer.stdout.strip(), "git.dirty": str(bool(dirty.stdout.strip())).lower()}
