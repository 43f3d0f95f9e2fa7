"""What only the model and the data can tell of a request, asked before a run writes anything.

The model is built, and takes a step, without its numbers (on torch's meta device), so that a large one costs no memory;
of the data one shard of each source on this machine is looked at. What a store elsewhere holds, the workers find out.

Not here: what a stage takes (`pretrain.training.outlook`), what settings mean together (`pretrain.config.checks`),
starting weights (`pretrain.checkpoints.initialization`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from backbones.errors import BackboneError
from data_pipelines.decode import IMAGE_FIELDS, decode_arrays
from data_pipelines.errors import CorruptSampleError, DataError
from data_pipelines.field_kinds import has_channels
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.locations import is_local
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.specs import views_from
from evaluation.data import require_classes, require_labels
from evaluation.extraction.decoding import require_decoder
from evaluation.extraction.recipe import Extraction, extraction_of, feature_recipe
from evaluation.registry import EvaluationError, protocol
from objectives.base import Objective
from objectives.errors import ObjectiveError
from pretrain.checkpoints.reads import reads_of
from pretrain.config.pairing import fitting_recipes
from pretrain.config.schema import Recipe
from pretrain.config.stage_list import backbones_unlike
from pretrain.config.stages import Plan, Stage
from pretrain.errors import RequestError
from pretrain.training import frozen_teachers
from pretrain.training.handover import takes_nothing
from pretrain.training.model import build_objective
from pretrain.training.outlook import Outlook, look_at

__all__ = ["look_ahead", "outline", "size_line"]

_AXES = {"image": 2, "volume": 3}  # of a view of this kind, behind its channels
_MOST_COLUMNS = 64  # of a cloud; it has more points
_LEAST_SIDE = 4  # voxels


def look_ahead(plan: Plan, *, with_data: bool = True) -> list[Outlook | None]:
    """Build every stage's model without numbers, take a step with it, and compare it with the data.

    Args:
        plan: Of a run that is to begin.
        with_data: False where the data are not packed yet.

    Returns:
        What each stage takes; None of one whose model is a plug-in's that cannot be built like that.

    Raises:
        RequestError: This machine has no GPU and one is asked for, a model cannot be built, a stage would fail at its
            first step, the data have not what an objective reads, or evaluation data no labels of its protocol.
    """
    mistakes = list(_devices(plan.recipe))
    found: list[Outlook | None] = []
    outlined: dict[int, Objective] = {}
    for index, stage in enumerate(plan.stages):
        where = f"stage {stage.name}: " if stage.name else ""
        try:
            objective = outline(stage.recipe)
            if objective is not None and with_data:
                mistakes += [f"{where}{problem}" for problem in _sources(stage.recipe, objective)]
            if objective is not None and (problem := _beginning(plan, index, objective, outlined)):
                mistakes.append(f"{where}{problem}")
            if objective is not None:
                mistakes += [f"{where}{problem}" for problem in _decoders(plan.recipe, objective)]
            if objective is None or stage.teacher_from not in (None, *outlined):
                found.append(None)
                continue
            with torch.device("meta"):
                teacher = frozen_teachers.outline(plan, index, objective, outlined)
            outlined[index] = objective
            found.append(replace(look_at(stage.recipe, objective), teacher=teacher))
        except (BackboneError, DataError, ObjectiveError) as error:
            mistakes.append(f"{where}{error}")
    if with_data:
        mistakes += _evaluation_data(plan.recipe, outlined.get(len(plan.stages) - 1))
    if mistakes:
        raise RequestError(*dict.fromkeys(mistakes))
    return found


def size_line(found: Sequence[Outlook | None]) -> str:
    """Parameters of the stage that takes most memory, and what it takes; empty where nothing is known."""
    known = [look for look in found if look is not None]
    if not known:
        return ""
    largest = max(known, key=lambda look: look.in_all(look.recipe.train.zero_stage or 0))
    activations = largest.activations
    more = "besides activations" if activations is None else f"activations about {activations / 1e9:.2f} GB"
    return (
        f"{largest.counted.trained / 1e6:.1f} million trained parameters; all weights, gradients and moments take "
        f"about {largest.chosen.total / 1e9:.2f} GB per worker, {more}"
    )


def _beginning(plan: Plan, index: int, objective: Objective, earlier: Mapping[int, Objective]) -> str | None:
    """Why a stage would begin with nothing of the stage whose weights it takes; one with a teacher of its own may."""
    stage = plan.stages[index]
    if stage.init_from is None or stage.init_from not in earlier or _has_teacher(stage):
        return None
    if not takes_nothing(objective, earlier[stage.init_from]):
        return None
    source = plan.stages[stage.init_from].name
    unlike = backbones_unlike(plan, index, stage.init_from)
    return (
        f"init_from={source}: no weight of that stage's backbone fits ({unlike}); set backbone as there, or train this "
        "stage in a run of its own"
    )


def _has_teacher(stage: Stage) -> bool:
    return stage.init_with == "student" and (stage.teacher_from is not None or stage.recipe.teacher_from is not None)


def _devices(recipe: Recipe) -> Iterator[str]:
    elsewhere = recipe.cluster.address or os.environ.get("RAY_ADDRESS")
    if recipe.train.device == "cuda" and not elsewhere and not torch.cuda.is_available():
        yield "train.device=cuda: this machine has no GPU that torch can use; use train.device=cpu or auto"


def outline(recipe: Recipe) -> Objective | None:
    """The objective without numbers; None where a plug-in cannot be built like that."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the workers say it
            return build_objective(recipe)
    except (BackboneError, ObjectiveError):
        raise
    except Exception:  # of code that is not ours, which may well work on a real device
        return None


