"""The driver of a run: starts Ray and the workers, follows their events, has checkpoints evaluated, prunes, reports.

The driver computes nothing. Workers write events and publish checkpoints; the driver reads the events and reacts.
If it dies, nothing is lost: `pretrain resume RUN_ID` starts another one, which catches up on training and evaluations.

What is not here: the training loop (`pretrain.worker`), placement (`cluster`), MLflow (`pretrain.tracking.sync`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.authentication import AuthenticationProblem
from cluster.connect import AlreadyConnected, NotStarted
from data_pipelines.cores import usable_cores
from data_pipelines.files import cache_root, write_atomically
from data_pipelines.storage.locations import redact
from pretrain.checkpoints import copies, store
from pretrain.config.stages import Plan, plan_yaml
from pretrain.config.worlds import worlds
from pretrain.driver.evaluating import Evaluating, Recorded
from pretrain.driver.failures import FATAL, restart_reason, told
from pretrain.driver.placement import given_address, gpus_per_worker, only_driver
from pretrain.driver.remote_record import RemoteRecord
from pretrain.driver.trackers import open_mirrors, tracker_of
from pretrain.driver.train_worker import train_worker
from pretrain.driver.watching import Watch
from pretrain.errors import RequestError, RunFailed, RunStopped, last_line, said_by_system
from pretrain.known_checkpoints import KnownCheckpoints
from pretrain.record.events import (
    CheckpointPublished,
    Evaluated,
    Event,
    Failed,
    Finished,
    Start,
    Stopped,
    Visualizations,
)
from pretrain.record.interrupts import heard
from pretrain.record.journal import Journal, read_events
from pretrain.record.run_dir import SIGNALLED, RunDir, resume_command, shown_run, stopped_line
from pretrain.reporting.summary import TrainingSoFar, print_summary
from pretrain.reporting.terminal import Terminal, finished_line

if TYPE_CHECKING:
    from cluster.connect import Cluster
    from cluster.tasks import TaskQueue
    from cluster.workers import End
    from pretrain.tracking.sync import Status

__all__ = ["Driver", "OnStart", "RunResult"]

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


class Driver:
    """Drives one run, from connecting to Ray to the closing table."""

    def __init__(self, plan: Plan, run_dir: RunDir, launched: float) -> None:
        self.plan, self.run_dir, self.launched = plan, run_dir, launched
        self.recipe = plan.recipe  # what is asked of it below is the same in all stages
        self.terminal = Terminal(plan, run_dir=run_dir.path)
        self.known = KnownCheckpoints(plan, run_dir.path)
        self._remote = RemoteRecord(run_dir)
        self._trained = TrainingSoFar(launched=launched)
        self._last_event: Event | None = None
        self._offset = 0
        self._is_training = False  # from the first event of the workers to their end
        self._has_workers = False  # since they last said that they begin, until they are started again
        self._stop_asked: float | None = None  # when, by the monotonic clock

    def drive(self, on_start: OnStart | None = None) -> RunResult:
        """Everything from connecting to Ray to the closing table."""
        self.run_dir.logs.mkdir(exist_ok=True)
        with only_driver(self.run_dir), self._remote:
            return self._drive(on_start)

    def _drive(self, on_start: OnStart | None) -> RunResult:
        with self.terminal, heard(self._on_signal) as listen_again:
            if on_start is not None:
                on_start(self.run_dir.path)
            self.run_dir.take_back_requests()  # they were for the workers that have ended
            self.run_dir.training.unlink(missing_ok=True)  # of a driver that was killed
            self.terminal.say(f"run {self.run_dir.run_id} in {shown_run(self.run_dir)}")
            for event in read_events(self.run_dir.evaluations)[0]:
                self.known.see(event)
            self.known.look()
            if not self.run_dir.recipe.exists():
                self._write_recipe()
            tracker = tracker_of(self.plan, self.run_dir)
            status: Status | None = None
            self._mirrors = open_mirrors(self.plan, self.run_dir, self.known.scores)
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
            except AuthenticationProblem as error:
                raise RequestError(f"cluster.address={given_address(self.recipe)}: {error}") from None
            except ConnectionError as error:
                if status is not None:  # connected once: a lost cluster, not a wrong address
                    message = f"lost the cluster; go on with: {resume_command(self.run_dir)}"
                    raise RunFailed(message, self.run_dir.logs) from error
                raise RequestError(
                    f"cluster.address={given_address(self.recipe)}: no Ray answers there ({last_line(error)})"
                ) from None
            except AlreadyConnected as error:
                raise RequestError(str(error)) from None
            except NotStarted as error:
                raise RunStopped(f"{error}; the same command tries it again") from None
            except KeyboardInterrupt:
                _ask_for_signal(self.run_dir.stop_now_request)
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
        address = given_address(self.recipe)
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
        share = gpu_share(cluster, trainer_gpus=trainer_gpus, tasks=slots)
        queue = TaskQueue(cluster, at_once=slots, gpus_per_task=share)
        options = {
            "device": None if queue.gpus_per_task else "cpu",
            "threads": max(1, (usable_cores() if cluster.private else 1) // slots),  # of a cluster, others have theirs
            "training": str(self.run_dir.training),
            "half_features": self.recipe.evaluation.half_features,
            "told": str(self.run_dir.evaluations_log),
        }
        evaluating = self._evaluating(queue, options)
        # The evaluations of the last checkpoint then have the GPUs that the trainers leave.
        last_ones_wait = cluster.private and cluster.num_gpus > 0 and not queue.gpus_per_task
        group = WorkerGroup(
            sizes=worlds(self.plan),
            cpus_per_worker=self.recipe.cluster.cpus_per_worker,
            gpus_per_worker=gpus_per_worker,
            max_failures=self.recipe.train.max_failures,
            fatal=FATAL,
        )
        place = {"run_dir": str(self.run_dir.path), "cache": str(cache_root()) if self._remote.uri else None}
        arguments: dict[str, Any] = {"plan": self.plan, **place}
        watch = Watch(self.run_dir, self.recipe.train.hang_after_s)

        def starting() -> None:
            """The first workers count the time of their start from the command, later ones from here."""
            watch.starting()
            arguments["launched"] = time.time() if "launched" in arguments else self.launched

        def train() -> None:
            self.run_dir.training.touch()
            try:
                run_workers(
                    cluster,
                    train_worker,
                    arguments,
                    group,
                    progress=self._newest_step,
                    starting=starting,
                    restarting=self._say_restart,
                    watch=watch,
                )
            finally:
                self.run_dir.training.unlink(missing_ok=True)

        training = _Background(train)
        # Without slots of their own evaluations take CPUs that workers ask for: they wait until those have begun.
        trainers_first = not cluster.has_evaluation_slots
        queue.held = trainers_first and not self._is_trained()
        if not (last_ones_wait and self._is_trained()):
            evaluating.queue_due()
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
            self._heed_files(is_training)
            is_training = training.is_alive()  # asked first: the events are read once more after its end
            is_new = self._follow()
            if last_ones_wait and not is_training:
                last_ones_wait, is_new = False, True
                queue.gpus_per_task = gpu_share(cluster, trainer_gpus=0.0, tasks=slots)
                evaluating.options["device"] = None
            queue.held = trainers_first and is_training and not self._has_workers
            if is_new and not (last_ones_wait and self._is_trained()):
                evaluating.queue_due()
            evaluating.collect()
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
            raise RunFailed(f"training failed: {told(training.error)}", self.run_dir.logs)

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
                self._is_training = self._has_workers = True
                self._write_recipe()
        has_news = any(isinstance(event, Start | CheckpointPublished | Finished) for event in new)
        if has_news:
            self._remote.wake()
        return has_news

    def _evaluating(self, queue: TaskQueue, options: dict[str, Any]) -> Evaluating:
        def show(event: Recorded) -> None:
            if isinstance(event, Evaluated | Visualizations):
                self._mirrors.show([event])
            self.terminal.show(event)
            self._remote.wake()

        return Evaluating(queue, options, self.recipe, self.run_dir, self.known, show)

    def _is_trained(self) -> bool:
        return self.known.newest_step >= self.plan.total_steps

    def _newest_step(self) -> int:
        """By a look at the storage: workers that have just died may have published without telling."""
        newest = store.latest(self.run_dir.path)
        return -1 if newest is None else newest.step

    def _say_restart(self, end: End, pause_s: float) -> None:
        self._has_workers = False
        wait = f" in {pause_s:.0f} s" if pause_s else ""
        self.terminal.say(f"{restart_reason(end)}; the workers start again{wait}")

    def _gpus_per_worker(self, cluster: Cluster) -> float:
        if self._is_trained() and self.recipe.cluster.gpus_per_worker is None:
            return 0.0
        gpus, note = gpus_per_worker(cluster, self.recipe)
        if note is not None:
            self.terminal.say(note)
        return gpus

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
        _ask_for_signal(self.run_dir.stop_request)
        self.terminal.say("stopping after the next step, with a checkpoint; again to end at once")

    def _heed_files(self, is_training: bool) -> None:
        """What was asked by a file. Workers see `stop` themselves; evaluations of what they have left are not begun.

        Raises:
            KeyboardInterrupt: To end at once.
            RunFailed: Another machine drives the run.
        """
        self._remote.look()
        if self.run_dir.stop_now_request.exists():
            self.terminal.say("ending at once, as asked: closing what is open")
            raise KeyboardInterrupt
        if not is_training and self._stop_asked is None and self.run_dir.stop_request.exists():
            self._stop_asked = time.monotonic()

    def _record_failure(self, error: BaseException) -> None:
        try:
            self.run_dir.driver_log.write_text(redact(f"{error}\n", marked=True))
        except OSError as problem:  # a full disk is what may have ended the run; the line that says so must not be lost
            self.terminal.say(f"the log of the failure could not be written: {said_by_system(problem)}")
        with Journal(self.run_dir.journal) as journal:
            journal.write(Failed(error=told(error)))

    def _finish(self) -> RunResult:
        from pretrain.reporting.page import write_report

        report = write_report(self.run_dir.path)
        print_summary(self.terminal.console, self.recipe, self.run_dir.path, self._trained, self.known.scores, report)
        last = dict(self._trained.last.values) if self._trained.last else {}
        for event in sorted(self.known.scores, key=lambda event: event.step):
            last.update({f"{event.task}/{name}": value for name, value in event.metrics.items()})
        newest = store.latest(self.run_dir.path)
        return RunResult(self.run_dir.run_id, self.run_dir.path, copies.local(newest) if newest else None, last)


def _ask_for_signal(request: Path) -> None:
    """Make the file of a request, unless a person has; on a full disk it does not say that a signal asks."""
    if not request.exists():
        request.touch()
        with suppress(OSError):
            request.write_text(SIGNALLED)


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
