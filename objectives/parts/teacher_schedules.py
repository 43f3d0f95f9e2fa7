"""What changes over a run of self-distillation: the teacher's temperature and momentum, and when prototypes are frozen.

M. Caron et al., 2021, arXiv:2104.14294. NOT here: the moving average itself (`objectives.teacher`).
"""

from __future__ import annotations

from objectives.base import Progress
from objectives.parts.settings import DistillationConfig
from objectives.teacher import cosine_momentum

__all__ = ["freezes_prototypes", "teacher_momentum", "teacher_temperature"]


def teacher_temperature(config: DistillationConfig, progress: Progress, *, inclusive: bool = False) -> float:
    """Linear from `teacher_temp_start` to `teacher_temp` over the first share `teacher_temp_warmup` of the run.

    The code of DINO's authors goes in steps of an epoch. With `inclusive` the last step of the warm-up has the end, not
    the step after it.
    """
    warmup_steps = config.teacher_temp_warmup * progress.total_steps - inclusive
    share = min(1.0, progress.step / warmup_steps) if warmup_steps > 0 else 1.0
    return config.teacher_temp_start + share * (config.teacher_temp - config.teacher_temp_start)


def teacher_momentum(config: DistillationConfig, progress: Progress) -> float:
    """Of the step just taken: from `teacher_momentum` to 1."""
    return cosine_momentum(config.teacher_momentum, progress.step, progress.total_steps)


def freezes_prototypes(config: DistillationConfig, progress: Progress) -> bool:
    """Whether prototypes get no gradient in this step: in the first `freeze_prototypes` of the run."""
    return progress.step < config.freeze_prototypes * progress.total_steps
