"""Masks of rectangular blocks, of which a batch has an exact number of masked patches.

BEiT's blocks (H. Bao et al., 2021, arXiv:2106.08254, section 2.3), allotted to the crops of a batch as in DINOv3
(O. Simeoni et al., 2025, arXiv:2508.10104) and DINOv2 (arXiv:2304.07193): a share of the crops is masked, the i-th of n
in the i-th of n steps between the least and the greatest ratio, and which crop gets which is random.

Drawn from the samples' seeds, for all crops at once: the same on every device, and a device is never waited for, since
the number of masked patches does not depend on what is drawn.

Legend: T crops, n of them masked, N = H W patches, M masked patches of all crops.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from objectives.masking import random_noise, uniform

__all__ = ["BlockMasks", "block_masks", "masked_counts"]

_MIN_AREA = 4
_ASPECT = 0.3  # least height / width of a block; the greatest is its inverse
_ATTEMPTS = 10
_MAX_BLOCKS = 64
_STREAMS = 1 << 10  # numbers of streams of random numbers from here on are of this file


class BlockMasks(NamedTuple):
    """What is masked.

    Attributes:
        is_masked: (T, N) bool.
        idx: (M,) int64, masked patches in the flattened (T N), ascending.
        unmasked_idx: (T N - M,) int64, the others.
        weight: (M,) float32, 1 / number of masked patches of the same crop.
    """

    is_masked: Tensor
    idx: Tensor
    unmasked_idx: Tensor
    weight: Tensor


@functools.cache
def masked_counts(num_crops: int, num_patches: int, share: float, ratio: tuple[float, float]) -> tuple[int, ...]:
    """Masked patches of each masked crop, ascending: n = int(T share) numbers."""
    num_masked = int(num_crops * share)
    steps = torch.linspace(*ratio, num_masked + 1, dtype=torch.float32).tolist()
    return tuple(int(num_patches * step) for step in steps[1:])


def block_masks(
    seeds: Tensor, grid: tuple[int, int], *, share: float = 0.5, ratio: tuple[float, float] = (0.1, 0.5)
) -> BlockMasks:
    """Masks of all crops of a micro-batch.

    Args:
        seeds: (T,) int64, different for each crop.
        grid: (H, W) of patches.
        share: of the crops that are masked at all.
        ratio: least and greatest share of a crop's patches.
    """
    counts = masked_counts(len(seeds), grid[0] * grid[1], share, ratio)
    wanted = _on_device(counts, seeds.device)  # (n,)
    chosen = random_noise(seeds, 1, _STREAMS)[:, 0].argsort(stable=True)[: len(counts)]  # which crop gets which count
    is_masked = torch.zeros(len(seeds), grid[0] * grid[1], dtype=torch.bool, device=seeds.device)
    is_masked[chosen] = _exact(seeds[chosen], _blocks(seeds[chosen], grid, wanted), wanted)
    # Stable and descending: the masked ones in their order first, and there are as many as `counts` says.
    order = is_masked.flatten().to(torch.uint8).argsort(descending=True, stable=True)
    idx, unmasked_idx = order[: sum(counts)], order[sum(counts) :]
    weight = 1.0 / is_masked.sum(dim=1).clamp_min(1)  # (T,)
    return BlockMasks(is_masked, idx, unmasked_idx, weight[idx // is_masked.shape[1]])


@functools.cache
def _on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept from step to step, for the copy to a device is one that the host would wait for."""
    return torch.tensor(counts, dtype=torch.int64, device=device)


def _blocks(seeds: Tensor, grid: tuple[int, int], wanted: Tensor) -> Tensor:
    """Blocks for each crop until it has the number `wanted` (n,) or 10 attempts at the next one fail, (n, N) bool."""
    height, width = grid
    largest = height // 2 * width  # half of the patches; less where the rows are odd in number, as the authors have it
    rows = torch.arange(height, device=seeds.device)[:, None]  # (H, 1)
    columns = torch.arange(width, device=seeds.device)  # (W,)
    mask = torch.zeros(len(seeds), height, width, dtype=torch.bool, device=seeds.device)
    is_open = torch.ones(len(seeds), dtype=torch.bool, device=seeds.device)
    for number in range(1 if seeds.is_meta else _MAX_BLOCKS):  # without numbers one block has the shapes of all
        limit = (wanted - mask.sum(dim=(1, 2))).clamp_max(largest)  # (n,)
        is_open = is_open & (limit > 0)
        if mask.device.type == "cpu" and not is_open.any():  # elsewhere asking would cost more than going on
            break
        area, log_aspect, top, left = uniform(seeds, 4 * _ATTEMPTS, _STREAMS + 1 + number).chunk(4, dim=1)  # (n, 10)
        area = _MIN_AREA + area * (limit[:, None] - _MIN_AREA)
        aspect = ((2 * log_aspect - 1) * -math.log(_ASPECT)).exp()
        block_height, block_width = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
        top = (top * (height - block_height + 1).clamp_min(1)).long()
        left = (left * (width - block_width + 1).clamp_min(1)).long()
        added = block_height * block_width - _covered(mask, top, left, block_height, block_width)
        is_fit = (block_height < height) & (block_width < width) & (added > 0) & (added <= limit[:, None])
        is_open = is_open & is_fit.any(dim=1)
        first = is_fit.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :1]  # the first that fits
        top, left, block_height, block_width = (
            x.gather(1, first)[:, :, None] for x in (top, left, block_height, block_width)
        )
        block = (rows >= top) & (rows < top + block_height) & (columns >= left) & (columns < left + block_width)
        mask = mask | (block & is_open[:, None, None])
    return mask.flatten(1)


def _covered(mask: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Masked patches within each proposed block, (n, attempts): four corners of the table of sums."""
    sums = torch.nn.functional.pad(mask.long().cumsum(1).cumsum(2), (1, 0, 1, 0)).flatten(1)  # (n, (H + 1) (W + 1))
    stride = mask.shape[2] + 1
    bottom, right = (top + height).clamp_max(mask.shape[1]), (left + width).clamp_max(mask.shape[2])

    def at(row: Tensor, column: Tensor) -> Tensor:
        return sums.gather(1, row * stride + column)

    return at(bottom, right) - at(top, right) - at(bottom, left) + at(top, left)


def _exact(seeds: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
    """The masks (n, N) with as many random patches more as blocks have left open of `wanted` (n,)."""
    rank = torch.where(mask, -1, random_noise(seeds, mask.shape[1], _STREAMS + _MAX_BLOCKS + 1))
    order = rank.argsort(dim=1, stable=True)  # masked ones first
    is_within = torch.arange(mask.shape[1], device=seeds.device) < wanted[:, None]  # (n, N)
    return torch.zeros_like(mask).scatter(1, order, is_within)
