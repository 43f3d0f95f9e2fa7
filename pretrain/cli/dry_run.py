"""`pretrain run ... --dry-run`: what a run would do, in one screen. Nothing is started, packed or written."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.storage.locations import redact
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, Stage
from pretrain.screen import say

__all__ = ["explain"]


def explain(recipe: str, overrides: Sequence[str], plan: Plan, photos: Path | None) -> None:
    """Print it.

    Args:
        recipe, overrides: The request.
        plan: Its plan; of one on photos as far as it can be checked before they are packed.
        photos: The plain folder of photos that would be packed; None where the data are shards.

    Raises:
        RequestError, DataError: What `pretrain run` would refuse.
    """
    from pretrain.checkpoints.initialization import checked_plan
    from pretrain.reporting.progress import shown_while

    if photos is None:
        samples, data = _shards(plan.recipe)
    else:
        plan, samples, data = _photos(recipe, overrides, plan, photos)
    with shown_while("looking at the model and the data"):
        from pretrain.training.preflight import look_ahead

        size = look_ahead(checked_plan(plan, Path(plan.recipe.storage) / "dry-run"), with_data=photos is None)
    final = plan.recipe
    where = f"checkpoints in {final.checkpoints.storage}; " if final.checkpoints.storage else ""
    rows = [
        ("recipe", f"{final.name}: {final.description}".rstrip(": ")),
        ("model", size),
        *(("data", line) for line in data),
        *(("train", _training(stage, samples)) for stage in plan.stages),
        ("where", _machines(final)),
        ("evaluate", _evaluations(plan)),
        (
            "leaves",
            f"{final.storage}/{final.name}-DATE-TIME-XXXX/, a checkpoint every {final.train.checkpoint_every} steps",
        ),
        ("leaves", f"{where}record in {_tracking(Path(final.storage))}"),
        ("", "nothing was started; leave --dry-run out to begin"),
    ]
    before = ""
    for name, text in rows:
        say(f"{'' if name == before else name:<10}{text}")
        before = name


def _shards(recipe: Recipe) -> tuple[int, list[str]]:
    from pretrain.config.data import open_data

    data = recipe.data
    if data.unindexed != "index":
        return 0, [f"{redact(str(data.train))}, streamed without an index"]
    samples = open_data(data).num_samples
    sources = [str(data.train)] if data.train else [f"{part.name}: {part.shards}" for part in data.mixture]
    return samples, [f"{samples} samples of {redact(source)}" for source in sources]


def _photos(recipe: str, overrides: Sequence[str], draft: Plan, folder: Path) -> tuple[Plan, int, list[str]]:
    from pretrain.photos import drawn_splits, foreseen_plan

    plan, listing, dest = foreseen_plan(recipe, overrides, folder, draft)
    size = sum(item.pieces[0].size for item in listing.items) / 1e6
    classes = f"{len(listing.classes)} classes" if listing.classes else "no classes"
    drawn = drawn_splits(listing)
    counts = ", ".join(f"{split} {drawn[split]}" for split in sorted(drawn, reverse=True))
    is_packed = (dest / MANIFEST_NAME).exists()
    return (
        plan,
        drawn["train"],
        [
            f"{len(listing.items)} photos ({size:.0f} MB) of {folder}, {classes}: {counts}",
            f"{'packed already' if is_packed else 'would be packed, once,'} in {dest}",
        ],
    )


def _training(stage: Stage, samples: int) -> str:
    recipe, train = stage.recipe, stage.recipe.train
    steps = train.steps if train.epochs is None else math.ceil(train.epochs * samples / train.global_batch_size)
    seen = steps * train.global_batch_size
    epochs = f", {seen / samples:.3g} epochs" if samples else ""
    name = f"stage {stage.name}: " if stage.name else ""
    return (
        f"{name}{recipe.objective.name}, {steps} steps of {train.global_batch_size} = {seen} samples{epochs}; "
        f"{recipe.optimizer.name}, peak lr {recipe.peak_lr:.3g}, warm-up {recipe.optimizer.warmup_steps} steps"
    )


def _machines(recipe: Recipe) -> str:
    train, address = recipe.train, recipe.cluster.address or os.environ.get("RAY_ADDRESS")
    place = f"Ray at {redact(address)}" if address else "a private Ray on this machine"
    micro = f"{train.workers} workers x micro-batch {train.micro_batch_size} x accumulation {train.accumulation}"
    return f"{place}; {micro}; {train.precision}, ZeRO stage {train.zero_stage}, device {train.device}"


def _evaluations(plan: Plan) -> str:
    from pretrain.evaluations import due

    evaluation = plan.recipe.evaluation
    if not evaluation.enabled or not evaluation.tasks:
        return "nothing"
    ends = [
        min(step, stage.last_step)
        for stage in plan.stages
        for step in range(
            stage.first_step + stage.recipe.train.checkpoint_every,
            stage.last_step + stage.recipe.train.checkpoint_every,
            stage.recipe.train.checkpoint_every,
        )
    ]
    steps = sorted({step for step, _ in due(plan, [0, *ends], ())})
    listed = ", ".join(map(str, steps[:4])) + (f", ... {steps[-1]}" if len(steps) > 4 else "")
    tasks = ", ".join(f"{task.protocol}/{task.data}" for task in evaluation.tasks)
    return f"{tasks} after steps {listed}; best by {evaluation.select or 'the newest'}"


def _tracking(storage: Path) -> str:
    from pretrain.tracking.client import default_uri

    return redact(default_uri(storage))
