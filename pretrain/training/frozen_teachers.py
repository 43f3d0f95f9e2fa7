"""Frozen teachers: companions of an objective that are filled with what `teacher_from` means.

`outline` tells whether they fit, which takes neither weights nor memory; `fill` brings the weights.

Not here: what an objective does with them, what `teacher_from` may say (`pretrain.checkpoints.initialization`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from backbones.io import read_shapes
from objectives.base import Objective
from objectives.companions import Companion
from objectives.errors import ObjectiveError
from pretrain.checkpoints.initialization import NO_HEADS, Weights, about, find_weights
from pretrain.checkpoints.store import CheckpointError
from pretrain.config.stage_list import backbones_unlike
from pretrain.config.stages import Plan, Stage
from pretrain.config.teachers import use_problem
from pretrain.errors import RequestError, RunFailed
from pretrain.training.state import checkpoint_at

__all__ = ["fill", "outline"]


class _Part(NamedTuple):
    """What is known of a part of a checkpoint without its numbers: architecture, names and shapes."""

    spec: Mapping[str, Any]
    shapes: Mapping[str, Sequence[int]]


Parts = Mapping[str, _Part | None]  # None: it has no such part


def outline(plan: Plan, index: int, objective: Objective, earlier: Mapping[int, Objective]) -> str:
    """Give the frozen teachers of a stage the architecture of what will fill them.

    Args:
        plan: Of the run.
        index: The stage.
        objective: Of the stage.
        earlier: Objectives of earlier stages by index; a teacher from a stage that is not among them stays as it is.

    Returns:
        Where they come from, for people; empty where nothing fills one.

    Raises:
        ObjectiveError: There is no such checkpoint, it does not fit, or the objective has no frozen teacher.
    """
    stage = plan.stages[index]
    named = _named(plan, stage)
    wanting = _wanting(stage, objective, named)
    if stage.teacher_from is not None:
        if (source := earlier.get(stage.teacher_from)) is not None:
            try:
                _outline(wanting, named, _parts_of(source))
            except ObjectiveError as error:
                unlike = backbones_unlike(plan, index, stage.teacher_from)
                raise ObjectiveError(f"{error}{unlike and f' ({unlike})'}") from error
        return _described(plan, stage)
    if named is not None:
        try:
            weights = find_weights(named, Path(stage.recipe.storage))
        except (CheckpointError, RequestError, RunFailed) as error:
            raise ObjectiveError(about("teacher_from", named, str(error))) from error
        _outline(wanting, named, _parts(weights, named))
        return _described(plan, stage, weights, wanting)
    return ""


def fill(plan: Plan, index: int, objective: Objective, run_dir: Path) -> str:
    """Fill the frozen teachers of a stage. A collective; draws no random numbers.

    Args:
        plan: Of the run.
        index: The stage.
        objective: Of the stage, built alike on every rank.
        run_dir: Directory of the run, where earlier stages left their checkpoints.

    Returns:
        As `outline`.

    Raises:
        ObjectiveError: The objective has no frozen teacher, or has one and `teacher_from` says nothing.
        CheckpointError: There is no such checkpoint, it is damaged, or it does not fit.
    """
    stage = plan.stages[index]
    named = _named(plan, stage)
    wanting = _wanting(stage, objective, named)
    if named is None:
        return ""
    reference = named
    if stage.teacher_from is not None:
        step = stage.teacher_step or plan.stages[stage.teacher_from].last_step
        reference = checkpoint_at(run_dir, step).location
    try:
        weights = find_weights(reference, Path(stage.recipe.storage))
    except (RequestError, RunFailed) as error:
        raise CheckpointError(about("teacher_from", named, str(error))) from error
    try:
        with torch.random.fork_rng(devices=[]):  # the student's numbers do not depend on its teacher's
            _outline(wanting, named, _parts(weights, named))
        for companion in wanting:
            part = weights if companion.part == "backbone" else weights.heads
            assert part is not None  # it has been outlined
            companion.load(part.file, part.sha256)
    except ObjectiveError as error:
        raise CheckpointError(str(error)) from error
    return _described(plan, stage) if stage.teacher_from is not None else _described(plan, stage, weights, wanting)


def _described(plan: Plan, stage: Stage, weights: Weights | None = None, filled: Sequence[Companion] = ()) -> str:
    """Where frozen teachers come from: `runs:/x/40: step 40, vit_small_patch16_224, 32 px, patches of 8 px`."""
    named = _named(plan, stage)
    if stage.teacher_from is not None:
        source = plan.stages[stage.teacher_from]
        step = source.last_step if stage.teacher_step is None else stage.teacher_step
        return f"{named}: what this run exports at step {step}"
    facts = [] if weights is None or weights.step is None else [f"step {weights.step}"]
    for companion in filled:
        if isinstance(encoder := companion.module, Encoder):
            facts.append(encoder.spec.get("name", encoder.kind))
        if isinstance(encoder, ImageEncoder):
            facts += [f"{encoder.image_size} px", f"patches of {encoder.patch_size} px"]
    return f"{named}: {', '.join(facts)}"


def _named(plan: Plan, stage: Stage) -> str | None:
    """How a recipe says where the frozen teachers of a stage come from."""
    if stage.teacher_from is None:
        return stage.recipe.teacher_from
    name = plan.stages[stage.teacher_from].name
    return name if stage.teacher_step is None else f"{name}/{stage.teacher_step}"


def _wanting(stage: Stage, objective: Objective, named: str | None) -> list[Companion]:
    """The companions that `teacher_from` fills.

    Raises:
        ObjectiveError: There are some and it says nothing, or there are none and it does.
    """
    name = stage.recipe.objective.name
    wanting = [companion for companion in objective.companions().values() if companion.filled == "checkpoint"]
    lacks = named is None and any(companion.source is None for companion in wanting)
    if (lacks or (named is not None and not wanting)) and (problem := use_problem(stage.recipe, named)):
        raise ObjectiveError(problem)
    if lacks:
        raise ObjectiveError(f"objective.name={name}: needs a teacher; give teacher_from=REFERENCE")
    if named is not None and not wanting:
        raise ObjectiveError(f"teacher_from={named}: objective {name} has no frozen teacher to fill; leave it out")
    return wanting


def _parts_of(objective: Objective) -> Parts:
    """Of the checkpoint that an objective will leave."""
    heads = objective.exported_heads()
    return {
        "backbone": _Part(objective.exported.spec, _shapes(objective.exported.weights())),
        "heads": None if heads is None else _Part(heads.spec, _shapes(heads.tensors)),
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Sequence[int]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _parts(weights: Weights, named: str) -> Parts:
    """Of a checkpoint, or a file, that is there.

    Raises:
        ObjectiveError: A file holds no weights.
    """
    try:
        return {
            "backbone": _Part(weights.spec, read_shapes(weights.file)),
            "heads": None if weights.heads is None else _Part(weights.heads.spec, read_shapes(weights.heads.file)),
        }
    except BackboneError as error:
        raise ObjectiveError(f"teacher_from={named}: {str(error).removeprefix(f'{weights.file}: ')}") from error


def _outline(wanting: list[Companion], named: str | None, parts: Parts) -> None:
    """Give companions the architecture of what will fill them.

    Raises:
        ObjectiveError: A part that one wants is not there, or does not fit it.
    """
    if any(parts[companion.part] is None for companion in wanting):
        raise ObjectiveError(f"teacher_from={named}: {NO_HEADS}")
    for companion in wanting:
        part = parts[companion.part]
        assert part is not None  # refused above
        try:
            companion.outline(part.spec)
            companion.require_fit(part.shapes)
        except (BackboneError, ObjectiveError) as error:
            raise ObjectiveError(f"teacher_from={named}: {error}") from error
