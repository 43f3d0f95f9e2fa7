"""ZeRO: which stage a run takes, what speaks against one, and which keys of DeepSpeed are not the user's to set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pretrain.config.mistakes import Mistakes
from pretrain.config.optimizer_facts import RESHARDABLE, WHOLE_PARAMETER, is_reshardable
from pretrain.config.schema import OptimizerConfig, Recipe, TrainConfig

__all__ = ["check_deepspeed_keys", "check_zero_stage", "zero_objections", "zero_stage"]

# DeepSpeed keys that a setting of ours decides; saying both would leave it open which one counts.
_OWNED_DEEPSPEED_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.clip_grad",
    "zero_optimization.stage": "train.zero_stage",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "amp": "train.precision",
    "optimizer": "optimizer",
    "scheduler": "optimizer",
}


def zero_stage(draft: Recipe) -> int:
    """The stage that is asked for, else 1, or 0 where that saves nothing worth the copies that ZeRO makes in a step.

    With one worker there is nobody to share with, and memory of CPUs is seldom what a model lacks; ZeRO 1 took 1.05 to
    1.25 times the CPU time of stage 0 there. In bf16, stages 1 to 3 keep the float32 masters.
    """
    train = draft.train
    if train.zero_stage is not None:
        return train.zero_stage
    saves_nothing = train.workers == 1 or train.device == "cpu" or draft.optimizer.name in WHOLE_PARAMETER
    return 0 if saves_nothing and train.precision == "fp32" and "zero_optimization" not in draft.deepspeed else 1


def zero_objections(optimizer: OptimizerConfig, train: TrainConfig, stage: int) -> Iterator[tuple[str, Any, str]]:
    """What speaks against a ZeRO stage: a setting, its value, and the problem with its remedy."""
    if optimizer.name in WHOLE_PARAMETER and stage:
        problem = (
            f"computes {WHOLE_PARAMETER[optimizer.name]}, and ZeRO stage {stage} gives it flat pieces of many; use "
            "train.zero_stage=0 (and train.precision=fp32) with it, or one of adamw, nadamw, adoptw, lion, sgdw"
        )
        yield "optimizer.name", optimizer.name, problem
    if train.precision == "bf16" and stage == 0:
        problem = "DeepSpeed's stage 0, which train.zero_stage says here, trains worse in bf16; add train.zero_stage=1"
        yield "train.precision", train.precision, problem
    if train.compile and stage == 3:
        problem = "ZeRO stage 3 gathers parameters within the blocks that are compiled; use train.zero_stage=2 with it"
        yield "train.compile", train.compile, problem
    if train.min_workers not in (None, train.workers) and not is_reshardable(optimizer.name, stage):
        known = f"the state of {optimizer.name} in ZeRO stage {stage} cannot be cut anew for fewer workers"
        remedy = f"use train.zero_stage=2, one of {', '.join(RESHARDABLE)}, or train.workers={train.workers} alone"
        yield "train.min_workers", train.min_workers, f"{known}; {remedy}"


def check_zero_stage(draft: Recipe, mistakes: Mistakes) -> None:
    for key, value, problem in zero_objections(draft.optimizer, draft.train, draft.train.zero_stage or 0):
        if mistakes.sound(key, "train.zero_stage"):
            mistakes.add(key, value, problem)


def check_deepspeed_keys(raw: Mapping[str, Any], mistakes: Mistakes) -> None:
    for owned, ours in _OWNED_DEEPSPEED_KEYS.items():
        node: Any = raw
        for name in owned.split("."):
            node = node[name] if isinstance(node, Mapping) and name in node else None
        if node is not None:
            mistakes.add(f"deepspeed.{owned}", node, f"decided by {ours}; set that instead")
