"""The optimizer of a recipe: timm's, by name, over an objective's parameter groups.

Not here: which names there are and what ZeRO's shards do to them (`pretrain.config.optimizer_facts`), schedules
(`pretrain.training.schedules`), the shards themselves (`pretrain.training.engine`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pretrain.config.schema import OptimizerConfig

__all__ = ["create_optimizer"]


def create_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """timm's optimizer over parameter groups that carry their own weight decay.

    Betas and eps go to those that have them; one with plain momentum takes the first beta. Muon uses AdamW for
    vectors, tokens and positions, whose shapes are no matrices. AdamW is torch's, in its fused form: one pass over
    weights, gradients and moments, on CPUs and on CUDA.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info

    info = get_optimizer_info(config.name)
    options: dict[str, Any] = {}
    if info.has_betas:
        options["betas"] = tuple(config.betas)
    if info.has_eps:
        options["eps"] = config.eps
    if config.name == "adamw":
        options["fused"] = True
    if config.name == "lamb":
        options["max_grad_norm"] = None  # gradients are clipped by optimizer.clip_grad alone
    return create_optimizer_v2(groups, opt=config.name, lr=lr, weight_decay=0.0, momentum=config.betas[0], **options)
