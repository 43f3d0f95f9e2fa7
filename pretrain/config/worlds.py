"""With how many workers a run may go on: `train.workers` when there is room for all, fewer down to `train.min_workers`.

The global batch and the micro-batch stay; accumulation makes up for missing workers. So only numbers of workers count
of which each gets whole micro-batches, and the samples of a step are the same with each of them.
"""

from __future__ import annotations

from dataclasses import replace

from pretrain.config.schema import TrainConfig
from pretrain.config.stages import Plan

__all__ = ["with_workers", "worlds"]


def worlds(plan: Plan) -> tuple[int, ...]:
    """All numbers of workers that every stage of a resolved plan can be trained with, the most first."""
    wanted = plan.recipe.train
    return tuple(
        workers
        for workers in range(wanted.workers, (wanted.min_workers or wanted.workers) - 1, -1)
        if all(_accumulation(stage.recipe.train, workers) for stage in plan.stages)
    )


def with_workers(plan: Plan, workers: int) -> Plan:
    """The plan as `workers` of `worlds(plan)` carry it out."""
    if workers == plan.recipe.train.workers:
        return plan
    stages = []
    for stage in plan.stages:
        train = stage.recipe.train
        train = replace(train, workers=workers, min_workers=None, accumulation=_accumulation(train, workers))
        stages.append(replace(stage, recipe=replace(stage.recipe, train=train)))
    return Plan(tuple(stages))


def _accumulation(train: TrainConfig, workers: int) -> int:
    """Micro-batches per worker and step; 0 when they would not be whole."""
    assert train.micro_batch_size is not None  # derived when a recipe is resolved
    quotient, rest = divmod(train.global_batch_size, train.micro_batch_size * workers)
    return 0 if rest else quotient
