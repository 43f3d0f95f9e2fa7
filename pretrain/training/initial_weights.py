"""Initial weights that need not all be in memory: each rank keeps its share of what has not been touched for a while.

A model is initialized in several passes over all of it, its teacher begins as its copy, and a checkpoint may give it
other weights. So that a process need not hold all of that before an engine cuts it, or moves it to a GPU, the
parameters in memory that were untouched the longest are dropped above a budget, but for this rank's share of each; what
reads one brings it back from the shares of all ranks. Every operation runs when it is called, as without this.

    with initial_weights(zero_stage, device):
        objective = build_objective(recipe)
        ...                                     # fill it, cut it, move it to a device
                                                # what is left of it when the context ends is there to stay

Bringing back is a collective. So in this context all ranks do the same with the model, and what is dropped follows from
the order of operations on it alone, not from when Python collects garbage.

Not here: what a process holds while it trains (`pretrain.training.memory`), how weights are cut
(`pretrain.training.deepspeed_internals.partition`, `objectives.shards`).
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from objectives.distributed import gather_parts, num_ranks
from objectives.shards import share_of
from pretrain.training.torch_internals import DispatchMode, WeakStorage, written_by

__all__ = ["InitialWeights", "initial_weights"]

_BUDGET = 2**28  # bytes; a block of a ViT-7B has three times as many, which are touched one parameter at a time
_SMALLEST = 2**16  # bytes of a parameter that is worth it
_aten = torch.ops.aten
_LOOKS = {_aten.detach.default, _aten.view.default}  # another tensor of the same memory, which is not read yet
# What gives all of a tensor new numbers, whatever it had.
_REPLACES = {_aten.copy_.default, _aten.uniform_.default, _aten.normal_.default, _aten.zero_.default}
_REPLACES |= {_aten.fill_.Scalar}


def initial_weights(zero_stage: int, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model is built that will be trained like this; its numbers are those without it.

    Where all of it stays in the memory in which it is built, nothing is to be gained.
    """
    is_cut = zero_stage == 3 and num_ranks() > 1
    return nullcontext() if device.type == "cpu" and not is_cut else InitialWeights(device)


@dataclass(eq=False)
class _Known:
    """A storage that may be dropped.

    Attributes:
        share: this rank's part of its numbers, on the device; None: they have changed since one was taken.
    """

    weak: WeakStorage
    dtype: torch.dtype
    nbytes: int
    share: Tensor | None = None
    is_here: bool = True


class InitialWeights(DispatchMode):
    """In this context parameters of some size may be out of memory, which nobody notices.

    Only float tensors on the CPU are dropped, and come back whatever reads them, but for what goes around torch's
    operations, such as `Tensor.numpy`.
    """

    def __init__(self, device: torch.device, *, budget: int = _BUDGET) -> None:
        """Nothing is dropped before the context is entered.

        Args:
            device: where shares are kept, and travel: that of training.
            budget: bytes of such parameters that may be in memory, beside those that are in use.
        """
        super().__init__()
        self._device, self._budget = device, budget
        self._known: dict[int, _Known] = {}  # the longest untouched first
        self._bytes_here = 0

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if raised[0] is None and not all(known.is_here for known in self._known.values()):
            gc.collect()  # what nobody has any more is gone on all ranks then
            for known in self._known.values():
                if known.weak.storage() is not None:
                    self._bring_back(known)
        self._known.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function in _LOOKS:
            return function(*args, **options)
        replaced = self._replaced(function, args)
        for known in self._those_of([*args, *options.values()]):
            self._bring_back(known, is_empty=known is replaced)
        result = function(*args, **options)
        for tensor in _tensors_in(written_by(function, args, options)):
            self._has_changed(tensor)
        if function is _aten.clone.default and self._find(args[0]) is not None:
            self._learn(result)  # such as a teacher's
        if in_use := self._those_of([*args, *options.values()]):  # what one rank does with other tensors is its own
            self._make_room(in_use)
        return result

    def _replaced(self, function: Any, args: Sequence[Any]) -> _Known | None:
        """The storage whose numbers an operation does not read, since it gives all of it new ones."""
        if function not in _REPLACES or not args[0].is_contiguous():
            return None
        known = self._find(args[0])
        if known is None or known in self._those_of(args[1:]):
            return None
        return known if args[0].numel() * args[0].element_size() == known.nbytes else None

    def _has_changed(self, tensor: Tensor) -> None:
        known = self._find(tensor)
        if known is None:
            if isinstance(tensor, nn.Parameter):
                self._learn(tensor)
        elif tensor.untyped_storage().nbytes() == known.nbytes:
            known.share = None
        else:  # it was given another size, by `resize_`
            self._bytes_here -= known.nbytes
            del self._known[tensor.untyped_storage()._cdata]

    # What is known, and what of it is in memory

    def _find(self, tensor: Tensor) -> _Known | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not self._known:
            return None
        key = tensor.untyped_storage()._cdata  # not used again as long as there is a weak reference
        known = self._known.pop(key, None)
        if known is not None:
            self._known[key] = known  # the last touched
        return known

    def _those_of(self, values: Sequence[Any]) -> list[_Known]:
        found = (self._find(tensor) for tensor in _tensors_in(values))
        return [known for known in found if known is not None]

    def _learn(self, tensor: Tensor) -> None:
        """From now on it may be dropped, if it is of some size and owns its memory."""
        if tensor.device.type != "cpu" or not tensor.is_floating_point():
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() >= _SMALLEST and storage.resizable():
            self._known[storage._cdata] = _Known(WeakStorage(storage), tensor.dtype, storage.nbytes())
            self._bytes_here += storage.nbytes()

    def _make_room(self, in_use: Sequence[_Known]) -> None:
        """Drop the longest untouched, and in their turn those that are gone: other ranks may still have them."""
        if self._bytes_here <= self._budget:
            return
        for key, known in list(self._known.items()):
            if self._bytes_here <= self._budget:
                return
            if known.is_here and known not in in_use:
                self._drop(known)
            if not known.is_here and known.weak.storage() is None:
                del self._known[key]

    def _drop(self, known: _Known) -> None:
        known.is_here = False
        self._bytes_here -= known.nbytes
        storage = known.weak.storage()
        if storage is not None:
            if known.share is None:
                known.share = share_of(_numbers_in(storage, known.dtype)).to(self._device)
            storage.resize_(0)

    def _bring_back(self, known: _Known, *, is_empty: bool = False) -> None:
        """Into memory; with `is_empty` without its numbers. Else a collective."""
        if known.is_here:
            return
        storage = known.weak.storage()
        assert storage is not None and known.share is not None  # somebody has it, and it was dropped
        storage.resize_(known.nbytes)
        known.is_here = True
        self._bytes_here += known.nbytes
        if not is_empty:
            numbers = _numbers_in(storage, known.dtype)
            numbers.copy_(gather_parts(known.share).flatten()[: numbers.numel()])


def _numbers_in(storage: torch.UntypedStorage, dtype: torch.dtype) -> Tensor:
    """All of a storage, flat."""
    return torch.empty(0, dtype=dtype).set_(storage)


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
