"""Corrupted images: blocks of pixels are replaced by noise, by the mean colour, or by another image of the batch.

S. Atito et al., "GMML is All you Need", 2022, arXiv:2205.14986; also SiT, arXiv:2104.03602. Written from the
description. An image is corrupted either by a fill, over a share drawn between min(0.5, share) and `share`, or, with
probability `alien_p`, by another image, over `alien_share`. Blocks start anywhere, grow right and down, and are cut off
at the far edges, which are therefore masked more often than the near ones: that is the authors' choice.

Their sampler draws block after block in the loader until the share is covered. Here every image of a batch gets
more blocks than it needs, at once and on its device, and keeps the first ones that cover its share.

Everything follows from the samples' seeds, except which other image is pasted: one of the same view in the micro-batch,
so it depends on how samples are dealt to ranks. NOT here: what is predicted (`gmml`, `sit`).

Legend: n images, V views, B batch, C channels, S side in pixels, K blocks, cells of `align` x `align` pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbones.images.base import ImageEncoder
from objectives.errors import ObjectiveError
from objectives.masking import random_noise, uniform
from objectives.parts.settings import CorruptionConfig

__all__ = [
    "BlockCorruption",
    "Corruption",
    "block_corruption",
    "blocks_from_uniform",
    "first_blocks",
    "mask_from_blocks",
]

_NUM_BLOCKS = 240  # offered to each image; of 2000 draws, share 0.75 took at most 121 and share 0.9 at most 226
_NUM_CHOICES = 3  # uniform numbers of an image before those of its blocks: share, alien or not, partner
_CHOICES, _NOISE = 0, 1  # streams of an image's seed


@dataclass(frozen=True)
class Corruption:
    """What is done to n images.

    Attributes:
        is_masked: (n, 1, S, S) bool, True where pixels are replaced.
        fill: (n, C, S, S) or a 0, in normalised space: by what.
        is_alien: (n,) bool, True where it is by pixels of another image, not by `fill`.
        partner: (n,) int64, the other image; it may be the same one.
    """

    is_masked: Tensor
    fill: Tensor
    is_alien: Tensor
    partner: Tensor

    def apply(self, images: Tensor) -> Tensor:
        """Corrupted images: (n, C, S, S) normalised -> the same."""
        replacement = torch.where(self.is_alien.view(-1, 1, 1, 1), images[self.partner], self.fill.to(images))
        return torch.where(self.is_masked, replacement, images)


@dataclass(frozen=True)
class BlockCorruption:
    """How images are corrupted.

    Attributes:
        size: S.
        align: blocks start and end at multiples of it.
        share: greatest share of an image that is filled.
        fill: "noise", N(0, 1) per number in normalised space, or "zeros", the mean colour.
        alien_p: probability that an image gets pixels of another one.
        alien_share: share that these cover.
    """

    size: int
    align: int
    share: float
    fill: str
    alien_p: float
    alien_share: float

    def __post_init__(self) -> None:
        if self.size % self.align or int(0.3 * self.size) <= self.align:
            raise ObjectiveError(
                f"objective.align {self.align} does not fit images of {self.size} pixels: it has to divide the size "
                f"and to be less than the longest side of a block, {int(0.3 * self.size)} (1 fits from 7 pixels on)"
            )

    def of_batch(self, batch: dict[str, Tensor], images: Tensor) -> Corruption:
        """The corruption of a micro-batch.

        Args:
            batch: "seed" (B,) int64. "blocks" (n, K, 4), "fill", "is_alien" and "partner", if present, are used in
                place of what follows from the seed; a block is (row, column, height, width) in pixels.
            images: (n, C, S, S) with n = V * B, all images of the first view first.
        """
        num_samples = len(batch["seed"])
        seed = random_noise(batch["seed"], len(images) // num_samples).T.flatten()  # (n,)
        choices = uniform(seed, _NUM_CHOICES + 4 * _NUM_BLOCKS, _CHOICES)  # (n, ...)
        is_alien = choices[:, 1] < self.alien_p
        least = min(0.5, self.share)
        share = torch.where(is_alien, self.alien_share, least + (self.share - least) * choices[:, 0])
        blocks = blocks_from_uniform(choices[:, _NUM_CHOICES:], self.size, self.align)
        is_masked, _ = first_blocks(blocks, share, self.size, self.align)
        numbers = torch.arange(len(images), device=images.device)
        partner = numbers - numbers % num_samples + (choices[:, 2] * num_samples).long()  # of the same view
        fill = normal_noise(seed, images[0].numel()).view_as(images) if self.fill == "noise" else images.new_zeros(())
        drawn = Corruption(is_masked, fill, is_alien, partner)
        given: dict[str, Tensor] = {name: batch[name] for name in ("fill", "is_alien", "partner") if name in batch}
        if "blocks" in batch:
            given["is_masked"] = mask_from_blocks(batch["blocks"], self.size)
        return replace(drawn, **given)


def block_corruption(config: CorruptionConfig, backbone: ImageEncoder) -> BlockCorruption:
    """The corruption that the settings ask for.

    Raises:
        ObjectiveError: blocks of this alignment do not fit the image.
    """
    return BlockCorruption(
        size=backbone.image_size,
        align=config.align,
        share=config.share,
        fill=config.fill,
        alien_p=config.alien_p,
        alien_share=config.alien_share,
    )


def blocks_from_uniform(numbers: Tensor, size: int, align: int) -> Tensor:
    """Blocks of the authors' distribution.

    With randint(low, high) = low + floor(u * (high - low)): row and column are randint(0, size - align), rounded
    down to a multiple of `align`; height and width are randint(align, floor(0.3 * size)), cut off at the far edge and
    rounded to a multiple, half to even.

    Args:
        numbers: (n, 4 * K) in [0, 1), per block for row, column, height and width.

    Returns:
        (n, K, 4) int64 (row, column, height, width) in pixels.
    """
    split = numbers.unflatten(1, (-1, 4))  # (n, K, 4)
    start = (split[..., :2] * (size - align)).floor().div(align).floor() * align
    length = align + (split[..., 2:] * (int(0.3 * size) - align)).floor()
    length = (torch.minimum(length, size - start) / align).round() * align
    return torch.cat([start, length], dim=-1).long()


def first_blocks(blocks: Tensor, share: Tensor, size: int, align: int) -> tuple[Tensor, Tensor]:
    """The fewest first blocks of each image that together cover a share of it; all blocks if they do not.

    Args:
        blocks: (n, K, 4) int64, multiples of `align`.
        share: (n,) of the pixels, more than 0.

    Returns:
        (n, 1, size, size) bool, True in one of them, and how many they are, (n,) int64.
    """
    num_cells = size // align
    cover = _first_cover(blocks // align, num_cells)  # (n, cells, cells)
    covered = cover.new_zeros(len(blocks), blocks.shape[1] + 1)
    covered = covered.scatter_add(1, cover.flatten(1), torch.ones_like(cover).flatten(1)).cumsum(1)[:, :-1]  # (n, K)
    num_blocks = 1 + (covered[:, :-1] < share[:, None] * num_cells**2).sum(1)  # (n,)
    is_masked = cover < num_blocks.view(-1, 1, 1)
    if align > 1:
        is_masked = is_masked.repeat_interleave(align, 1).repeat_interleave(align, 2)
    return is_masked.unsqueeze(1), num_blocks


def mask_from_blocks(blocks: Tensor, size: int) -> Tensor:
    """True in any of the blocks: (n, K, 4) -> (n, 1, size, size); a block of height 0 is none."""
    return (_first_cover(blocks, size) < blocks.shape[1]).unsqueeze(1)


def _first_cover(blocks: Tensor, size: int) -> Tensor:
    """Number of the first block that covers each cell, K where none does: (n, K, 4) -> (n, size, size) int64.

    Block k weighs 2^-k, so the exponent of the sum of the weights over a cell names the first block on it. The sums are
    one matrix product per image. All weights are exact, in float32 for K <= 240 and also in TF32. Where 24 blocks in a
    row cover the same cell, the sum may be rounded up to the weight of the block before the first.
    """
    num_blocks = blocks.shape[1]
    start, length = blocks[..., :2, None], blocks[..., 2:, None]  # (n, K, 2, 1)
    cells = torch.arange(size, device=blocks.device)
    is_inside = (cells >= start) & (cells < start + length)  # (n, K, 2, size): rows, columns
    top = num_blocks // 2  # exponent of the first weight; the last one's is about -top
    exponent = top - torch.arange(num_blocks, device=blocks.device)
    power = (exponent + 127 << 23).int().view(torch.float32)  # (K,) 2^exponent by its bits, because pow may round
    with torch.autocast(blocks.device.type, enabled=False):
        rows = is_inside[:, :, 0] * power[:, None]  # (n, K, size)
        weight = rows.mT @ is_inside[:, :, 1].float()  # (n, size, size)
    first = top + 1 - torch.frexp(weight).exponent.long()  # frexp's mantissa is in [0.5, 1)
    return torch.where(weight > 0, first.clamp_min(0), num_blocks)


def normal_noise(seed: Tensor, count: int) -> Tensor:
    """(n,) seeds to (n, count) float32 of N(0, 1), two from each 64-bit hash (Box, Muller 1958)."""
    bits = random_noise(seed, (count + 1) // 2, _NOISE)
    radius = (((bits >> 32) + 1).float() / 2**31).log().mul(-2).sqrt()  # of a number in (0, 1]
    angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi / 2**32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :count]
