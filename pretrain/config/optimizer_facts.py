"""The optimizers that a recipe may name, and which of them ZeRO's shards leave intact.

ZeRO 1 to 3 hand an optimizer flat pieces of many parameters at once. An optimizer that treats each number alone does
not notice; one that looks at a parameter as a whole (LAMB's and LARS's trust ratios, Muon's orthogonal matrices) would
silently compute something else. Not here: the optimizers themselves (`pretrain.training.optimizers`).

Imports no torch, so that a recipe is checked without it.
"""

from __future__ import annotations

__all__ = ["NAMES", "RESHARDABLE", "WHOLE_PARAMETER", "is_reshardable"]

ELEMENTWISE = ("adamw", "nadamw", "adoptw", "lion", "sgdw")
WHOLE_PARAMETER = {  # name -> what it computes of a parameter as a whole
    "lamb": "a trust ratio per parameter",
    "lars": "a trust ratio per parameter",
    "muon": "an orthogonal matrix per parameter",
}
NAMES = (*ELEMENTWISE, *WHOLE_PARAMETER)
# DeepSpeed cuts its own shards anew for another number of ranks only where the state is Adam's two moments.
RESHARDABLE = ("adamw", "nadamw", "adoptw")


def is_reshardable(name: str, zero_stage: int) -> bool:
    """Whether another number of ranks can go on with the state; only in stage 3 the shards are DeepSpeed's."""
    return zero_stage != 3 or name in RESHARDABLE
