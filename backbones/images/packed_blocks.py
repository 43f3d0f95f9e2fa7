"""Blocks of a plain ViT on crops of several sizes in one pass, with stochastic depth that leaves whole samples out.

Norms, projections and MLPs treat each token alone: for them the tokens of all sizes stand in one matrix. Attention runs
by size. The numbers are those of one pass per size.

Stochastic depth as in DINOv2 (M. Oquab et al., 2023, arXiv:2304.07193, section 5, "Efficient stochastic depth"): a
branch is computed for k of B samples and scaled by B / k, instead of for all of them and then zeroed for some.

Not here: what is read of timm's modules (`backbones.images.timm_internals`), drawing (whoever calls).

Legend: B samples of one size, N patches, P prefix tokens, D width, T tokens of all samples that take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbones.images import timm_internals

__all__ = ["BlockDraw", "Crops", "pack_blocks"]


class Crops(NamedTuple):
    """Images of one size.

    Attributes:
        images: (B, C, H, W), normalized pixels.
        is_masked: (B, N) bool, patches whose place `mask_token` takes; None: none.
        mask_token: (1, D).
    """

    images: Tensor
    is_masked: Tensor | None = None
    mask_token: Tensor | None = None


class BlockDraw(NamedTuple):
    """What is random in one block for the crops of one size; by default nothing.

    Attributes:
        coords: shift and factor of the (row, column) coordinates in [-1, 1] of rotary positions, both (2,): they become
            (coordinates + shift) * factor.
        attention, mlp: (k,) int64, the samples whose branch is computed; None: all.
    """

    coords: tuple[Tensor, Tensor] | None = None
    attention: Tensor | None = None
    mlp: Tensor | None = None


def pack_blocks(vit: nn.Module) -> None:
    """Let each block also take a list of token streams, (B, P + N, D) each, with rotary tables and `BlockDraw`s.

    `forward` is replaced on the instances, as compiling and recomputing blocks do: names in state dicts and the hooks
    of engines stay as they are. Called with one stream, a block does what it did.

    Raises:
        BackboneError: the blocks are of a kind whose branches are not known here.
    """
    for block in timm_internals.blocks(vit):
        timm_internals.require_packable(block)
        if not isinstance(block.forward, _PackedForward):
            block.forward = _PackedForward(block)


class _PackedForward:
    """The forward of a block, of one stream or of several. A copy of the block gets a copy of this for itself."""

    def __init__(self, block: Any) -> None:
        self._block = block

    def __call__(self, streams: Any, *arguments: Any, **options: Any) -> Any:
        if not isinstance(streams, list):
            return type(self._block).forward(self._block, streams, *arguments, **options)
        return _run(self._block, streams, *arguments)


def _run(block: Any, streams: list[Tensor], rotary: list[Tensor | None], draws: Sequence[BlockDraw]) -> list[Tensor]:
    def attention(tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
        return timm_internals.attention_branch(block, tokens, shapes, rotary)

    def mlp(tokens: Tensor, shapes: list[torch.Size]) -> Tensor:
        return timm_internals.mlp_branch(block, tokens)

    streams = _add(streams, attention, [draw.attention for draw in draws])
    return _add(streams, mlp, [draw.mlp for draw in draws])


def _add(
    streams: list[Tensor], branch: Callable[[Tensor, list[torch.Size]], Tensor], chosen: Sequence[Tensor | None]
) -> list[Tensor]:
    """Streams plus their branch: of the chosen samples, scaled so that its expectation is that of all of them."""
    taking_part = [stream if idx is None else stream[idx] for stream, idx in zip(streams, chosen, strict=True)]
    tokens = torch.cat([stream.flatten(0, 1) for stream in taking_part])  # (T, D)
    shapes = [stream.shape for stream in taking_part]
    parts = branch(tokens, shapes).split([shape[0] * shape[1] for shape in shapes])
    added = []
    for stream, part, shape, idx in zip(streams, parts, shapes, chosen, strict=True):
        part = part.view(shape).to(stream.dtype)
        added.append(stream + part if idx is None else stream.index_add(0, idx, part, alpha=stream.shape[0] / shape[0]))
    return added
