"""The schedules of a recipe: learning rate and weight decay, both values of `objectives.schedules.Schedule`.

Not here: what they are set on (`pretrain.training.engine`), schedules inside objectives.
"""

from __future__ import annotations

from objectives.schedules import Schedule
from pretrain.config.schema import Recipe

__all__ = ["learning_rate", "schedules_line", "weight_decay"]


def learning_rate(recipe: Recipe) -> Schedule:
    """Learning rate of the update that follows a step: 0 at step 0 when there is a warm-up."""
    optimizer = recipe.optimizer
    return Schedule(
        recipe.peak_lr,
        optimizer.min_lr,
        recipe.train.steps,
        optimizer.warmup_steps,
        optimizer.warmup,
        optimizer.decay_steps,
        optimizer.decay_stretch,
    )


def weight_decay(recipe: Recipe) -> Schedule:
    """Weight decay of each step: constant, or half a cosine to `optimizer.weight_decay_end`."""
    start, end = recipe.optimizer.weight_decay, recipe.optimizer.weight_decay_end
    return Schedule(start, start if end is None else end, recipe.train.steps)


def schedules_line(before: Recipe, now: Recipe, done: int) -> str:
    """What becomes of the learning rate of a run that gets another number of steps after `done` of them."""
    old, new = before.train.steps, now.train.steps
    line = f"train.steps {old} -> {new}: schedules are those of a run of {new} steps"
    if not 0 < done < new:
        return line
    was, becomes = learning_rate(before).at(done - 1), learning_rate(now).at(done)
    return f"{line}, so the learning rate is {becomes:.1e} at step {done + 1}, after {was:.1e} at step {done}"
