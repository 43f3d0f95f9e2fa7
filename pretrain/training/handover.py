"""What one stage of a run hands to the next: every weight of its objective, in float32, one after the other.

Weights go by name. Where the next stage has another shape, its encoder may know how to fit them (positions resampled to
its grid); what it does not know, and what it has alone, stays as it was initialized, and is named.

Not here: optimizer moments, which go through a checkpoint (`pretrain.training.state`), and weights from outside of the
run (`init_from` of a recipe).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from backbones.encoder import Encoder
from objectives.base import Objective
from objectives.teacher import Teacher
from pretrain.config.stages import Stage
from pretrain.record.events import StageBegan
from pretrain.training.engine import Engine

__all__ = ["Handover", "take_over", "takes_nothing", "weights_of"]


@dataclass(frozen=True)
class Handover:
    """What the next stage took; all names are sorted.

    Attributes:
        loaded: As they were.
        resampled: Fitted to another shape.
        fresh: Of the next stage, and without a counterpart that fits; they stay as they were initialized.
        unused: Of the stage before alone.
    """

    loaded: tuple[str, ...]
    resampled: tuple[str, ...]
    fresh: tuple[str, ...]
    unused: tuple[str, ...]

    def event(self, stage: Stage) -> StageBegan:
        """What people are told about it."""
        return StageBegan(
            step=stage.first_step,
            stage=stage.name,
            loaded=len(self.loaded),
            total=len(self.loaded) + len(self.resampled) + len(self.fresh),
            resampled=self.resampled,
            fresh=self.fresh,
            moments=not stage.reset_optimizer,
        )


def weights_of(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """All parameters and the extra state of an engine's objective, each whole when its turn comes. A collective.

    They may share memory with the engine's.
    """
    yield from engine.named_weights(dict(engine.objective.named_parameters()))
    yield from engine.objective.named_extra_state()


@torch.no_grad()
def take_over(objective: Objective, weights: Mapping[str, Tensor], init_with: str = "student") -> Handover:
    """Copy weights of the stage before into the objective of the next one, before an engine shards it.

    Fixed positions of another grid keep their own values, which are exact. A teacher that has no weights among these
    becomes a copy again, of the student that is now; a companion that the student does not fill is left
    to who does.

    Args:
        objective: Of the next stage.
        weights: What `weights_of` gives, by name, of which each is asked for once.
        init_with: "teacher" gives the student what the teacher has, which is all but what no teacher sees.
    """
    sources = {name.removeprefix("buffer."): name for name in weights}
    if init_with == "teacher":
        sources |= {name.removeprefix("teacher."): name for name in weights if name.startswith("teacher.")}
    trained = {name for name, parameter in objective.named_parameters() if parameter.requires_grad}
    own = _by_plain_name(objective)
    companions = objective.companions()
    is_fixed = {name for name in own if name not in trained and name.partition(".")[0] not in companions}
    encoders = _encoders_of(objective)
    loaded, resampled = set(), set()
    for name, tensor in own.items():
        if name not in sources:
            continue
        given = weights[sources[name]]
        if given.shape == tensor.shape:
            tensor.copy_(given)
            loaded.add(name)
        elif name not in is_fixed and (fitted := _fitted(encoders, name, given)) is not None:
            tensor.copy_(fitted)
            resampled.add(name)
    copied = set()
    for name, companion in companions.items():
        mine = {key for key in own if key.startswith(f"{name}.")}
        if not mine.isdisjoint(loaded | resampled):
            continue
        if isinstance(companion, Teacher):
            companion.copy_student()
            copied |= mine
        elif companion.filled != "student":
            own = {key: tensor for key, tensor in own.items() if key not in mine}
    loaded |= copied
    return Handover(
        loaded=tuple(sorted(loaded)),
        resampled=tuple(sorted(resampled)),
        fresh=tuple(sorted(own.keys() - loaded - resampled)),
        unused=tuple(sorted(sources.keys() - own.keys())),
    )


def takes_nothing(objective: Objective, before: Objective) -> bool:
    """Whether no parameter of the encoder is one of the objective before, by name and shape; numbers are not needed."""
    encoder = set(objective.backbone.network.parameters())
    found = {name: parameter.shape for name, parameter in before.named_parameters()}
    return not any(
        parameter in encoder and found.get(name) == parameter.shape for name, parameter in objective.named_parameters()
    )


def _by_plain_name(objective: Objective) -> dict[str, Tensor]:
    """Parameters and extra state; a buffer has the name that a parameter in its place would have."""
    extra = {name.removeprefix("buffer."): tensor for name, tensor in objective.extra_state().items()}
    return {**dict(objective.named_parameters()), **extra}


def _encoders_of(objective: Objective) -> dict[str, Encoder]:
    """Prefix of the weights -> the encoder whose they are, of the student and of companions."""
    roots: dict[str, nn.Module] = {"": objective}
    roots |= {f"{name}.": companion.module for name, companion in objective.companions().items()}
    found = {}
    for prefix, root in roots.items():
        paths = {module: path for path, module in root.named_modules()}
        for module in paths:
            if isinstance(module, Encoder):
                found[f"{prefix}{paths[module.network]}."] = module
    return found


def _fitted(encoders: Mapping[str, Encoder], name: str, tensor: Tensor) -> Tensor | None:
    for prefix, encoder in encoders.items():
        if name.startswith(prefix):
            return encoder.fitted(name.removeprefix(prefix), tensor)
    return None
