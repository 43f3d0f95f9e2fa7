"""Weights by name of which no rank needs to hold more than one tensor whole: each comes when it is asked for.

    Sent        one rank can read them, and sends each to the others
    Shared      each rank keeps its share of each, in memory of the host

Asking is a collective: all ranks ask for the same names in the same order.

Not here: what becomes of them (`pretrain.training.state`, `pretrain.training.handover`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor

from objectives.distributed import gather_parts
from objectives.shards import share_of

__all__ = ["Sent", "Shared"]


class Sent(Mapping[str, Tensor]):
    """What rank 0 can read.

    Args:
        shells: Of all of them, on torch's meta device.
        weights: The same names; read on rank 0 alone.
        device: On which they travel.
    """

    def __init__(self, shells: Mapping[str, Tensor], weights: Mapping[str, Tensor], device: torch.device) -> None:
        self._shells, self._weights, self._device = shells, weights, device

    def __getitem__(self, name: str) -> Tensor:
        shell = self._shells[name]
        if dist.get_rank() == 0:
            tensor = self._weights[name].to(self._device).contiguous()
        else:
            tensor = torch.empty(shell.shape, dtype=shell.dtype, device=self._device)
        dist.broadcast(tensor, src=0)  # all ranks: each has the same
        return tensor.cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self._shells)

    def __len__(self) -> int:
        return len(self._shells)

    def __contains__(self, name: object) -> bool:  # without asking for it
        return name in self._shells


class Shared(MutableMapping[str, Tensor]):
    """What all ranks had, the same, when it was put in; nothing of it is lost when that is freed or changed.

    Args:
        device: On which shares travel.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._shares: dict[str, tuple[Tensor, torch.Size]] = {}

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._shares[name] = (share_of(tensor).cpu(), tensor.shape)

    def __getitem__(self, name: str) -> Tensor:
        share, shape = self._shares[name]
        return gather_parts(share.to(self._device)).flatten()[: shape.numel()].view(shape).cpu()

    def __delitem__(self, name: str) -> None:
        del self._shares[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shares)

    def __len__(self) -> int:
        return len(self._shares)

    def __contains__(self, name: object) -> bool:  # without asking for it
        return name in self._shares

    def clear(self) -> None:
        self._shares.clear()
