"""`pretrain run ... --dry-run`: what a run would do and take, stage by stage. Nothing is started, packed or written.

All lines have at most 80 columns, but for names of files that are longer.
"""

from __future__ import annotations

import math
import os
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipelines.shards.manifest import MANIFEST_NAME
from data_pipelines.storage.locations import redact
from pretrain.config.checks.zero import zero_objections
from pretrain.config.mistakes import shown
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, Stage
from pretrain.machine import misfit, this_machine
from pretrain.remote.places import shown_storage
from pretrain.screen import say

if TYPE_CHECKING:
    from pretrain.training.outlook import Outlook, Shown

__all__ = ["explain"]

_WIDTH, _INDENT = 80, 10
_LABEL = 38  # of a row of the table of memory
_GLUE = "\N{NO-BREAK SPACE}"  # between what stays on one line: a number and its unit


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

        found = look_ahead(checked_plan(plan, Path(plan.recipe.storage) / "dry-run"), with_data=photos is None)
    final = plan.recipe
    _show("recipe", f"{final.name}: {final.description}".rstrip(": "))
    _show("data", *data)
    for number, (stage, outlook) in enumerate(zip(plan.stages, found, strict=True), start=1):
        _show("train", _training(stage, samples))
        if outlook is None:
            _show("model", "of a plug-in, which is not known before it is built")
            continue
        if outlook.warning is not None:
            _show("", f"warning: {outlook.warning}")
        if outlook.teacher:
            _show("teacher", outlook.teacher)
        _show("views", *_views(outlook))
        _show("model", _model(outlook))
        _show_as_it_is("memory", _memory(outlook))
        _show("", *_memory_notes(outlook))
        _show("disk", *_disk(plan, found[:number], samples))
    _show("where", *_machines(plan))
    _show("evaluate", *_evaluations(plan))
    where = f"checkpoints in {final.checkpoints.storage}; " if final.checkpoints.storage else ""
    _show(
        "leaves",
        f"{shown_storage(Path(final.storage))}/{final.name}-DATE-TIME-XXXX/",
        f"{where}record in {_tracking(Path(final.storage))}",
    )
    _show("", "nothing was started; leave --dry-run out to begin")


def _show(label: str, *paragraphs: str) -> None:
    for paragraph in paragraphs:
        lines = textwrap.wrap(paragraph, _WIDTH - _INDENT, break_long_words=False, break_on_hyphens=False)
        _show_as_it_is(label, [line.replace(_GLUE, " ") for line in lines])
        label = ""


def _show_as_it_is(label: str, lines: Iterable[str]) -> None:
    for line in lines:
        say(f"{label:<{_INDENT}}{line}".rstrip())
        label = ""


def _shards(recipe: Recipe) -> tuple[int, list[str]]:
    from pretrain.config.data import open_data

    data = recipe.data
    if data.unindexed != "index":
        return 0, [f"{redact(str(data.train))}, streamed without an index"]
    samples = open_data(data).num_samples
    if data.mixture_by == "join":
        parts = [f"{part.name} {redact(part.shards)}" for part in data.mixture]
        return samples, [f"{samples} samples, each one of every part: {', '.join(parts)}"]
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
    steps = _steps(recipe, samples)
    seen = steps * train.global_batch_size
    epochs = f", {seen / samples:.3g} epochs" if samples else ""
    name = f"stage {stage.name}: " if stage.name else ""
    return (
        f"{name}{recipe.objective.name}, {steps} steps of {train.global_batch_size} = {seen} samples{epochs}; "
        f"{recipe.optimizer.name}, peak lr {recipe.peak_lr:.3g}, warm-up {recipe.optimizer.warmup_steps} steps"
    )


def _steps(recipe: Recipe, samples: int) -> int:
    """Of a stage; those of photos that are not packed yet may still be stated in epochs."""
    train = recipe.train
    return train.steps if train.epochs is None else math.ceil(train.epochs * samples / train.global_batch_size)


def _views(outlook: Outlook) -> Iterator[str]:
    is_mixed = len(outlook.shown) > 1
    for one in outlook.shown:
        share = f"in {one.share:.0%} of the steps " if is_mixed else ""
        tokens = "" if one.tokens is None else f"; {one.tokens} tokens per sample"
        yield f"{share}{'; '.join(_crops(one))}{tokens}"
    if outlook.tokens_per_step is not None:
        number = outlook.shown[0].num_prefix
        more = f", {number} of each crop beside its patches" if number else ""
        average = " on average" if is_mixed else ""
        yield f"{_count(round(outlook.tokens_per_step))} tokens per step{average}{more}"


