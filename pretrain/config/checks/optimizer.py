"""Learning rates, warm-up and decay: do they go together, and with the length of the run?"""

from __future__ import annotations

from pretrain.config.mistakes import Mistakes
from pretrain.config.schema import Recipe

__all__ = ["check_optimizer"]


def check_optimizer(draft: Recipe, mistakes: Mistakes) -> None:
    optimizer = draft.optimizer
    if mistakes.sound("optimizer.lr", "optimizer.base_lr"):
        if optimizer.lr is None and optimizer.base_lr is None:
            problem = "give one of optimizer.lr and optimizer.base_lr (lr = base_lr x global_batch_size / 256)"
            mistakes.add("optimizer.lr", None, problem)
        elif optimizer.lr is not None and optimizer.base_lr is not None:
            key = mistakes.latest("optimizer.base_lr", "optimizer.lr")
            other = "optimizer.base_lr" if key == "optimizer.lr" else "optimizer.lr"
            value = optimizer.lr if key == "optimizer.lr" else optimizer.base_lr
            problem = f"{other} is given too and only one can count; add {other}=null"
            mistakes.add(key, value, problem)
    peak_is_known = mistakes.sound("optimizer.lr", "optimizer.base_lr", "train.global_batch_size")
    if peak_is_known and mistakes.sound("optimizer.min_lr") and optimizer.min_lr > draft.peak_lr:
        problem = f"above the peak learning rate; expected a number in [0, {draft.peak_lr:g}]"
        mistakes.add("optimizer.min_lr", optimizer.min_lr, problem)
    warmup, steps = optimizer.warmup_steps, draft.train.steps
    if mistakes.sound("optimizer.warmup_steps", "train.steps") and warmup >= steps:
        key = mistakes.latest("optimizer.warmup_steps", "optimizer.warmup_epochs", "train.steps", "train.epochs")
        problem = f"a warm-up of {warmup} steps does not fit a run of {steps}"
        remedy = f"give optimizer.warmup_steps=N below {steps}"
        if key == "optimizer.warmup_steps":
            problem, remedy = f"has to be below train.steps={steps}", f"expected a whole number in [0, {steps - 1}]"
        mistakes.add(key, mistakes.written(key), f"{problem}; {remedy}")
    decay, left = optimizer.decay_steps, steps - warmup
    is_sound = mistakes.sound("optimizer.decay_steps", "optimizer.warmup_steps", "train.steps")
    if is_sound and decay is not None and 0 < left < decay:
        problem = f"train.steps={steps} leaves {left} after the warm-up; give as many or fewer, or null"
        mistakes.add("optimizer.decay_steps", decay, problem)
