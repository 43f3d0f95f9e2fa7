"""The training state of ZeRO 0 to 2 as safetensors that any number of ranks reads: ranges of flat vectors.

What the optimizer steps is a list of float32 vectors: in stage 0 the parameters, one each; in stages 1 and 2 all the
parameters of a group, one after another, cut into as many equal pieces as there are ranks, with padding at the very
end (S. Rajbhandari et al., 2019, arXiv:1910.02054). Each rank writes the range of every vector that is its own: the
weights, whatever the optimizer keeps of each of them (moments), and what it keeps of the vector (step count). Padding
is not written, so that a range means the same to any number of ranks: each concatenates what it needs and pads anew.
Nothing is converted, no rank reads more than its share, and what comes back is equal bit by bit.

    flat-00001.safetensors   VECTOR/weights  VECTOR/exp_avg  VECTOR/exp_avg_sq  VECTOR/step ...
                             header: range of each vector, its parameters in order, the engine's counts

Vectors that all ranks have whole (stage 0, and frozen parameters, which no optimizer steps) are dealt out, so that
ranks write about as much each.

Not here: stage 3, whose shards have another shape and DeepSpeed's own files (`pretrain.training.engine`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pretrain.checkpoints.storage import CheckpointError
from pretrain.training import deepspeed_internals

__all__ = ["FILES", "Part", "Vector", "are_in", "collect", "ranges_of", "read", "restore"]

FILES = "flat-{:05d}.safetensors"  # of each rank
_WEIGHTS = "weights"


class Part(NamedTuple):
    """Where a parameter lies in a vector, in numbers."""

    parameter: str
    offset: int
    numel: int


@dataclass(frozen=True)
class Vector:
    """A flat vector of weights, of which this rank has a range.

    Attributes:
        name: Unlike all others'.
        weights: This rank's range, of any shape; in stages 1 and 2 the last ranks' end in padding.
        parts: The parameters in it, by offset.
        start: Where in the vector the range starts.
        is_whole: Every rank has all of it.
        state: What the optimizer has of it: tensors as `weights`, of another shape for the vector as a whole, or plain
            values. Empty before the first step, and of frozen parameters.
    """

    name: str
    weights: Tensor
    parts: Sequence[Part]
    start: int = 0
    is_whole: bool = True
    state: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Its length without padding."""
        return self.parts[-1].offset + self.parts[-1].numel

    @property
    def stop(self) -> int:
        """Where the range ends, padding left out."""
        return min(self.start + self.weights.numel(), max(self.start, self.total))


