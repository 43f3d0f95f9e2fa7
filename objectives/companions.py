"""Companions: modules beside the student that an engine must not see, such as teachers.

An engine casts, shards and steps every parameter that it finds in an objective's module tree. A companion is kept out
of the tree, in its own type, and the training loop asks `Objective.companions` for all of them, to put them on a device
and into checkpoints. Each rank holds it whole, unless the engine asks it to `shard`.

Not here: the moving average of a student (`objectives.teacher`), how shards become whole (`objectives.shards`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.io import open_weights, read_shapes
from objectives.errors import ObjectiveError
from objectives.shards import Shards, units_of

__all__ = ["Companion", "Source"]


class Source(NamedTuple):
    """Where a companion's weights come from: a file, and the sha256 of its bytes."""

    location: str
    sha256: str


class Companion:
    """A module without gradients, and what becomes of it.

    Attributes:
        part: what of a checkpoint fills it, if a checkpoint does: the exported "backbone", or the "heads" beside it.
        title: what people call it; empty: its name among the companions.
        remedy: what to do about weights that do not fit it, for messages.
        module: the network. One that is frozen is in evaluation mode. Its weights are there to be read only as long as
            it is not sharded; `state_dict` has them always.
        filled: "student": with the student's weights, at the start of a run; "checkpoint": by `load`, from a file;
            "objective": by `Objective.begin`.
        moves: "ema": towards the student, in the objective's `after_step`; "frozen": never.
        saved: what a training state has of it. "whole": all of it, written by one rank; "sharded": all of it, each rank
            writes some tensors; "reference": its `source`, from which it is filled again, so that the file has to be
            kept. What is saved whole is saved sharded once it is.
        source: what `load` read; None before, and of one that is filled from the student.
    """

    part: ClassVar[Literal["backbone", "heads"]] = "backbone"
    title: ClassVar[str] = ""
    remedy: ClassVar[str] = "give weights of that architecture"

    def __init__(
        self,
        module: nn.Module,
        *,
        filled: Literal["student", "checkpoint", "objective"],
        moves: Literal["ema", "frozen"],
        saved: Literal["whole", "sharded", "reference"],
    ) -> None:
        """Raises ValueError for one that moves, or comes from the student, and is saved by reference."""
        if saved == "reference" and (filled, moves) != ("checkpoint", "frozen"):
            raise ValueError("a companion is saved by reference only if it is frozen and filled from a checkpoint")
        self.module, self.filled, self.moves, self.saved = module, filled, moves, saved
        self.source: Source | None = None
        self._shards = Shards([])
        module.requires_grad_(False)
        if moves == "frozen":
            module.eval()

    def outline(self, spec: Mapping[str, Any]) -> None:
        """Take the architecture of the weights that `load` will bring; by default it keeps the one that it has.

        Called before `load`, and where only sizes are asked for, with torch's meta device.

        Args:
            spec: of its `part`: `Encoder.spec`, or that of `Objective.exported_heads`.

        Raises:
            ObjectiveError: the objective cannot use such a module.
        """

    def load(self, location: Path | str, sha256: str | None = None) -> None:
        """Fill it from a file of weights.

        Args:
            location: a file that `backbones.io.open_weights` reads, with the names of the module's state dict (of an
                encoder: of its network), or a checkpoint directory with such a file of its `part`. Weights of parts
                that the module lacks as a whole, such as a classifier, are left out.
            sha256: what the file's bytes must have; None: whatever it has.

        Raises:
            ObjectiveError: no such file, another digest, or tensors that do not fit; nothing has changed then.
        """
        file = Path(location)
        file = file / f"{self.part}.safetensors" if file.is_dir() else file
        try:
            with file.open("rb") as opened:
                digest, stamp = hashlib.file_digest(opened, "sha256").hexdigest(), _stamp(os.fstat(opened.fileno()))
        except OSError as error:
            raise ObjectiveError(f"weights {file}: {error.strerror or error}; put the file back") from None
        if sha256 not in (None, digest):
            raise ObjectiveError(
                f"weights {file}: sha256 {digest[:12]}.., but training began with {sha256:.12}..; "
                "put that file back, or start a new run"
            )
        try:
            weights, shapes = open_weights(file), read_shapes(file)
        except BackboneError as error:
            raise ObjectiveError(f"weights {error}") from error
        if _stamp(file.stat()) != stamp:
            raise ObjectiveError(f"weights {file}: were replaced while they were read; try again")
        self.require_fit(shapes)
        self._write(self._network, weights)
        self.source = Source(str(file), digest)

    @property
    def _network(self) -> nn.Module:
        """What a file of weights has the names of."""
        return self.module.network if isinstance(self.module, Encoder) else self.module

    def require_fit(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Whether `load` would take a file of weights with these names and shapes; also on torch's meta device.

        Raises:
            ObjectiveError: one of its own is not among them, has another shape, or there are more in a part of it.
        """
        own = {name: tuple(tensor.shape) for name, tensor in self._network.state_dict().items()}
        parts = {name.partition(".")[0] for name in own}
        found = {name: tuple(shape) for name, shape in shapes.items() if name.partition(".")[0] in parts}
        unlike = [name for name in own if found.get(name, own[name]) != own[name]]
        wrong = [f"{name} has shape {found[name]}, not {own[name]}" for name in unlike]
        wrong += [f"{name} is missing" for name in own if name not in found]
        wrong += [f"{name} is not part of it" for name in found if name not in own]
        if wrong:
            more = f" and {len(wrong) - 2} more" if len(wrong) > 2 else ""
            of = f"weights of {self.module.spec['name']}" if isinstance(self.module, Encoder) else "weights"
            raise ObjectiveError(f"the {of} do not fit, see: {'; '.join(wrong[:2])}{more}; {self.remedy}")

    def to(self, device: torch.device) -> None:
        """Move to a device; never to another type."""
        self.module.to(device)

    def shard(self, device: torch.device | None = None) -> None:
        """From now on this rank holds no more than a share of the weights, which are the same on all ranks now.

        They are cut unit by unit, on the device if one is given, where no more than one unit has to be whole.
        """
        self._shards = Shards(units_of(self.module), device)
        self.saved = "sharded" if self.saved == "whole" else self.saved

    def whole(self) -> AbstractContextManager[None]:
        """In this context the module's weights are there to be read on every rank. A collective when it is sharded."""
        return self._shards.whole()

    def share_of(self, parameter: nn.Parameter) -> Tensor:
        """What this rank holds of a parameter: its share, or all of it."""
        return self._shards.share(parameter) if parameter in self._shards else parameter

    def whole_of(self, tensor: Tensor) -> Tensor:
        """A parameter's value: a whole copy of what is sharded, a collective; any other tensor as it is."""
        return self._shards.read([tensor])[0] if tensor in self._shards else tensor  # type: ignore[list-item]

    def release(self) -> None:
        """Give its memory back; it is of no use afterwards. Whatever shares the tensors keeps them."""
        self._shards.release()
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            tensor.data = tensor.new_empty(0)

    def names(self) -> list[str]:
        """Of parameters and persistent buffers, in the order of `state_dict`."""
        return list(self.module.state_dict())

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """Parameters and persistent buffers of the module, one after the other, so that one of them is whole at a time.

        A collective when it is sharded: all ranks go through all of them.
        """
        for name, tensor in self.module.state_dict(keep_vars=True).items():
            yield name, self.whole_of(tensor).detach()

    def state_dict(self, wanted: Collection[str] | None = None) -> dict[str, Tensor]:
        """The same at once.

        Args:
            wanted: the names that this rank wants; None: all.

        Returns:
            The tensors themselves; when it is sharded, whole copies on the CPU.
        """
        is_cut = bool(self._shards)
        state = {}
        for name, tensor in self.named_state():
            if wanted is None or name in wanted:
                state[name] = tensor.cpu() if is_cut else tensor
        return state

    def load_state_dict(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        """Restore from `state_dict`, each rank from all of it, one tensor after the other.

        Args:
            state: tensors by name.
            prefix: what stands before the names there.

        Raises:
            KeyError: a name is missing.
        """
        self._write(self.module, state, prefix)

    @torch.no_grad()
    def _write(self, module: nn.Module, weights: Mapping[str, Tensor], prefix: str = "") -> None:
        """Give all of a module within this one new values."""
        for name, tensor in module.state_dict(keep_vars=True).items():
            if tensor in self._shards:
                self._shards.write(tensor, weights[prefix + name])
            else:
                tensor.copy_(weights[prefix + name])


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    """What differs between a file and one that takes its place, or has been written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
