"""Two ways to run the blocks of a model for less: compiled (time), or computed again in the backward pass (memory).

Both replace the `forward` of each block on its instance. Names in state dicts, hooks of an engine and the objective
that calls the blocks stay as they are. Which modules are blocks, the objective says (`Objective.repeated_blocks`).

Recomputation: T. Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174; of a block only
its input is kept. Random numbers (stochastic depth, dropout) come out the same the second time, and running statistics
of batch norms move the first time only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["compile_blocks", "recompute_blocks"]

COMPILER = "inductor"
# Sizes of crops times training, evaluation and gradients on or off; torch leaves more than 8 uncompiled by itself.
COMPILED_FORMS = 64


def compile_blocks(blocks: Sequence[nn.Module]) -> None:
    """Compile each block with `torch.compile`: at its first call, and again for inputs of other sizes.

    Blocks alike share their code. Losses change by rounding: fused kernels sum in another order. Each size has code of
    its own (`dynamic=False`): code for any size, which torch would make at the second one, keeps other tensors for the
    backward pass, and a block that is computed again there may not get it in the place of what ran forward.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, COMPILED_FORMS)
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=COMPILER, dynamic=False)


def recompute_blocks(blocks: Sequence[nn.Module]) -> None:
    """Keep the inputs of each block for the backward pass and nothing else; losses and gradients stay bit for bit."""
    for block in blocks:
        block.forward = _recomputed(block)


def _recomputed(block: nn.Module) -> Any:
    forward = block.forward
    contexts = partial(_contexts, block)

    @wraps(forward)
    def recomputed(*arguments: Any, **options: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **options)
        return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts, **options)

    return recomputed


def _contexts(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """What surrounds the first computation and the second."""
    return nullcontext(), _kept_statistics(block)


@contextmanager
def _kept_statistics(block: nn.Module) -> Iterator[None]:
    """Running statistics of batch norms are afterwards what they were before."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        for buffer, value in zip(buffers, before, strict=True):
            buffer.data.copy_(value)  # as the norm itself does: autograd, which saved the buffer, must not notice
