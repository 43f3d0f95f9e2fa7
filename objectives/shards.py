"""Modules of which each rank holds a share, and which are whole, a part at a time, only while they compute.

ZeRO stage 3 (S. Rajbhandari et al., 2019, arXiv:1910.02054) for modules that are not trained. A parameter of n numbers
is cut, flat, into as many parts of ceil(n / R) numbers as there are ranks, the last ones filled up with zeros. That is
how DeepSpeed cuts those of a student, so that shares of a teacher and of its student match number by number.

Between its uses a parameter keeps its shape and reads as NaN, without memory: a use that has gathered nothing cannot go
unnoticed.

Not here: what becomes of the shares (`objectives.companions`, `objectives.teacher`).

Legend: R ranks, n numbers of a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from objectives.blocks import outer_blocks
from objectives.distributed import gather_parts, num_ranks, rank

__all__ = ["Shards", "share_of", "units_of"]

# Autocast multiplies by their weights in its own type, whatever they are in: so these may travel in it. Not so biases,
# which DeepSpeed's own linear function, put in the place of torch's under ZeRO-3, adds as they are.
_CAST = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LARGE = 2**18  # numbers of a parameter that is worth a collective of its own


class Shards:
    """Takes over the parameters of some modules that are used without gradients; their buffers stay as they are.

    Each of these units is gathered when its `forward` begins, large parameters each by itself and the others together,
    and dropped when that ends.
    """

    def __init__(self, units: Sequence[nn.Module], device: torch.device | None = None) -> None:
        """Cuts the parameters of these modules, which are the same on all ranks now, on a device or where they are."""
        self._units = units
        self._shares: dict[nn.Parameter, Tensor] = {}
        self._cast: set[nn.Parameter] = set()
        self._is_whole = False
        for unit in self._units:
            unit.to(device or next(unit.parameters()).device)
            for parameter in unit.parameters():
                if parameter not in self._shares:
                    self._shares[parameter] = share_of(parameter)
            self._cast |= {part.get_parameter("weight") for part in unit.modules() if type(part) in _CAST}
            self._empty(unit)
            unit.register_forward_pre_hook(self._before)
            unit.register_forward_hook(self._after, always_call=True)

    def __contains__(self, tensor: Tensor) -> bool:
        return tensor in self._shares

    def __len__(self) -> int:
        return len(self._shares)

    def share(self, parameter: nn.Parameter) -> Tensor:
        """This rank's part, (ceil(n / R),)."""
        return self._shares[parameter]

    def release(self) -> None:
        """Give the memory of the shares back; nothing can be gathered any more."""
        for share in self._shares.values():
            share.data = share.new_empty(0)

    def write(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a parameter a value: whole, in its shape, and the same on all ranks."""
        self._shares[parameter].copy_(share_of(value))

    def read(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype | None = None) -> list[Tensor]:
        """The whole values, in the type of the shares or another. One collective."""
        if not parameters:
            return []
        shares = [self._shares[parameter] for parameter in parameters]
        own = torch.cat(shares) if len(shares) > 1 else shares[0]  # one travels as it is, and is not copied on arrival
        rows = gather_parts(own.to(dtype or own.dtype))  # (R, sum of lengths)
        columns = rows.split([len(share) for share in shares], dim=1)
        return [
            column.flatten()[: parameter.numel()].view(parameter.shape)
            for parameter, column in zip(parameters, columns, strict=True)
        ]

    @contextmanager
    def whole(self) -> Iterator[None]:
        """In this context all parameters are there to be read. A collective."""
        for unit in self._units:
            self._fill(unit)
        self._is_whole = True
        try:
            yield
        finally:
            self._is_whole = False
            for unit in self._units:
                self._empty(unit)

    def _before(self, unit: nn.Module, _: Any) -> None:
        if not self._is_whole:
            self._fill(unit)

    def _after(self, unit: nn.Module, *_: Any) -> None:
        if not self._is_whole:
            self._empty(unit)

    @torch.no_grad()
    def _fill(self, unit: nn.Module) -> None:
        """Make it whole; all ranks come here for the same units in the same order."""
        small: list[nn.Parameter] = []
        for parameter in unit.parameters():
            kind = parameter.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            if parameter.numel() < _LARGE:
                small.append(parameter)
            else:
                (parameter.data,) = self.read([parameter], dtype if parameter in self._cast else None)
        for parameter, value in zip(small, self.read(small), strict=True):
            parameter.data = value

    def _empty(self, unit: nn.Module) -> None:
        """Free the memory of its parameters."""
        for parameter in unit.parameters():
            parameter.data = self._shares[parameter].new_full((), torch.nan).expand(parameter.shape)


def units_of(module: nn.Module) -> list[nn.Module]:
    """What to gather each by itself: blocks, and elsewhere the outermost modules with parameters of their own.

    What an encoder or its network has of its own (class token, positions) is in none: it is read outside of any
    `forward`, and small.
    """
    encoders = {part for part in module.modules() if isinstance(part, Encoder)}
    # An encoder is used by other methods than `forward`, and so is whatever it is in.
    not_called = {encoder.network for encoder in encoders}
    not_called |= {part for part in module.modules() if not encoders.isdisjoint(part.modules())}
    blocks = set(outer_blocks(module))

    def within(part: nn.Module) -> Iterator[nn.Module]:
        has_own = any(True for _ in part.parameters(recurse=False))
        if part not in not_called and (has_own or part in blocks):
            yield part
        else:
            for child in part.children():
                yield from within(child)

    return list(within(module))


def share_of(value: Tensor) -> Tensor:
    """This rank's part of a whole value, which is as long on all ranks: (ceil(n / R),), filled up with zeros."""
    length = -(-value.numel() // num_ranks())
    own = value.detach().flatten()[rank() * length :][:length]
    share = value.new_zeros(length)
    share[: len(own)] = own
    return share