def collect(engine: Any, stage: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """This rank's share of the training state of a DeepSpeed engine of stages 0 to 2.

    Returns:
        Tensors that share memory with the engine's, to be read before the next step; and the header of their file.
    """
    tensors, facts = ranges_of(_vectors(engine, stage), dist.get_rank(), dist.get_world_size())
    return tensors, {"vectors": json.dumps(facts), "counts": json.dumps(deepspeed_internals.counts(engine))}


def restore(engine: Any, stage: int, directory: Path) -> None:
    """Give a DeepSpeed engine of stages 0 to 2 the training state that any number of ranks wrote. A collective.

    Raises:
        CheckpointError: As `read`.
    """
    optimizer = deepspeed_internals.torch_optimizer(engine)
    states, counts = read(directory, _vectors(engine, stage))
    stepped = sum(len(group["params"]) for group in optimizer.param_groups)
    moments = {number: state for number, state in enumerate(states[:stepped]) if state}
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
    if stage > 0:
        deepspeed_internals.spread_masters(engine)
    deepspeed_internals.set_counts(engine, counts)


def _vectors(engine: Any, stage: int) -> list[Vector]:
    """Those that the optimizer steps, in its order, then frozen parameters."""
    names: dict[nn.Parameter, str] = {parameter: name for name, parameter in engine.module.named_parameters()}
    optimizer = deepspeed_internals.torch_optimizer(engine)
    stepped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states = [optimizer.state.get(parameter, {}) for parameter in stepped]
    if stage == 0:
        vectors = [_whole(names[parameter], parameter, state) for parameter, state in zip(stepped, states, strict=True)]
    else:
        groups = deepspeed_internals.flat_groups(engine)
        stepped = [parameter for group in groups for parameter, _ in group.parameters]
        vectors = [
            Vector(
                name=f"group-{number}",
                weights=group.master,
                parts=[Part(names[parameter], offset, parameter.numel()) for parameter, offset in group.parameters],
                start=group.start,
                is_whole=False,
                state=state,
            )
            for number, (group, state) in enumerate(zip(groups, states, strict=True))
        ]
    frozen = names.keys() - set(stepped)
    return [*vectors, *(_whole(name, parameter, {}) for parameter, name in names.items() if parameter in frozen)]


def _whole(name: str, parameter: nn.Parameter, state: Mapping[str, Any]) -> Vector:
    return Vector(name, parameter.data, [Part(name, 0, parameter.numel())], state=state)


def ranges_of(vectors: Sequence[Vector], rank: int, num_ranks: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a rank writes: tensors, which share memory with the engine's, and what the header says of them."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for number, vector in enumerate(vectors):
        if vector.is_whole and number % num_ranks != rank:
            continue
        numel = vector.stop - vector.start
        of_each: list[str] = []
        of_all: list[str] = []
        plain: dict[str, Any] = {}
        for key, value in {_WEIGHTS: vector.weights, **vector.state}.items():
            if not torch.is_tensor(value):
                plain[key] = value
                continue
            is_of_each = value.shape == vector.weights.shape
            (of_each if is_of_each else of_all).append(key)
            tensors[f"{vector.name}/{key}"] = value.detach().flatten()[:numel] if is_of_each else value.detach()
        facts[vector.name] = {
            "range": [vector.start, vector.stop],
            "parts": vector.parts,
            "of_each": of_each,
            "of_all": of_all,
            "plain": plain,
        }
    return tensors, facts


def are_in(directory: Path) -> bool:
    """Whether a training state has this form."""
    return any(directory.glob(FILES.replace("{:05d}", "*")))


@torch.no_grad()
def read(directory: Path, vectors: Sequence[Vector]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Give this rank's ranges of vectors the weights that any number of ranks wrote.

    Args:
        directory: With the files of all ranks.
        vectors: Whose `weights` are changed in place.

    Returns:
        Of each vector the state that its optimizer had, on the CPU, and the header's counts.

    Raises:
        CheckpointError: The state is of other vectors, or a range of one is in no file.
    """
    with ExitStack() as opened:
        files = []
        for path in sorted(directory.glob(FILES.replace("{:05d}", "*"))):
            try:
                files.append(opened.enter_context(safe_open(path, framework="pt")))
            except SafetensorError as error:
                raise CheckpointError(f"{path}: no safetensors ({error})") from None
        headers = [file.metadata() for file in files]
        facts = [json.loads(header["vectors"]) for header in headers]
        saved = {name for own in facts for name in own}
        if differ := sorted(saved ^ {vector.name for vector in vectors}):
            where = "in it and not here" if differ[0] in saved else "here and not in it"
            raise CheckpointError(f"{directory}: the training state is of another model: {differ[0]} is {where}")
        states = []
        for vector in vectors:
            found = [(file, own[vector.name]) for file, own in zip(files, facts, strict=True) if vector.name in own]
            states.append(_read_one(directory, vector, found))
        return states, json.loads(headers[0]["counts"])


def _read_one(directory: Path, vector: Vector, found: list[tuple[Any, dict[str, Any]]]) -> dict[str, Any]:
    """Fill the range of one vector; returns its optimizer's state."""
    found.sort(key=lambda one: one[1]["range"])
    ends = [0, *(own["range"][1] for _, own in found)]
    for end, (_, own) in zip(ends, found, strict=False):
        _require_equal(directory, vector, own["parts"])
        if own["range"][0] != end:
            break
    else:
        end = ends[-1]
    if end != vector.total:
        raise CheckpointError(f"{directory}: no file has the numbers of {vector.name} from {end} on")

    def wanted(key: str) -> Tensor:
        """This rank's range, in the shape of the weights, padded with zeros."""
        whole: Tensor | None = None
        for file, own in found:
            start, stop = max(own["range"][0], vector.start), min(own["range"][1], vector.stop)
            piece = file.get_slice(f"{vector.name}/{key}")
            if whole is None:
                whole = torch.zeros(vector.weights.numel(), dtype=piece[:0].dtype)
            if start < stop:
                offset = own["range"][0]
                whole[start - vector.start : stop - vector.start] = piece[start - offset : stop - offset]
        assert whole is not None
        return whole.reshape(vector.weights.shape)

    file, own = found[0]
    vector.weights.copy_(wanted(_WEIGHTS))
    state: dict[str, Any] = {key: wanted(key) for key in own["of_each"] if key != _WEIGHTS}
    return state | {key: file.get_tensor(f"{vector.name}/{key}") for key in own["of_all"]} | own["plain"]


def _require_equal(directory: Path, vector: Vector, saved: Iterable[Sequence[Any]]) -> None:
    for here, there in zip_longest(vector.parts, map(tuple, saved)):
        if here != there:
            raise CheckpointError(
                f"{directory}: the training state is of another model: {_shown(there)} where {_shown(here)} is here "
                f"({vector.name})"
            )


def _shown(part: Sequence[Any] | None) -> str:
    return "nothing" if part is None else "{0} of {2} numbers at {1}".format(*part)
