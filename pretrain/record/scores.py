"""Which checkpoints of a run are best, by what its evaluations say.

Not here: how scores are compared (`evaluation.protocol`), what is kept or registered because of it.
"""

from __future__ import annotations

from collections.abc import Iterable

from evaluation.protocol import Metric, ranked
from pretrain.record.events import Evaluated, Event

__all__ = ["best_steps", "selected"]


def best_steps(select: str | None, events: Iterable[Event]) -> list[int]:
    """Steps of trained checkpoints from the best to the worst; of equal ones the earlier is better.

    Args:
        select: `PROTOCOL/DATA/METRIC`, as `evaluation.select` has it; without it no checkpoint is better than another.
        events: evaluations of the run, repeated ones in the order in which they were made; the last counts.
    """
    found = [(event.step, selected(select, event)) for event in events if isinstance(event, Evaluated)]
    chosen = {step: choice for step, choice in found if step > 0 and choice is not None}
    if not chosen:
        return []
    newest, _ = chosen[max(chosen)]
    return ranked({step: score for step, (_, score) in chosen.items()}, newest)


def selected(select: str | None, event: Evaluated) -> tuple[Metric, float] | None:
    """The metric that `select` names and its score in an evaluation; None if that is another evaluation."""
    task, _, name = (select or "").rpartition("/")
    metric = next((metric for metric in event.reported if metric.name == name), None)
    return (metric, event.metrics[name]) if event.task == task and metric is not None else None