def _crops(one: Shown) -> Iterator[str]:
    """Views that are alike together: `global_1, global_2: 224 px, 14 x 14 patches`."""
    names: dict[str, list[str]] = {}
    for view, grid in zip(one.views, one.grids, strict=True):
        what = view.extent
        if grid is not None:
            what += f", {' x '.join(map(str, grid))} {'patches' if len(grid) > 1 else 'tokens'}"
        what = re.sub(r"(?<=\d) (?=[a-z])|(?<=x) (?=\d)", _GLUE, what)  # numbers stay with what they count
        names.setdefault(what if view.times is None else f"{view.times}{_GLUE}x{_GLUE}{what}", []).append(view.name)
    for what, those in names.items():
        yield f"{', '.join(those)}: {what}"


def _model(outlook: Outlook) -> str:
    counted = outlook.counted
    parts = ", ".join(f"{name} {_count(number)}" for name, number in counted.parts.items())
    beside = {"not trained": counted.frozen} if counted.frozen else {}
    companions = {counted.titles[name]: number for name, number in counted.companions.items()}
    more = "".join(f"; {name} {_count(number)}" for name, number in (beside | companions).items())
    return f"{_count(counted.trained, 'million')} trained parameters: {parts}{more}"


def _memory(outlook: Outlook) -> Iterator[str]:
    """A table: what each worker has, in each ZeRO stage."""
    train, memory = outlook.recipe.train, outlook.memory
    rows = {
        "weights": [each.weights for each in memory],
        "masters, moments": [each.optimizer for each in memory],
        "gradients, buffers": [max(each.backward, each.update) for each in memory],
    }
    if outlook.counted.companions:
        title = ", ".join(outlook.counted.titles.values())
        rows[title if len(title) < _LABEL else "teachers"] = [each.companions for each in memory]
    if outlook.activations is not None:
        rows["activations"] = [outlook.activations] * len(memory)
    rows["in all, at the fullest moment"] = in_all = [outlook.in_all(stage) for stage in range(len(memory))]
    unit, name = _unit(max(in_all) // 10)  # small numbers beside large ones
    title = f"{name} per worker (of {train.workers}), ZeRO stage"
    marks = [f"({stage})" if _refusal(outlook, stage) else f"{stage} " for stage in range(len(memory))]
    marks[train.zero_stage or 0] = f"[{train.zero_stage}]"
    yield f"{title:<{_LABEL}}" + "".join(f"{mark:>8}" for mark in marks)
    for row, sizes in rows.items():
        yield f"{row:<{_LABEL}}" + "".join(f"{size / unit:>7.1f} " for size in sizes)


def _memory_notes(outlook: Outlook) -> Iterator[str]:
    train = outlook.recipe.train
    refused = "".join(f"; ({stage}) is refused: {text}" for stage in range(4) if (text := _refusal(outlook, stage)))
    yield f"[{train.zero_stage}] is train.zero_stage{refused}"
    if outlook.activations is None:
        yield "activations come to that, and are not known before it runs"
        return
    views = " of the largest views" if len(outlook.shown) > 1 else ""
    blocks = "; blocks are computed again (train.checkpoint_blocks)" if train.checkpoint_blocks else ""
    yield f"activations are those of {train.micro_batch_size} samples{views}{blocks}"


def _refusal(outlook: Outlook, zero_stage: int) -> str:
    """The settings that refuse a ZeRO stage."""
    objections = zero_objections(outlook.recipe.optimizer, outlook.recipe.train, zero_stage)
    return ", ".join(f"{key}={shown(value)}" for key, value, _ in objections)


def _disk(plan: Plan, found: Sequence[Outlook | None], samples: int) -> Iterator[str]:
    """Checkpoints of the last of the stages in `found`, and what those of all of them take when it ends."""
    train, evaluation = plan.recipe.train, plan.recipe.evaluation
    looks = [look for look in found if look is not None]
    counts = [-(-_steps(look.recipe, samples) // look.recipe.train.checkpoint_every) for look in looks]
    backbones = [
        look.backbone_bytes + look.heads_bytes for look, count in zip(looks, counts, strict=True) for _ in range(count)
    ]
    if evaluation.enabled and evaluation.baseline:
        backbones.append(looks[0].baseline_bytes)
    num_states = min(
        sum(counts), train.keep_last + (train.keep_best if evaluation.enabled and evaluation.select else 0)
    )
    states = num_states * max(look.state_bytes for look in looks)
    here = looks[-1]
    heads = f", heads of {_size(here.heads_bytes)}" if here.heads_bytes else ""
    yield (
        f"every {here.recipe.train.checkpoint_every} steps a backbone of {_size(here.backbone_bytes)}{heads} and a "
        f"training state of {_size(here.state_bytes)}"
    )
    yield (
        f"{_size(sum(backbones) + states)} when {'the stage' if len(plan.stages) > 1 else 'the run'} ends "
        f"({len(backbones)} backbones, {num_states} states); one state more while it is written"
    )


def _count(number: int, least: str = "") -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f}{_GLUE}billion"
    return f"{number / 1e6:.1f}{_GLUE}million" if number >= 1e6 or least else str(number)


def _unit(num_bytes: int) -> tuple[float, str]:
    units = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"))
    return next((unit for unit in units if num_bytes >= unit[0]), (1e3, "kB"))


def _size(num_bytes: int) -> str:
    unit, name = _unit(num_bytes)
    return f"{num_bytes / unit:.1f}{_GLUE}{name}"


def _machines(plan: Plan) -> Iterator[str]:
    """Where it would run, how each stage divides its batch there, and whether this machine has what that takes."""
    recipe, machine = plan.recipe, this_machine()
    address = recipe.cluster.address or os.environ.get("RAY_ADDRESS")
    place = f"Ray at {redact(address)}" if address else f"a private Ray on this machine, which has {machine}"
    device = recipe.train.device
    if device == "auto" and not address and machine.gpus is not None:
        device = f"auto, which is {'cuda' if machine.gpus else 'cpu'} here"
    of_stages: dict[str, list[str]] = {}
    for stage in plan.stages:
        train = stage.recipe.train
        how = f"micro-batch {train.micro_batch_size} x accumulation {train.accumulation}; {train.precision}, ZeRO stage"
        of_stages.setdefault(f"{how} {train.zero_stage}", []).append(stage.name)
    workers = f"{place}; {recipe.train.workers} workers"
    if len(of_stages) == 1:
        yield f"{workers} x {next(iter(of_stages))}, device {device}"
    else:
        yield f"{workers}, device {device}"
        yield from (f"stage {', '.join(names)}: {how}" for how, names in of_stages.items())
    if (found := misfit(recipe, machine)) is not None:
        yield f"{'would be refused' if found.is_refused else 'warning'}: {found.text}"


def _evaluations(plan: Plan) -> Iterator[str]:
    """What is evaluated after which steps, and what of its suites is not."""
    from pretrain.evaluations import due

    evaluation = plan.recipe.evaluation
    if not evaluation.enabled or not evaluation.tasks:
        yield "nothing"
        return
    ends = [
        min(step, stage.last_step)
        for stage in plan.stages
        for step in range(
            stage.first_step + stage.recipe.train.checkpoint_every,
            stage.last_step + stage.recipe.train.checkpoint_every,
            stage.recipe.train.checkpoint_every,
        )
    ]
    steps: dict[str, list[int]] = {}
    for step, task in due(plan, sorted({0, *ends}), ()):
        steps.setdefault(f"{task.protocol}/{task.data}", []).append(step)
    together: dict[tuple[int, ...], list[str]] = {}
    for name, those in steps.items():
        together.setdefault(tuple(those), []).append(name)
    paragraphs = [f"{', '.join(names)} after steps {_listed_steps(those)}" for those, names in together.items()]
    yield from paragraphs[:-1]
    yield f"{paragraphs[-1]}; best by {evaluation.select or 'the newest'}"
    yield from _left_out(plan.recipe)


def _listed_steps(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps[:4])) + (f", ... {steps[-1]}" if len(steps) > 4 else "")


def _left_out(recipe: Recipe) -> Iterator[str]:
    """What the suites of a recipe have beside its tasks, with the reason; which suites those are its tasks say."""
    from pretrain.config.suites import judged

    evaluation = recipe.evaluation
    suites = {(task.suite, task.data): task for task in evaluation.tasks if task.suite is not None}
    told: dict[str, dict[str, None]] = {}  # reason -> names, each once
    for (_, data), task in suites.items():
        for protocol, reason in judged(task, recipe.backbone.kind, evaluation.data[data]).items():
            if reason is not None:
                told.setdefault(reason, {})[f"{protocol}/{data}"] = None
    for reason, names in told.items():
        yield f"without {', '.join(names)}: {reason}"


def _tracking(storage: Path) -> str:
    from pretrain.tracking.client import default_uri

    return redact(default_uri(storage))
