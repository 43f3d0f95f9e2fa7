"""Which checkpoints of a run are best, by what its evaluations say.

Not here: how scores are compared (`evaluation.protocol`), what is kept or registered because of it.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

from evaluation.protocol import Metric, less_is_better
from pretrain.record.events import Evaluated, Event

__all__ = ["Ranking", "best_steps", "selected"]


class Ranking:
    """Steps of trained checkpoints in the order of their scores, kept while evaluations come in.

    A run may have thousands of checkpoints, and asks for the best few after each evaluation: a new score finds its
    place by bisection, so that the cost of one does not grow with those before it.

    Args:
        select: `PROTOCOL/DATA/METRIC`, as `evaluation.select` has it; without it no checkpoint is better than another.
    """

    def __init__(self, select: str | None) -> None:
        self._select = select
        self._scores: dict[int, float] = {}
        self._metric: Metric | None = None  # as the evaluation of the newest step describes it
        self._newest = 0
        self._order: list[tuple[float, int]] = []  # (score on a scale where less is better, step), ascending

    def add(self, event: Evaluated) -> None:
        """Take an evaluation into account; of a step that is evaluated again the last one counts."""
        choice = selected(self._select, event)
        if event.step <= 0 or choice is None:
            return
        metric, score = choice
        self._remove(event.step)
        self._scores[event.step] = score
        if event.step >= self._newest:
            self._newest = event.step
            if self._metric is None or metric.better != self._metric.better:  # a protocol that counts otherwise now
                self._metric = metric
                self._order.clear()
                for step in self._scores:
                    self._insert(step)
                return
        self._insert(event.step)

    def best(self) -> Iterator[int]:
        """From the best to the worst; of equal ones the earlier is better. Scores that are not finite are left out."""
        return (step for _, step in self._order)

    def _place(self, step: int) -> tuple[float, int] | None:
        score = self._scores.get(step, math.nan)
        return (less_is_better(score, self._metric), step) if self._metric and math.isfinite(score) else None

    def _insert(self, step: int) -> None:
        if (place := self._place(step)) is not None:
            insort(self._order, place)

    def _remove(self, step: int) -> None:
        if (place := self._place(step)) is not None:
            del self._order[bisect_left(self._order, place)]


def best_steps(select: str | None, events: Iterable[Event]) -> list[int]:
    """Steps of trained checkpoints from the best to the worst; of equal ones the earlier is better.

    Args:
        select: As for `Ranking`.
        events: evaluations of the run, repeated ones in the order in which they were made; the last counts.
    """
    ranking = Ranking(select)
    for event in events:
        if isinstance(event, Evaluated):
            ranking.add(event)
    return list(ranking.best())


def selected(select: str | None, event: Evaluated) -> tuple[Metric, float] | None:
    """The metric that `select` names and its score in an evaluation; None if that is another evaluation."""
    task, _, name = (select or "").rpartition("/")
    if event.task != task:
        return None
    metric = next((metric for metric in event.reported if metric.name == name), None)
    return None if metric is None else (metric, event.metrics[name])
