"""Initial weights that need not all be in memory: what was drawn is dropped, and drawn again alike when it is read.

A model is initialized in several passes over all of it, each of which draws from one random generator, and its teacher
begins as its copy. So that a process need not hold all of that before an engine cuts it, a parameter is known by the
operations that made its numbers, with the state of the generator before each. Of those in memory the longest untouched
are dropped above a budget; what reads them brings them back, bit for bit. Nothing is drawn in another order: every
operation runs when it is called, as without this.

    with initial_weights(zero_stage, device):
        objective = build_objective(recipe)
        ...                                     # fill it, cut it, move it to a device
                                                # what is left of it when the context ends is there to stay

Not here: what a process holds while it trains (`pretrain.training.memory`), how weights are cut
(`pretrain.training.deepspeed_internals.partition`, `objectives.shards`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from objectives.distributed import gather_parts, num_ranks
from objectives.shards import share_of
from pretrain.training.torch_internals import DispatchMode, WeakStorage, is_in_place, written_by

__all__ = ["InitialWeights", "initial_weights"]

_BUDGET = 2**28  # bytes; a block of a ViT-7B has three times as many, which are touched one parameter at a time
_SMALLEST = 2**16  # bytes of a parameter that is worth it
_aten = torch.ops.aten
_LOOKS = {_aten.detach.default, _aten.view.default}  # another tensor of the same memory, which is not read yet
_DRAWS = {_aten.uniform_.default, _aten.normal_.default, _aten.zero_.default, _aten.fill_.Scalar}


def initial_weights(zero_stage: int, device: torch.device) -> AbstractContextManager[object]:
    """The context in which a model is built that will be trained like this; its numbers are those without it.

    Where all of it stays in the memory in which it is built, nothing is to be gained.
    """
    is_cut = zero_stage == 3 and num_ranks() > 1
    if device.type == "cpu" and not is_cut:
        return nullcontext()
    return InitialWeights(cut_over=device if is_cut else None)


class _Layout(NamedTuple):
    """How a tensor lies in its storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> _Layout:
        return cls(tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.dtype)

    @property
    def size_in_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize

    def on(self, storage: torch.UntypedStorage) -> Tensor:
        return torch.empty(0, dtype=self.dtype).set_(storage, self.offset, self.size, self.stride)


class _Operation(NamedTuple):
    """One that changed a tensor in place, of which the arguments beside the tensor are numbers.

    Attributes:
        generator: its state before; None: nothing was drawn.
    """

    function: Any
    layout: _Layout
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    generator: Tensor | None

    def repeat(self, storage: torch.UntypedStorage) -> None:
        if self.generator is not None:
            torch.set_rng_state(self.generator)
        self.function(self.layout.on(storage), *self.arguments, **self.options)


class _Written(NamedTuple):
    """Numbers that came from elsewhere, the same on all ranks, of which each keeps a share: a collective."""

    layout: _Layout
    share: Tensor

    def repeat(self, storage: torch.UntypedStorage) -> None:
        target = self.layout.on(storage)
        target.copy_(gather_parts(self.share).flatten()[: target.numel()].view(target.shape))


_History = tuple[_Operation | _Written, ...]


@dataclass
class _Known:
    """A storage whose numbers can be made again."""

    weak: WeakStorage
    nbytes: int
    history: _History
    is_here: bool = True


