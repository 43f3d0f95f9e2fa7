"""The float32 weights of many parameters, wherever DeepSpeed keeps them: whole, in one collective, or a rank's shares.

`deepspeed.utils.safe_get_full_fp32_param` does the same for one parameter with a collective each: hundreds of small
messages where a few large ones do. The values are the same, bit for bit.

Not here: what they are wanted for (`objectives.teacher`, `pretrain.training.engine`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pretrain.training import deepspeed_internals

__all__ = ["read_shares", "read_weights"]


@torch.no_grad()
def read_weights(parameters: Sequence[nn.Parameter], stage: int) -> list[Tensor]:
    """The whole float32 value of each parameter, in its own shape. A collective when ZeRO or bf16 keep any elsewhere.

    Args:
        parameters: The same on all ranks, in the same order.
        stage: The ZeRO stage that they are trained with.

    Returns:
        Tensors that may share memory with the parameters: read them before the next step. A frozen parameter has no
        float32 master: its value is as precise as the engine's type.
    """
    elsewhere = [p for p in parameters if stage == 3 or (p.requires_grad and p.dtype != torch.float32)]
    found = (_joined if stage == 3 else _summed)(elsewhere) if elsewhere else []
    masters = dict(zip(map(id, elsewhere), found, strict=True))
    return [
        (masters[id(parameter)] if id(parameter) in masters else parameter.detach().float()).reshape(
            deepspeed_internals.full_shape(parameter)
        )
        for parameter in parameters
    ]


@torch.no_grad()
def read_shares(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """ZeRO-3: of every parameter this rank's part, flat and of one length on all ranks; the last ones end in padding.

    They may share memory with the parameters: read them before the next step.
    """
    return [deepspeed_internals.master_share(parameter) for parameter in parameters]


def _joined(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """ZeRO-3: what the shares of all ranks make together."""
    parts = read_shares(parameters)
    own = torch.cat(parts)
    gathered = own.new_empty(dist.get_world_size() * len(own))
    dist.all_gather_into_tensor(gathered, own)  # all ranks: each needs every part
    columns = gathered.view(dist.get_world_size(), -1).split([len(part) for part in parts], dim=1)
    return [
        column.flatten()[: deepspeed_internals.full_shape(parameter).numel()]
        for parameter, column in zip(parameters, columns, strict=True)
    ]


def _summed(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """bf16 below ZeRO-3: each rank has a slice of some parameters, of any length; elsewhere it adds zeros."""
    lengths = [parameter.numel() for parameter in parameters]
    flat = torch.zeros(sum(lengths), device=parameters[0].device)
    for parameter, whole in zip(parameters, flat.split(lengths), strict=True):
        if (own := deepspeed_internals.master_slice(parameter)) is not None:
            start, values = own
            whole[start : start + values.numel()] = values.flatten()
    dist.all_reduce(flat)  # all ranks: each needs every slice
    return list(flat.split(lengths))