def _sources(recipe: Recipe, objective: Objective) -> Iterator[str]:
    """What the objective reads that a source of the recipe has not."""
    shown = [objective.views(), *(views for _, views in objective.mixed_views())]
    sources = {"data.train": recipe.data.train}
    sources |= {f"data.mixture[{index}].shards": part.shards for index, part in enumerate(recipe.data.mixture)}
    if recipe.data.unindexed != "index":
        return
    fields: dict[str, frozenset[str]] = {}
    samples: dict[str, dict[str, Any]] = {}  # the first of each
    for key, source in sources.items():
        try:
            if source and (dataset := _first_shard(source, allow_pipe=recipe.data.allow_pipe)) is not None:
                fields[f"{key}={source}"], samples[f"{key}={source}"] = dataset.fields, dataset.read(0)
        except DataError as error:
            if not (isinstance(error, CorruptSampleError) and recipe.data.max_corrupt_fraction):
                yield f"{key}={source}: objective {recipe.objective.name}: {error}"
    if recipe.data.mixture_by == "join":
        is_known = len(fields) == len(recipe.data.mixture)  # what a store elsewhere holds, the workers find out
        fields = {"data.mixture": frozenset().union(*fields.values())} if is_known else {}
        samples = {"data.mixture": {name: data for sample in samples.values() for name, data in sample.items()}}
    for source, present in fields.items():
        try:
            for views in map(views_from, shown):
                _require_suitable(objective, ViewMaker(views, present), samples[source])
        except DataError as error:
            if not (isinstance(error, CorruptSampleError) and recipe.data.max_corrupt_fraction):
                yield f"{source}: objective {recipe.objective.name}: {error}{_others(objective, samples[source])}"


def _require_suitable(objective: Objective, maker: ViewMaker, sample: Mapping[str, Any]) -> None:
    """Refuse a sample of which the objective's views cannot be made, or with other channels than the backbone takes.

    Raises:
        DataError: says which field, and what it holds.
    """
    made = maker(sample, seed=0)
    for view in maker.views:
        axes = _AXES.get(view.kind)
        if axes is None or view.name not in made:
            continue
        channels, taken = made[view.name].shape[-axes - 1], objective.backbone.channels_of(view.kind)
        if channels != taken:
            noun = "channel" if channels == 1 else "channels"
            raise DataError(
                f"view {view.name!r} has {channels} {noun} of field {maker.field_of(view)}, and backbone "
                f"{objective.backbone.spec['name']!r} takes {taken}; set backbone.in_chans={channels} if that is right"
            )


