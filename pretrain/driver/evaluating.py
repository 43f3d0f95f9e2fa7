"""Evaluations beside training: what is due is queued, what has ended is written down.

Not here: which are due (`pretrain.known_checkpoints`), the tasks themselves (`pretrain.evaluations`), where they run
(`cluster.tasks`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pretrain.checkpoints import store
from pretrain.config.schema import EvaluationTask, Recipe
from pretrain.errors import last_line
from pretrain.evaluations import evaluate_tasks
from pretrain.known_checkpoints import KnownCheckpoints
from pretrain.record.events import Evaluated, EvaluationFailed, Visualizations, Warned
from pretrain.record.journal import Journal
from pretrain.record.pictures import Drawn, keep
from pretrain.record.run_dir import RunDir

if TYPE_CHECKING:
    from cluster.tasks import TaskQueue

__all__ = ["Evaluating", "Recorded"]

Recorded = Evaluated | EvaluationFailed | Visualizations | Warned


class Evaluating:
    """The evaluations of a run.

    Args:
        queue: Runs them.
        options: Of `evaluate_tasks`; what is changed counts for those that are queued afterwards.
        recipe: Says on which data.
        run_dir: Keeps what comes of them.
        known: Says which are due; told of every end.
        show: Told of every end as well, for people.
    """

    def __init__(
        self,
        queue: TaskQueue,
        options: dict[str, Any],
        recipe: Recipe,
        run_dir: RunDir,
        known: KnownCheckpoints,
        show: Callable[[Recorded], None],
    ) -> None:
        self.options = options
        self._queue, self._recipe, self._run_dir, self._known, self._show = queue, recipe, run_dir, known, show

    def queue_due(self) -> None:
        """What is due by now: the tasks of a checkpoint on one data set share a process, and so their features."""
        groups: dict[tuple[store.Published, str], list[EvaluationTask]] = {}
        for checkpoint, task in self._known.take_due().values():
            groups.setdefault((checkpoint, task.data), []).append(task)
        for (checkpoint, _), tasks in groups.items():
            self._submit(checkpoint, *tasks)
        self._known.prune()

    def _submit(self, checkpoint: store.Published, *tasks: EvaluationTask) -> None:
        data = self._recipe.evaluation.data[tasks[0].data]
        arguments = (checkpoint.location, checkpoint.step, tasks, data, self._recipe.storage)
        self._queue.submit((checkpoint, tasks), evaluate_tasks, *arguments, **self.options)

    def collect(self) -> None:
        """Write down the evaluations that have ended; a failed one is recorded and stops nothing."""
        for (checkpoint, tasks), events, error in self._queue.finished():
            if error is None:
                for event in events:
                    self._record(keep(self._run_dir, event) if isinstance(event, Drawn) else event)
            elif len(tasks) > 1:
                # The process died, and nobody knows of which task: each has one of its own now. Scores are found again.
                for task in tasks:
                    self._submit(checkpoint, task)
            else:
                of = {"step": checkpoint.step, "protocol": tasks[0].protocol, "data": tasks[0].data}
                self._record(EvaluationFailed(**of, error=last_line(error)))

    def _record(self, event: Recorded) -> None:
        with Journal(self._run_dir.evaluations) as journal:
            journal.write(event)
        self._show(event)
        self._known.see(event)
        self._known.prune()
