"""What the weights of a training take of a worker's memory: arithmetic on a model that need not exist yet.

The partitions of ZeRO (S. Rajbhandari et al., 2019, arXiv:1910.02054) as DeepSpeed makes them, with the copies that it
keeps beside them. `benchmarks/zero_memory.py` counts the same in running processes.

Not here: activations, what DeepSpeed offloads to another memory if a recipe's `deepspeed:` says so, and the moments
before training, see `pretrain.training.initial_weights`.

Legend: R workers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from objectives.base import Objective
from objectives.shards import units_of
from pretrain.config.schema import Recipe
from pretrain.training.engine import deepspeed_config

__all__ = ["Memory", "memory_of"]

_MOMENTS = {"lion": 1, "sgdw": 1, "lars": 1, "muon": 1}  # per parameter; of the others 2
# Defaults of DeepSpeed's ZeRO-3: numbers of a parameter up to which it stays whole, and numbers that are gathered at a
# time, before which none is dropped.
_KEPT_WHOLE, _MOST_GATHERED = 100_000, 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes per worker.

    Attributes:
        weights: in the type in which they compute.
        optimizer: float32 masters, and moments.
        companions: teachers and anchors.
        backward: gradients, buffers in which they travel, and weights that are gathered, in the backward pass.
        update: gradients and their copies, while the optimizer steps.
    """

    weights: int
    optimizer: int
    companions: int
    backward: int
    update: int

    @property
    def total(self) -> int:
        """At the fullest moment, besides activations."""
        return self.weights + self.optimizer + self.companions + max(self.backward, self.update)


def memory_of(recipe: Recipe, objective: Objective, device: torch.device) -> Memory:
    """What a worker needs for the weights of a recipe.

    Args:
        recipe: Resolved.
        objective: Of the recipe, not under an engine; without numbers (torch's meta device) is enough.
        device: On which it is to be trained.
    """
    train, optimizer = recipe.train, recipe.optimizer
    stage, num_ranks = train.zero_stage or 0, train.workers
    config = deepspeed_config(recipe, device)
    width = 2 if train.precision == "bf16" else 4
    wide = 4 if config.get("communication_data_type") == "fp32" else width
    zero = config["zero_optimization"]
    is_overlapped = zero.get("overlap_comm", False)

    sizes = [parameter.numel() for parameter in objective.parameters()]
    groups = [
        [parameter.numel() for parameter in group["params"]]
        for group in objective.param_groups(optimizer.weight_decay, optimizer.layer_decay)
    ]
    trained, largest = sum(map(sum, groups)), max(map(sum, groups))
    moments = 4 * _MOMENTS.get(optimizer.name, 2)
    companions = _companions(objective, num_ranks if stage == 3 else 1)
    if stage == 0:
        travelling = 4 * min(trained, zero["reduce_bucket_size"]) if num_ranks > 1 else 0
        return Memory(4 * sum(sizes), moments * trained, companions, 4 * trained + travelling, 4 * trained)

    shares = (4 + moments) * trained // num_ranks
    bucket = wide * zero["reduce_bucket_size"]
    copy = 4 * largest // num_ranks  # of a group's gradients, flat and in float32
    if stage == 3:
        most_small = zero.get("stage3_param_persistence_threshold", _KEPT_WHOLE)
        small = sum(size for size in sizes if size <= most_small)
        weights = width * (sum(sizes) // num_ranks + small)
        gradients = width * trained // num_ranks + bucket  # which it never frees
        gathered = width * min(sum(sizes), zero.get("stage3_max_live_parameters", _MOST_GATHERED))
        return Memory(weights, shares, companions, gradients + bucket + gathered, gradients + copy)
    own = width * _largest_partition(groups, num_ranks)
    if stage == 1 and not is_overlapped:  # all gradients are there before the first of them travel
        backward, kept = width * trained + own + bucket, width * trained
    else:  # one buffer is filled, if they overlap, while another travels, as a copy
        backward, kept = own + (3 if is_overlapped else 2) * bucket, own
    return Memory(width * sum(sizes), shares, companions, backward, kept + copy)


def _companions(objective: Objective, num_ranks: int) -> int:
    """Bytes of all companions where what can be shared is shared among so many."""
    size = 0
    for companion in objective.companions().values():
        shared = {parameter for unit in units_of(companion.module) for parameter in unit.parameters()}
        for tensor in companion.module.state_dict(keep_vars=True).values():
            numbers = -(-tensor.numel() // num_ranks) if tensor in shared else tensor.numel()
            size += numbers * tensor.element_size()
    return size


def _largest_partition(groups: list[list[int]], num_ranks: int) -> int:
    """Numbers of the gradients that one rank keeps in stages 1 and 2.

    A rank's part of a group's flat gradient begins and ends within parameters, and it keeps those whole.
    """
    kept = [0] * num_ranks
    for group in groups:
        part = -(-sum(group) // num_ranks)
        start = 0
        for size in group:
            if size:
                for rank in range(start // part, (start + size - 1) // part + 1):
                    kept[rank] += size
            start += size
    return max(kept)
