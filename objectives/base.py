"""What every objective is to the training loop.

The loop calls `forward` once per micro-batch and `after_step` once per optimizer step; it knows nothing else about an
objective. Everything a subclass may rely on, and everything it must keep to, is in this file.

* All work with gradients happens inside one `forward`, the only entry that an engine sees.
* `forward` changes no state: activation checkpointing may run it twice, and a step with a non-finite loss is thrown
  away. Statistics that it gathers wait for `after_step`, which is not called for such a step.
* All randomness comes from the batch's "seed", so that a step does not depend on ranks or on restarts.
* State is parameters, persistent buffers and companions. All three are saved and come back bit for bit.

NOT here: schedules of the optimizer (`pretrain.training.engine`), how views are cut (`data_pipelines.views`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from backbones.images.base import ImageEncoder
from objectives.blocks import outer_blocks
from objectives.companions import Companion
from objectives.errors import ObjectiveError
from objectives.requirements import require_kind
from objectives.teacher import ReadWeights, Teacher

__all__ = ["Heads", "ImageObjective", "Objective", "Output", "Progress"]


@dataclass(frozen=True)
class Progress:
    """Where training stands: `step` optimizer steps of `total_steps` are done.

    Attributes:
        is_logged: somebody reads this step's metrics; of other steps, those that cost anything may be left out.
    """

    step: int
    total_steps: int
    is_logged: bool = True

    @property
    def is_young(self) -> bool:
        """Too early to judge a run: in its first 100 steps and in its first tenth, nothing need have been learned."""
        return self.step < max(100, 0.1 * self.total_steps)


class Output(NamedTuple):
    """Loss to differentiate (scalar) and detached scalar metrics for people, by name."""

    loss: Tensor
    metrics: dict[str, Tensor]


class Heads(NamedTuple):
    """What an objective has on top of the encoder that it exports.

    Attributes:
        spec: plain JSON-able dict from which the same modules can be built.
        tensors: their weights by name, parameters of the objective among them as they are.
        from_start: also saved beside the backbone of step 0, for a score to compare with.
    """

    spec: dict[str, Any]
    tensors: dict[str, Tensor]
    from_start: bool = False


class Objective(nn.Module, ABC):
    """A learning objective around a backbone; built as `Class(backbone, config)`.

    A constructor may re-initialise the backbone, and draws from torch's global generator: seed it before.

    Attributes:
        Config: dataclass of the settings.
        compares_images: the loss of an image depends on the others of its micro-batch, so that gradient accumulation
            is not the same as a larger batch.
        backbone: the encoder that is trained.
        teacher: moving average of the student's modules, with a `backbone` among them, which is exported; None without
            one. It is a companion.
    """

    Config: ClassVar[type]
    compares_images: bool = False
    backbone: Encoder
    teacher: Teacher | None = None

    @abstractmethod
    def views(self) -> list[dict[str, Any]]:
        """The crops wanted per image: plain dicts with the fields of `data_pipelines.views.kinds.images.ImageView`."""

    def mixed_views(self) -> list[tuple[float, list[dict[str, Any]]]]:
        """Other views, of the same names, that a share of the steps has instead of `views`: (share, views); none."""
        return []

    @abstractmethod
    def forward(self, batch: dict[str, Tensor], progress: Progress) -> Output:
        """Loss of one micro-batch.

        Args:
            batch: per view its uint8 images (B, C, H, W), or (count, B, C, H, W) when it counts more than one;
                "sample_id" and "seed" (B,) int64. All randomness comes from "seed".
            progress: for schedules inside the objective.
        """

    def begin(self, read: ReadWeights) -> None:
        """Work before the first step of a stage, when all weights are what it begins with; nothing by default.

        Not called where a stage goes on from a checkpoint, which has what came of it.
        """

    def after_step(self, progress: Progress, read: ReadWeights) -> None:
        """Work after an optimizer step, such as moving the teacher or a center; nothing by default.

        All ranks call it alike, so collectives are allowed. `progress` is that of the step just taken, `read` gives
        the whole float32 values of a list of parameters.
        """

    def diagnose(self, metrics: Mapping[str, float], progress: Progress) -> str | None:
        """What is wrong with a run that shows these metrics (means over ranks), in one line; None: nothing.

        Called on logged steps. A line that comes several times in a row is reported as a collapse.
        """
        return None

    @abstractmethod
    def pictures(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Pictures a person can judge progress by: caption -> (n, 3, H, W) float in [0, 1].

        Runs outside the engine's forward, so an engine that shards parameters (ZeRO-3) has to gather them around it.
        """

    @property
    def exported(self) -> Encoder:
        """The encoder that is exported and evaluated: the teacher's, if there is one."""
        return self.backbone if self.teacher is None else self.teacher.backbone  # type: ignore[return-value]

    def exported_heads(self) -> Heads | None:
        """What is exported beside the encoder, for a student that learns its outputs, or for an evaluation of them.

        Parameters of the objective and of its companions are gathered by the engine, if they are given themselves
        (`state_dict(keep_vars=True)`); other tensors have to be whole on every rank. None, which is the default:
        nothing.
        """
        return None

    def companions(self) -> dict[str, Companion]:
        """Modules that an engine must not see, by name; the teacher, if there is one.

        Each says how it is filled, how it moves and how it is saved. The names are part of the training state.
        """
        return {} if self.teacher is None else {"teacher": self.teacher}

    def extra_state(self) -> dict[str, Tensor]:
        """All state beside the parameters: persistent buffers, and companions unless they are saved by reference.

        The same on every rank. A collective when companions are sharded.
        """
        return dict(self.named_extra_state())

    def named_extra_state(self) -> Iterator[tuple[str, Tensor]]:
        """The same, one after the other: of sharded companions one tensor is whole at a time.

        A collective when companions are sharded: all ranks go through all of it.
        """
        yield from self._persistent_buffers().items()
        for name, companion in self._saved_companions().items():
            for key, tensor in companion.named_state():
                yield f"{name}.{key}", tensor

    def share_of_state(self, rank: int, num_ranks: int) -> dict[str, Tensor]:
        """The part of `extra_state` that a rank writes: the first all but what is sharded, each its share of that.

        A collective when companions are sharded.
        """
        share = self._persistent_buffers() if rank == 0 else {}
        writers = itertools.cycle(range(num_ranks))
        for name, companion in self._saved_companions().items():
            writer = {key: next(writers) if companion.saved == "sharded" else 0 for key in companion.names()}
            own = companion.state_dict({key for key in writer if writer[key] == rank})
            share |= {f"{name}.{key}": tensor for key, tensor in own.items()}
        return share

    def _persistent_buffers(self) -> dict[str, Tensor]:
        persistent = self.state_dict().keys()
        return {f"buffer.{name}": tensor for name, tensor in self.named_buffers() if name in persistent}

    def _saved_companions(self) -> dict[str, Companion]:
        """Those whose tensors are saved."""
        return {name: companion for name, companion in self.companions().items() if companion.saved != "reference"}

    def references(self) -> dict[str, dict[str, str]]:
        """Location and sha256 of each companion that is saved by reference; JSON-able.

        Raises:
            ObjectiveError: one has not been filled.
        """
        found = {}
        for name, companion in self.companions().items():
            if companion.saved == "reference":
                if companion.source is None:
                    raise ObjectiveError(f"companion {name!r} was never filled: call its `load` before training")
                found[name] = companion.source._asdict()
        return found

    def load_references(self, references: Mapping[str, Mapping[str, str]]) -> None:
        """Fill companions from where they were filled when `references` was made; those with these weights stay.

        Raises:
            ObjectiveError: a file is gone or has changed, or the companions are other ones.
        """
        own = {name: companion for name, companion in self.companions().items() if companion.saved == "reference"}
        if own.keys() != references.keys():
            raise ObjectiveError(f"companions differ in {', '.join(sorted(own.keys() ^ references.keys()))}")
        for name, companion in own.items():
            if companion.source is None or companion.source.sha256 != references[name]["sha256"]:
                companion.load(**references[name])

    @torch.no_grad()
    def load_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore from `extra_state`, all of it on each rank.

        Raises:
            KeyError: names are missing or unknown.
        """
        buffers, companions = self._persistent_buffers(), self._saved_companions()
        names = {f"{name}.{key}" for name, companion in companions.items() for key in companion.names()}
        if unlike := sorted((names | buffers.keys()) ^ state.keys()):
            raise KeyError(f"extra state differs in {', '.join(unlike)}")
        for name, buffer in buffers.items():
            buffer.copy_(state[name])
        for name, companion in companions.items():
            companion.load_state_dict(state, prefix=f"{name}.")

    def param_groups(self, weight_decay: float, layer_decay: float = 1.0) -> list[dict[str, Any]]:
        """Trainable parameters as torch optimizer groups; call it before an engine shards them.

        Matrices and tokens (two or more dimensions) decay, vectors and biases do not. With `layer_decay` < 1 an
        encoder layer that lies n layers below the encoder's last has its learning rate scaled by layer_decay ** n
        (BEiT, arXiv:2106.08254, counted as timm does); everything outside the encoder has scale 1.

        Returns:
            Groups with "params", "weight_decay", "wd_scale" (1: decays, 0: does not), "lr_scale" and "group_name", the
            first encoder layer first. A schedule sets "weight_decay" to its value times "wd_scale", as it sets "lr".
            A group may have a "frozen_share": of the run's steps, from the start, in which its learning rate is 0.

        Raises:
            BackboneError: layers are to differ, and the encoder does not say which parameter is in which.
        """
        depths = self.backbone.layer_ids() if layer_decay != 1.0 else {}
        layer_ids = {parameter: depths.get(name, 0) for name, parameter in self.backbone.network.named_parameters()}
        last = max(depths.values(), default=0)
        groups: dict[tuple[int, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                layer = layer_ids.get(parameter, last)
                groups[layer, parameter.ndim >= 2 and not name.endswith(".bias")].append(parameter)
        return [
            {
                "params": groups[layer, decays],
                "weight_decay": weight_decay * decays,
                "wd_scale": float(decays),
                "lr_scale": layer_decay ** (last - layer),
                "group_name": ("decay" if decays else "no_decay") + (f".layer{layer}" if layer < last else ""),
            }
            for layer, decays in sorted(groups, key=lambda key: (key[0], not key[1]))
        ]

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, of which gradient norms are reported and may be clipped for itself.

        Args:
            name: of the parameter. By default its part is what comes before the first dot.
        """
        return name.partition(".")[0]

    def repeated_blocks(self) -> list[nn.Module]:
        """The parts, alike and one after the other, that may be compiled, and computed again in the backward pass.

        They are called with tensors, and calling one twice changes nothing but batch norms' running statistics. By
        default what is in the lists that are called "blocks", as timm calls them, of the backbone and of anything else
        that is trained; a block within a block is part of that.
        """
        return outer_blocks(self)


class ImageObjective(Objective):
    """An objective of images: its backbone is an image encoder, and so is what it exports."""

    backbone: ImageEncoder

    def __init__(self, backbone: Encoder, name: str) -> None:
        """Takes the backbone; `name` is the objective's, for the message.

        Raises:
            ObjectiveError: the backbone does not encode images.
        """
        super().__init__()
        self.backbone = require_kind(backbone, ImageEncoder, name)

    @property
    def exported(self) -> ImageEncoder:
        """The image encoder that is exported and evaluated: the teacher's, if there is one."""
        return super().exported  # type: ignore[return-value]
