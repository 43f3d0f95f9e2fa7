"""What the driver of a run knows of its checkpoints: which there are, which can be resumed from, what they are worth.

It is kept in memory and brought up to date by the events of the run, so that neither a checkpoint nor an evaluation
costs more because there were thousands before. The storage, which may be a remote one, is listed by `look` only: when a
driver begins, when a group of workers begins, since one that died may have published without telling, and when training
has finished, since a full disk costs events.

What is assumed between two looks: nobody but the workers publishes, which they tell by an event, and nobody but this
object removes training states. Who deletes checkpoints by hand meanwhile deletes no more than those: before a training
state is removed, the newer ones, which the run would go on from in its place, are looked at.

Not here: which evaluations are due and which training states are kept (`pretrain.evaluations`), running evaluations
(`pretrain.driver`), the files (`pretrain.checkpoints.store`).
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from pretrain.checkpoints import store
from pretrain.config.schema import EvaluationTask
from pretrain.config.stages import Plan
from pretrain.evaluations import due, retention
from pretrain.record.events import CheckpointPublished, Evaluated, EvaluationFailed, Event, Finished, Start
from pretrain.record.scores import Ranking

__all__ = ["KnownCheckpoints", "Label"]

Label = tuple[int, str, str]  # of an evaluation: step, protocol, data


class KnownCheckpoints:
    """The checkpoints of one run. It knows none before `look`.

    Args:
        plan: Of the run.
        run_dir: Its directory.

    Attributes:
        scores: All that `see` was told, in this order.
        due: Evaluations that are to be made and were not taken yet: what to evaluate, and how.
    """

    def __init__(self, plan: Plan, run_dir: Path) -> None:
        self._plan, self._run_dir = plan, run_dir
        self.scores: list[Evaluated] = []
        self.due: dict[Label, tuple[store.Published, EvaluationTask]] = {}
        self._scored: set[Label] = set()  # or left out of their suites
        self._ranking = Ranking(plan.recipe.evaluation.select)
        self._found: dict[int, store.Published] = {}
        self._trained: list[int] = []  # steps of all but the random backbone, ascending
        self._resumable: set[int] = set()  # those that still have a training state
        self._at_work: Counter[int] = Counter()  # step -> its evaluations that were taken and have not ended
        self._idle: set[int] = set()  # resumable steps without any: `prune` looks at no others
        self._half_removed: set[int] = set()  # of a process that died while it removed their training states

    @property
    def newest_step(self) -> int:
        """Of the checkpoints that can be resumed from; -1 without one."""
        return next(self._newest(), -1)

    def look(self) -> None:
        """List the storage and take in what has appeared or vanished."""
        listed = store.survey(self._run_dir)
        for step in self._found.keys() - {each.found.step for each in listed}:
            self._forget(step)
        for each in listed:
            if each.found.step not in self._found:
                self._add(each.found, has_training_state=each.has_training_state)
        self._half_removed = {each.found.step for each in listed if each.is_half_removed}

    def see(self, event: Event) -> None:
        """Take in what an event tells; most tell nothing about checkpoints."""
        match event:
            case Start() | Finished():
                self.look()
            case CheckpointPublished():
                found = store.published_by_event(self._run_dir, event.step)
                self._add(found, has_training_state=found.has_training_state)
            case Evaluated():
                label = (event.step, event.protocol, event.data)
                self.scores.append(event)
                self._scored.add(label)
                self._ranking.add(event)
                self.due.pop(label, None)
                self._ended(event.step)
            case EvaluationFailed():
                if event.left_out:
                    self._scored.add((event.step, event.protocol, event.data))
                    self.due.pop((event.step, event.protocol, event.data), None)
                self._ended(event.step)

    def take_due(self) -> dict[Label, tuple[store.Published, EvaluationTask]]:
        """What is `due`, for someone who evaluates it and has `see` told of each end."""
        taken, self.due = self.due, {}
        for step, _, _ in taken:
            self._at_work[step] += 1
            self._idle.discard(step)  # it may still turn out to be best
        return taken

    def prune(self) -> None:
        """Remove the training states that nobody resumes from; those with evaluations at work wait for their end.

        What is left of those whose removal was cut short goes, too.
        """
        for step in sorted(self._half_removed):
            store.remove_training_state(self._found[step])
        self._half_removed.clear()
        train = self._plan.recipe.train
        best = (step for step in self._ranking.best() if step in self._found)
        kept = retention(train, self._trained, best)
        if not self._idle - kept:
            return
        kept.update(self._newest_in_storage(train.keep_last))
        for step in sorted(self._idle - kept):
            store.remove_training_state(self._found[step])
            self._resumable.remove(step)
            self._idle.remove(step)

    def _newest(self) -> Iterator[int]:
        return (step for step in reversed(self._trained) if step in self._resumable)

    def _newest_in_storage(self, number: int) -> list[int]:
        """The newest that the run could go on from, by a look at each."""
        while gone := {step for step in islice(self._newest(), number) if not self._found[step].has_training_state}:
            self._resumable -= gone
            self._idle -= gone
        return list(islice(self._newest(), number))

    def _add(self, found: store.Published, *, has_training_state: bool) -> None:
        """A checkpoint that is new, or was published again by workers that went back behind it."""
        step = found.step
        if step not in self._found:
            self._found[step] = found
            if step > 0:
                insort(self._trained, step)
            for _, task in due(self._plan, [step], self._scored):
                self.due[step, task.protocol, task.data] = (found, task)
        if has_training_state:
            self._half_removed.discard(step)  # it was written anew
            self._resumable.add(step)
            if step not in self._at_work:
                self._idle.add(step)

    def _ended(self, step: int) -> None:
        """One of its evaluations, if any of them is at work."""
        if step in self._at_work:
            self._at_work[step] -= 1
            if not self._at_work[step]:
                del self._at_work[step]
                self._idle |= {step} & self._resumable

    def _forget(self, step: int) -> None:
        del self._found[step]
        if step > 0:
            self._trained.remove(step)
        self._resumable.discard(step)
        self._idle.discard(step)
        self._half_removed.discard(step)
        self.due = {label: asked for label, asked in self.due.items() if label[0] != step}
