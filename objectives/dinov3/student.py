"""What is random in the student's blocks while it trains.

O. Simeoni et al., "DINOv3", 2025, arXiv:2508.10104: rotary positions whose coordinates are moved anew in every block,
once for all crops of a size (section 3.2), and stochastic depth at one rate in all blocks that leaves whole samples out
(as DINOv2, arXiv:2304.07193, section 5).

Drawn from the seed of a micro-batch's first sample, so that a step is the same after a restart and when a block is
computed again in the backward pass; ranks, whose samples differ, draw differently. NOT here: running the blocks
(`backbones.images.packed_blocks`).

Legend: b samples of one size, k of them whose branch is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from backbones.images.packed_blocks import BlockDraw
from objectives.dinov3.config import DINOv3Config
from objectives.masking import random_noise

__all__ = ["draw_blocks"]

_COORDS, _DEPTH = 1 << 12, 1 << 13  # first streams of random numbers of the two purposes

Coords = tuple[Tensor, Tensor]


def draw_blocks(config: DINOv3Config, seed: Tensor, sizes: Sequence[int], num_blocks: int) -> list[list[BlockDraw]]:
    """For each block, and in it for the crops of each size.

    Args:
        config: `rope_shift`, `rope_jitter`, `rope_rescale` and `drop_path`.
        seed: (1,) int64.
        sizes: samples of each size, b.
        num_blocks: of the backbone.
    """
    coords = [_coords(config, seed, num_blocks, idx) for idx in range(len(sizes))]
    chosen = [_chosen(config.drop_path, seed, count, num_blocks, idx) for idx, count in enumerate(sizes)]
    return [
        [BlockDraw(coords[idx][block], *chosen[idx][block]) for idx in range(len(sizes))] for block in range(num_blocks)
    ]


def _coords(config: DINOv3Config, seed: Tensor, num_blocks: int, idx: int) -> Sequence[Coords | None]:
    """Shift and factor of (row, column) in each block: a shift per axis, a factor per axis, and one for both."""
    if config.rope_shift is config.rope_jitter is config.rope_rescale is None:
        return [None] * num_blocks
    noise = random_noise(seed, 5 * num_blocks, _COORDS + idx).view(num_blocks, 5)
    signed = ((noise >> 10).double() / (1 << 52) - 1).float()  # (blocks, 5), uniform in [-1, 1)
    shift = signed[:, :2] * (config.rope_shift or 0.0)
    log_factor = signed[:, 2:4] * math.log(config.rope_jitter or 1.0) + signed[:, 4:] * math.log(
        config.rope_rescale or 1.0
    )
    return list(zip(shift.unbind(), log_factor.exp().unbind(), strict=True))


def _chosen(rate: float, seed: Tensor, count: int, num_blocks: int, idx: int) -> list[tuple[Tensor | None, ...]]:
    """The samples (k,) whose attention, and those whose MLP is computed, in each block."""
    num_chosen = max(1, int(count * (1 - rate)))
    if num_chosen == count:
        return [(None, None)] * num_blocks
    noise = random_noise(seed, num_blocks * 2 * count, _DEPTH + idx).view(num_blocks, 2, count)
    orders = noise.argsort(dim=-1, stable=True)[..., :num_chosen]
    return [tuple(torch.unbind(order)) for order in orders]
