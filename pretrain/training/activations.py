"""How much memory a forward pass keeps for the backward pass, found by running it on tensors without numbers.

On torch's meta device tensors have shapes and types and no memory: a model of billions of parameters takes seconds.
What autograd keeps is counted by storage, so that views of one piece of memory count once. What is in use for a moment
only, such as the teacher's tokens or the gradient of a block, is not.

Not here: parameters, gradients and moments (`pretrain.training.outlook`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from backbones.errors import BackboneError
from data_pipelines.errors import DataError
from data_pipelines.views.base import View
from objectives.base import Objective, Progress
from objectives.distributed import foreseen_ranks
from objectives.errors import ObjectiveError
from pretrain.config.schema import Recipe
from pretrain.training.torch_internals import without_numbers

__all__ = ["kept_by_forward"]

Storages = dict[int, torch.UntypedStorage]  # by their identity


def kept_by_forward(recipe: Recipe, objective: Objective, views: Sequence[View]) -> int | None:
    """Bytes that each worker keeps of a micro-batch, the batch itself among them.

    Args:
        recipe: Of the stage.
        objective: Built from it on the meta device, in the types that it trains in.
        views: What it is shown.

    Returns:
        None where a view does not know its shape, or the objective looks at numbers.

    Raises:
        BackboneError, DataError, ObjectiveError: The objective refuses such a micro-batch on so many ranks.
    """
    batch = _batch(recipe, objective, views)
    if batch is None:
        return None
    steps = recipe.train.steps
    last = Progress(steps - 1, steps, is_logged=False)  # nothing is held back any more
    kept = _Kept()
    try:
        with without_numbers(), foreseen_ranks(recipe.train.workers), kept.watching(objective):
            objective(batch, last)
    except (BackboneError, DataError, ObjectiveError):
        raise
    except Exception:  # of code that looks at numbers, and may well work where there are some
        return None
    weights = _storages([*objective.parameters(), *objective.buffers()])
    return kept.size(_storages(batch.values()), weights, recomputes_blocks=recipe.train.checkpoint_blocks)


def _batch(recipe: Recipe, objective: Objective, views: Sequence[View]) -> Mapping[str, Tensor] | None:
    """A micro-batch as an objective gets it, without numbers; None where a view does not know the shape of it."""
    num_samples, encoder = recipe.train.micro_batch_size, objective.backbone
    batch = {name: torch.empty(num_samples or 1, dtype=torch.int64, device="meta") for name in ("sample_id", "seed")}
    for view in views:
        shapes = view.shapes(encoder.channels_of(view.kind))
        if shapes is None:
            return None
        first = [*([] if view.times is None else [view.times]), num_samples or 1]
        for name, (shape, dtype) in shapes.items():
            batch[name] = torch.empty(*first, *shape, dtype=dtype, device="meta")
    return batch


class _Kept:
    """Storages that are kept: outside of the repeated blocks, by each call of one, and as the inputs of these calls."""

    def __init__(self) -> None:
        self._outside: Storages = {}
        self._calls: list[Storages] = []
        self._inputs: Storages = {}
        self._here = self._outside

    @contextmanager
    def watching(self, objective: Objective) -> Iterator[None]:
        """In this context what autograd keeps is noted."""
        hooks: list[RemovableHandle] = []
        for block in objective.repeated_blocks():
            hooks.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _note(self, tensor: Tensor) -> Tensor:
        self._here |= _storages([tensor])
        return tensor

    def _enter(self, _: torch.nn.Module, arguments: Any, options: Any) -> None:
        if torch.is_grad_enabled():
            self._inputs |= _storages(_tensors([arguments, options]))
            self._calls.append({})
            self._here = self._calls[-1]

    def _leave(self, *_: Any) -> None:
        self._here = self._outside

    def size(self, batch: Storages, weights: Storages, *, recomputes_blocks: bool) -> int:
        """Bytes.

        Args:
            batch: What is kept anyway.
            weights: What is counted elsewhere.
            recomputes_blocks: Of the blocks only their inputs are kept, and what one of them at a time computes again.
        """
        if not recomputes_blocks:
            return _bytes(batch | self._outside | {key: s for call in self._calls for key, s in call.items()}, weights)
        kept = batch | self._outside | self._inputs
        return _bytes(kept, weights) + max((_bytes(call, kept | weights) for call in self._calls), default=0)


def _storages(tensors: Any) -> Storages:
    return {id(storage): storage for storage in (tensor.untyped_storage() for tensor in tensors)}


def _bytes(storages: Storages, but: Storages) -> int:
    return sum(storage.nbytes() for key, storage in storages.items() if key not in but)


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in nested sequences and mappings."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