def _others(objective: Objective, sample: Mapping[str, Any]) -> str:
    """Recipes for what a sample of arrays seems to hold, where that is something else than its backbone encodes, or
    half of what an objective of images and volumes reads.
    """
    for name in sorted(sample):
        try:
            arrays = list(decode_arrays(sample[name]).values()) if name.endswith(("npy", "npz")) else []
        except DataError:
            continue
        seeming = [found for array in arrays if (found := _seeming_kind(array.shape)) is not None]
        if seeming:
            kind, channels = seeming[0]
            is_other = kind != objective.backbone.kind or channels != getattr(objective.backbone, "in_chans", channels)
            reads_images = any(view.kind == "image" for view in views_from(objective.views()))
            lacks_images = kind != "image" and reads_images and sample.keys().isdisjoint(IMAGE_FIELDS)
            fitting = fitting_recipes(kind, channels) if is_other or lacks_images else ""
            return f"; {fitting}" if fitting else ""
    return ""


def _seeming_kind(shape: tuple[int, ...]) -> tuple[str, int] | None:
    """Kind of backbone, and channels, for an array of this shape."""
    if len(shape) == 2 and 3 <= shape[1] <= _MOST_COLUMNS < shape[0]:
        return "points", shape[1]
    if has_channels("array", shape):
        return "image", shape[0]
    if len(shape) in (3, 4) and min(shape[-3:]) >= _LEAST_SIDE:
        return "voxels", shape[0] if len(shape) == 4 else 1
    return None


def _decoders(recipe: Recipe, objective: Objective) -> Iterator[str]:
    """Tasks that need the decoder of an objective which exports none, or whose blocks do not fit its patches."""
    if not recipe.evaluation.enabled:
        return
    for index, task in enumerate(recipe.evaluation.tasks):
        spec, encoder = protocol(task.protocol), objective.exported
        if spec.tokens == "decoded" and task.suite is None:  # of a suite it is left out when it comes to it
            heads = objective.exported_heads()
            try:
                require_decoder(spec.name, "this objective", None if heads is None else heads.spec)
                feature_recipe(extraction_of(encoder.kind), spec, encoder.spec, None)
            except EvaluationError as error:
                yield f"evaluation.tasks[{index}].protocol={task.protocol}: {error}"


def _evaluation_data(recipe: Recipe, objective: Objective | None) -> Iterator[str]:
    """What evaluations need of their samples, input of the backbone and labels, and data have not.

    The first sample of each split is made what the backbone is given, where that one is known.
    """
    if not recipe.evaluation.enabled:
        return
    for task in recipe.evaluation.tasks:
        directory, spec = recipe.evaluation.data[task.data], protocol(task.protocol)
        reads = reads_of(vars(recipe.objective))
        extraction, facts = extraction_of(recipe.backbone.kind).reading(reads), None
        if objective is not None:
            with suppress(EvaluationError):  # a task that does not fit the backbone is told of without its data
                facts = feature_recipe(extraction, spec, objective.exported.spec, task.size, reads)
        for split in ("train", "test"):  # what one of them has not, the other one has not either
            try:
                first = next(iter(sorted(Path(directory).glob(f"{split}-*.tar"))), None)
                if first is not None:
                    dataset = open_dataset(str(first))
                    require_labels(dataset, spec.target_label)
                    field = dataset.require_field(*extraction.inputs)
                    require_classes(dataset, spec.target_label)
                    if facts is not None:
                        _require_prepared(dataset, field, extraction, facts)
            except (DataError, EvaluationError) as error:
                yield f"evaluation.data.{task.data}={directory}: protocol {task.protocol}: {error}"
                break


def _require_prepared(dataset: Dataset, field: str, extraction: Extraction, facts: Mapping[str, Any]) -> None:
    """Refuse samples of which the input of the backbone cannot be made, as the first one shows.

    Raises:
        DataError, EvaluationError: says why, and names the sample.
    """
    try:
        extraction.prepare(dataset.read(0)[field], facts)
    except (DataError, EvaluationError) as error:
        raise type(error)(f"{dataset.where(0)}, field {field}: {error}") from None


def _first_shard(source: str, *, allow_pipe: bool) -> Dataset | None:
    """The first shard of a source as a data set of its own; None where it is not on this machine."""
    if not is_local(source):
        return None
    return open_dataset(expand_source(source, allow_pipe=allow_pipe)[0])
