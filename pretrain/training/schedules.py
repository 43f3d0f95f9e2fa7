"""Learning rate and weight decay as pure functions of the optimiser step, so that resuming needs no scheduler state.

Source: MAE (He et al. 2022, section 4 and appendix A.1): linear warm-up, then half a cosine, per step.
"""

from __future__ import annotations

import math

from pretrain.config.schema import Recipe

__all__ = ["cosine", "learning_rate", "weight_decay"]


def cosine(start: float, end: float, fraction: float) -> float:
    """Half a cosine from `start` (fraction 0) to `end` (fraction 1)."""
    return end + (start - end) * 0.5 * (1.0 + math.cos(math.pi * fraction))


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate of the update that follows step `step` (0-based): 0 at step 0 when there is a warm-up."""
    warmup, total = recipe.optimizer.warmup_steps, recipe.train.steps
    if step < warmup:
        return recipe.peak_lr * step / warmup
    return cosine(recipe.peak_lr, recipe.optimizer.min_lr, (step - warmup) / max(1, total - warmup))


def weight_decay(recipe: Recipe, step: int) -> float:
    """Weight decay of step `step`: constant, or half a cosine to `optimizer.weight_decay_end`."""
    end = recipe.optimizer.weight_decay_end
    if end is None:
        return recipe.optimizer.weight_decay
    return cosine(recipe.optimizer.weight_decay, end, step / recipe.train.steps)