class InitialWeights(DispatchMode):
    """In this context parameters whose numbers were drawn may be out of memory, which nobody notices.

    Only float tensors on the CPU are dropped, and come back whatever reads them, but for what goes around torch's
    operations, such as `Tensor.numpy`.
    """

    def __init__(self, *, budget: int = _BUDGET, cut_over: torch.device | None = None) -> None:
        """Nothing is dropped before the context is entered.

        Args:
            budget: bytes of such parameters that may be in memory, beside those that are in use.
            cut_over: every rank does the same here, on this device, and each parameter will be cut: so of numbers that
                are copied into one, such as those of a checkpoint, a rank keeps its share as well.
        """
        super().__init__()
        self._budget, self._device = budget, cut_over
        self._known: dict[int, _Known] = {}  # the longest untouched first
        self._bytes_here = 0

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        if raised[0] is None:
            for known in self._known.values():
                self._bring_back(known)
        self._known.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        if function in _LOOKS:
            return function(*args, **options)
        target = args[0] if args and isinstance(args[0], Tensor) else None
        if function is _aten.clone.default and (known := self._whole(target)) is not None:
            return self._copied(args[0], known)
        if function is _aten.copy_.default and self._takes(args[0], args[1]):
            return args[0]
        if target is not None and is_in_place(function) and _are_numbers(args[1:], options):
            result = self._changed(function, target, args[1:], options)
        else:
            result = self._run(function, args, options)
        self._make_room(args)
        return result

    def _run(self, function: Any, args: Any, options: dict[str, Any]) -> Any:
        """An operation like any other: it reads what was dropped, and what it writes is not known any more."""
        if function is _aten.copy_.default and self._covers(args[0]) and (known := self._find(args[0])) is not None:
            self._bring_back(known, is_empty=True)
        for known in self._those_of([*args, *options.values()]):
            self._bring_back(known)
        result = function(*args, **options)
        for tensor in _tensors_in(written_by(function, args, options)):
            self._forget(tensor)
            if function is _aten.copy_.default:
                self._keep_share(tensor)
        return result

    def _changed(self, function: Any, target: Tensor, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
        """An operation on one tensor in place: from now on part of what its numbers are made by."""
        known, is_whole = self._find(target), self._covers(target)
        is_drawn = function in _DRAWS and is_whole
        if known is None and not (is_drawn and _can_be_dropped(target)):
            return function(target, *args, **options)
        if known is None:
            known = self._learn(target)
        self._bring_back(known, is_empty=is_drawn)
        before = torch.get_rng_state()
        result = function(target, *args, **options)
        generator = None if torch.equal(before, torch.get_rng_state()) else before
        done = _Operation(function, _Layout.of(target), args, options, generator)
        known.history = (done,) if is_drawn else (*known.history, done)
        return result

    def _copied(self, source: Tensor, known: _Known) -> Tensor:
        """A clone, which is made when somebody reads it."""
        clone = torch.empty_like(source)
        self._share_history(clone, known)
        return clone

    def _takes(self, target: Tensor, source: Tensor) -> bool:
        """Whether `target.copy_(source)` is done by saying that its numbers are made alike."""
        known = self._whole(source)
        if known is None or not self._covers(target) or _Layout.of(target) != _Layout.of(source):
            return False
        if target.untyped_storage()._cdata != source.untyped_storage()._cdata:
            if self._find(target) is None and not _can_be_dropped(target):
                return False
            self._forget(target)
            self._share_history(target, known)
        return True

    def _share_history(self, target: Tensor, known: _Known) -> None:
        own = self._learn(target)
        own.history = known.history
        self._drop(own)

    def _keep_share(self, target: Tensor) -> None:
        """Of numbers that were copied into a parameter keep this rank's share."""
        if self._device is not None and self._covers(target) and _can_be_dropped(target):
            share = share_of(target).to(self._device)
            self._learn(target).history = (_Written(_Layout.of(target), share),)

    # What is known, and what of it is in memory

    def _find(self, tensor: Tensor) -> _Known | None:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not self._known:
            return None
        key = tensor.untyped_storage()._cdata
        known = self._known.pop(key, None)
        if known is not None:
            self._known[key] = known  # the last touched
        return known

    def _those_of(self, values: Sequence[Any]) -> list[_Known]:
        found = (self._find(tensor) for tensor in _tensors_in(values))
        return [known for known in found if known is not None]

    def _whole(self, tensor: Tensor | None) -> _Known | None:
        """What is known of a tensor that is all of its storage, in order."""
        known = None if tensor is None else self._find(tensor)
        return known if known is not None and self._covers(tensor) else None  # type: ignore[arg-type]

    def _covers(self, tensor: Tensor) -> bool:
        if tensor.device.type != "cpu" or tensor.layout is not torch.strided or not tensor.is_contiguous():
            return False
        known = self._find(tensor)
        nbytes = tensor.untyped_storage().nbytes() if known is None else known.nbytes
        return tensor.numel() * tensor.element_size() == nbytes

    def _learn(self, tensor: Tensor) -> _Known:
        storage = tensor.untyped_storage()
        known = self._known[storage._cdata] = _Known(WeakStorage(storage), storage.nbytes(), ())
        self._bytes_here += known.nbytes
        return known

    def _forget(self, tensor: Tensor) -> None:
        """Its numbers are there to stay."""
        known = self._find(tensor)
        if known is not None:
            self._bring_back(known, is_empty=True)
            self._bytes_here -= known.nbytes
            del self._known[tensor.untyped_storage()._cdata]

    def _drop(self, known: _Known) -> None:
        storage = known.weak.storage()
        if known.is_here:
            self._bytes_here -= known.nbytes
            known.is_here = False
            if storage is not None:
                storage.resize_(0)

    def _bring_back(self, known: _Known, *, is_empty: bool = False) -> None:
        """Into memory; with `is_empty` without its numbers."""
        storage = known.weak.storage()
        if known.is_here or storage is None:
            return
        storage.resize_(known.nbytes)
        known.is_here = True
        self._bytes_here += known.nbytes
        if is_empty:
            return
        twin = next((other for other in self._alike(known) if other is not None), None)
        if twin is not None:
            storage.copy_(twin)
            return
        now = torch.get_rng_state()
        with torch.no_grad():
            for operation in known.history:
                operation.repeat(storage)
        torch.set_rng_state(now)
        self._keep_for_twins(known, storage)

    def _keep_for_twins(self, known: _Known, storage: torch.UntypedStorage) -> None:
        """Gathering is faster than drawing: what a copy will need, too, becomes a share of it."""
        twins = [other for other in self._known.values() if other.history is known.history]
        layout = known.history[-1].layout
        if self._device is None or len(twins) == 1 or isinstance(known.history[-1], _Written):
            return
        if layout.size_in_bytes == known.nbytes:
            history = (_Written(layout, share_of(layout.on(storage)).to(self._device)),)
            for twin in twins:
                twin.history = history

    def _alike(self, known: _Known) -> Iterator[torch.UntypedStorage | None]:
        """Storages in memory whose numbers were made by the same operations."""
        for other in self._known.values():
            if other is not known and other.is_here and other.history is known.history:
                yield other.weak.storage()

    def _make_room(self, in_use: Any) -> None:
        if self._bytes_here <= self._budget:
            return
        for key in [key for key, known in self._known.items() if known.weak.storage() is None]:
            gone = self._known.pop(key)
            self._bytes_here -= gone.nbytes if gone.is_here else 0
        used = [id(known) for known in self._those_of(list(in_use))]
        for known in list(self._known.values()):
            if self._bytes_here <= self._budget:
                return
            if id(known) not in used:
                self._drop(known)


def _can_be_dropped(tensor: Tensor) -> bool:
    """A parameter of some size on the CPU that owns its memory."""
    storage = tensor.untyped_storage()
    is_large = storage.nbytes() >= _SMALLEST and tensor.is_floating_point()
    return isinstance(tensor, nn.Parameter) and is_large and storage.resizable()


def _are_numbers(args: Sequence[Any], options: dict[str, Any]) -> bool:
    """Whether arguments are numbers, or None: an operation with these can be done again."""
    return all(value is None or isinstance(value, int | float) for value in (*args, *options.values()))


def _tensors_in(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors_in(value)
