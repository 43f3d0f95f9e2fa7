"""A block of a plain ViT that computes the class token alone, as the last one may where nothing else is asked for.

Its other tokens are then keys and values only: a third of the linear layers of its attention and all of its MLP see one
token per image. NOT here: what is read of timm's modules (`backbones.images.timm_internals`).

Legend: B batch, N patches, P prefix tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from backbones.images import timm_internals

__all__ = ["prepare_class_token"]


def prepare_class_token(vit: nn.Module) -> bool:
    """Let the last block also be called with `class_only=True`: it then returns the class token alone, (B, 1, D).

    `forward` is replaced on the instance, as packing, compiling and recomputing blocks do: names in state dicts and the
    hooks of engines stay as they are.

    Returns:
        Whether it can be: there is a class token, and the block is of a kind whose branches are known here.
    """
    *_, block = timm_internals.blocks(vit)
    if not timm_internals.has_class_token(vit) or not timm_internals.has_known_branches(block):
        return False
    if not isinstance(block.forward, _ClassForward):
        block.forward = _ClassForward(block)
    return True


class _ClassForward:
    """The forward of a block, for all tokens or one. A copy of the block gets a copy of this for itself."""

    def __init__(self, block: Any) -> None:
        self._block, self._forward = block, block.forward

    def __call__(self, tokens: Any, *arguments: Any, class_only: bool = False, **options: Any) -> Any:
        if class_only:
            return _class_token(self._block, tokens, *arguments, **options)
        return self._forward(tokens, *arguments, **options)


def _class_token(block: Any, tokens: Tensor, rope: Tensor | None = None) -> Tensor:
    """(B, 1, D) of tokens (B, P + N, D), with the stochastic depth that the block has."""
    added = timm_internals.class_attention_branch(block, tokens, rope)
    token = tokens[:, :1] + block.drop_path1(added)
    return token + block.drop_path2(timm_internals.mlp_branch(block, token))
