"""The optimisers of a recipe: timm's, by name, and which of them ZeRO's shards leave intact.

ZeRO 1 to 3 hand an optimiser flat pieces of many parameters at once. An optimiser that treats each number alone does
not notice; one that looks at a parameter as a whole (LAMB's and LARS's trust ratios, Muon's orthogonal matrices) would
silently compute something else. NOT here: schedules (`pretrain.training.schedules`), the shards
(`pretrain.training.engine`).

Imports no torch, so that a recipe is checked without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from pretrain.config.schema import OptimizerConfig

__all__ = ["NAMES", "RESHARDABLE", "WHOLE_PARAMETER", "create_optimizer"]

ELEMENTWISE = ("adamw", "nadamw", "adoptw", "lion", "sgdw")
WHOLE_PARAMETER = {  # name -> what it computes of a parameter as a whole
    "lamb": "a trust ratio per parameter",
    "lars": "a trust ratio per parameter",
    "muon": "an orthogonal matrix per parameter",
}
NAMES = (*ELEMENTWISE, *WHOLE_PARAMETER)
# DeepSpeed cuts shards anew for another number of ranks only where the state is Adam's two moments.
RESHARDABLE = ("adamw", "nadamw", "adoptw")


def create_optimizer(groups: Sequence[dict[str, Any]], config: OptimizerConfig, lr: float) -> torch.optim.Optimizer:
    """timm's optimiser over parameter groups that carry their own weight decay.

    Betas and eps go to those that have them; one with plain momentum takes the first beta. Muon uses AdamW for
    vectors, tokens and positions, whose shapes are no matrices.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info

    info = get_optimizer_info(config.name)
    options: dict[str, Any] = {}
    if info.has_betas:
        options["betas"] = tuple(config.betas)
    if info.has_eps:
        options["eps"] = config.eps
    if config.name == "lamb":
        options["max_grad_norm"] = None  # gradients are clipped by optimizer.clip_grad alone
    return create_optimizer_v2(groups, opt=config.name, lr=lr, weight_decay=0.0, momentum=config.betas[0], **options)
