"""What only the model and the data can tell of a request, asked before a run writes anything.

The model is built without its numbers (on torch's meta device), so that a large one costs no memory; of the data one
shard of each source on this machine is looked at. What a store elsewhere holds, the workers find out.

Not here: what settings mean together (`pretrain.config.checks`), starting weights
(`pretrain.checkpoints.initialization`).
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch

from backbones.errors import BackboneError
from data_pipelines.errors import DataError
from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.shards.source import expand_source
from data_pipelines.storage.locations import is_local
from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.specs import views_from
from evaluation.registry import protocol
from objectives.base import Objective
from objectives.errors import ObjectiveError
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan
from pretrain.errors import RequestError
from pretrain.training.model import build_objective

__all__ = ["look_ahead"]

# Bytes per parameter and moment: all of them are fp32 but the model and its gradients in bf16.
_MOMENTS = {"lion": 1, "sgdw": 1, "lars": 1, "muon": 1}


def look_ahead(plan: Plan, *, with_data: bool = True) -> str:
    """Build every stage's model without numbers and compare it with the data.

    Args:
        plan: Of a run that is to begin.
        with_data: False where the data are not packed yet.

    Returns:
        one line on the size of the largest stage: its parameters and what they take.

    Raises:
        RequestError: This machine has no GPU and one is asked for, a model cannot be built, the data have not what an
            objective reads, or evaluation data no labels of its protocol.
    """
    mistakes = list(_devices(plan.recipe))
    sizes = []
    for stage in plan.stages:
        where = f"stage {stage.name}: " if stage.name else ""
        try:
            objective = _outline(stage.recipe)
        except (BackboneError, ObjectiveError) as error:
            mistakes.append(f"{where}{error}")
            continue
        if objective is not None:
            if with_data:
                mistakes += [f"{where}{problem}" for problem in _sources(stage.recipe, objective)]
            sizes.append(_size(stage.recipe, objective))
    if with_data:
        mistakes += _labels(plan.recipe)
    if mistakes:
        raise RequestError(*dict.fromkeys(mistakes))
    return max(sizes, default=(0, ""))[1]


def _devices(recipe: Recipe) -> Iterator[str]:
    elsewhere = recipe.cluster.address or os.environ.get("RAY_ADDRESS")
    if recipe.train.device == "cuda" and not elsewhere and not torch.cuda.is_available():
        yield "train.device=cuda: this machine has no GPU that torch can use; use train.device=cpu or auto"


def _outline(recipe: Recipe) -> Objective | None:
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
    sources = {"data.train": recipe.data.train}
    sources |= {f"data.mixture[{index}].shards": part.shards for index, part in enumerate(recipe.data.mixture)}
    for key, source in sources.items():
        if source is None or recipe.data.unindexed != "index":
            continue
        try:
            if (dataset := _first_shard(source, allow_pipe=recipe.data.allow_pipe)) is not None:
                ViewMaker(views_from(objective.views()), dataset.fields)
        except DataError as error:
            yield f"{key}={source}: objective {recipe.objective.name}: {error}"


def _labels(recipe: Recipe) -> Iterator[str]:
    if not recipe.evaluation.enabled:
        return
    for task in recipe.evaluation.tasks:
        directory = recipe.evaluation.data[task.data]
        for split in ("train", "test"):
            try:
                first = next(iter(sorted(Path(directory).glob(f"{split}-*.tar"))), None)
                if first is not None:
                    open_dataset(str(first)).require_field(protocol(task.protocol).label)
            except DataError as error:
                yield f"evaluation.data.{task.data}={directory}: protocol {task.protocol}: {error}"


def _first_shard(source: str, *, allow_pipe: bool) -> Dataset | None:
    """The first shard of a source as a data set of its own; None where it is not on this machine."""
    if not is_local(source):
        return None
    return open_dataset(expand_source(source, allow_pipe=allow_pipe)[0])


def _size(recipe: Recipe, objective: Objective) -> tuple[int, str]:
    """Bytes of parameters, gradients and moments per worker, and the line that says it."""
    trained = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in objective.parameters())
    companions = [companion.state_dict() for companion in objective.companions().values()]
    kept = sum(tensor.numel() for state in companions for tensor in state.values())
    train = recipe.train
    model = 2 if train.precision == "bf16" else 4
    master = 4 if train.precision == "bf16" else 0
    moments = 4 * _MOMENTS.get(recipe.optimizer.name, 2)
    shares = [
        train.workers if (train.zero_stage or 0) >= least else 1 for least in (3, 2, 1)
    ]  # parameters, gradients, optimizer
    size = total * model // shares[0] + trained * model // shares[1] + trained * (master + moments) // shares[2]
    size += 4 * kept
    line = (
        f"{trained / 1e6:.1f} million trained parameters; all weights, gradients and moments take about "
        f"{size / 1e9:.2f} GB per worker, besides activations"
    )
    return size, line
