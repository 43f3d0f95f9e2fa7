"""Where a run, or a stage of one, starts from. One order, everywhere: resume > resume_from > init_from > scratch.

    stage          of a later stage: all weights of the stage before
    resume         its own newest checkpoint: whatever a recipe says about the beginning, it has begun
    resume_from    another run's whole training state: weights, optimizer, position in the stream, random states
    init_from      weights of a backbone, and nothing else: training begins at step 0
    scratch        random weights

`starting_point` decides, `checked` looks at a request before anything heavy starts and replaces references that may
mean something else tomorrow by what they mean now, `find_weights` and `find_training_state` find what is meant:

    init_from      RUN_ID, runs:/RUN_ID[/STEP | /best], a run's directory, a checkpoint (directory or URI),
                   models:/NAME[@ALIAS], FILE.safetensors, timm:NAME (weights from the local Hugging Face or torch hub
                   cache, nothing is downloaded), timm:NAME@FILE (safetensors, or a state dict of torch)
    resume_from    RUN_ID, runs:/RUN_ID[/STEP], a run's directory, a checkpoint (directory or URI)

`teacher_from` takes what `init_from` takes. Both read tensors and run no code, see `backbones.io.open_weights`. What
`resume_from` trusts is said in `pretrain.checkpoints.store`. Not here: putting weights into a model
(`pretrain.training.state`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from backbones.errors import BackboneError
from backbones.io import STATE_DICT_SUFFIXES, read_shapes
from backbones.registry import IMAGE
from data_pipelines.files import sha256
from data_pipelines.parsing import parse_json
from objectives.parts.frozen_use import FrozenTeacherConfig
from pretrain.checkpoints import references
from pretrain.checkpoints.store import (
    REFERENCES,
    TRAINING_STATE,
    CheckpointError,
    Published,
    find_published,
    latest,
    read_manifest,
)
from pretrain.config.optimizer_facts import is_reshardable
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan, Stage
from pretrain.config.teachers import patch_size_of
from pretrain.errors import RequestError, RunFailed, nearest
from pretrain.record.run_dir import BACKBONE, HEADS, RunDir

__all__ = [
    "NO_HEADS",
    "Start",
    "Weights",
    "about",
    "checked",
    "checked_plan",
    "find_training_state",
    "find_weights",
    "starting_point",
]

TIMM = "timm:"
_FORMS = f"{references.FORMS}, FILE.safetensors, timm:NAME or timm:NAME@FILE"
NO_HEADS = (
    f"has no {HEADS}, whose outputs would be learned; checkpoints of objective dinov3 have it, but that of step 0; "
    "give such a one, or learn features with objective.name=distillation"
)
How = Literal["resume", "resume_from", "stage", "init_from", "scratch"]
_HUB_FILES = ("model.safetensors", "open_clip_model.safetensors")  # as timm looks for them
_SIZES = re.compile(r"_patch\d+.*")  # in the name of a model; what comes before tells width and depth


@dataclass(frozen=True)
class Start:
    """How it begins, and from what; the reference is empty from scratch."""

    how: How
    reference: str = ""


def starting_point(*, own: str | None, resume_from: str | None, init_from: str | None) -> Start:
    """Where to start from; the only place that knows the order.

    Args:
        own: The newest checkpoint of the run (of the stage) itself.
        resume_from: The recipe's key; of later stages None.
        init_from: The recipe's key, or the checkpoint of the stage that this one takes its weights from.
    """
    if own is not None:
        return Start("resume", own)
    if resume_from is not None:
        return Start("resume_from", resume_from)
    if init_from is not None:
        return Start("init_from", init_from)
    return Start("scratch")


@dataclass(frozen=True)
class Weights:
    """Weights that a reference means, in a file on this machine.

    Attributes:
        reference: As it was asked for.
        file: Safetensors, or a state dict that torch wrote.
        sha256: Of the file.
        spec: Of what they belong to, or as much of it as is known: `Encoder.spec`, or that of heads.
        heads: Of a checkpoint whose objective exports some beside the backbone.
        step: Of a checkpoint, the steps that were done.
    """

    reference: str
    file: Path
    sha256: str
    spec: Mapping[str, Any]
    heads: Weights | None = None
    step: int | None = None


def find_weights(reference: str, storage: Path) -> Weights:
    """The weights that `init_from` means.

    Args:
        reference: One of the forms at the top of this file.
        storage: Where runs live.

    Raises:
        RequestError: There are none, or they cannot be had on this machine.
        CheckpointError: They are damaged.
        RunFailed: The registry cannot be reached.
    """
    if reference.startswith(TIMM):
        name, _, path = reference.removeprefix(TIMM).partition("@")
        file = _existing(Path(path) if path else _cached_timm_file(name, reference), reference)
        return Weights(reference, file, sha256(file), {"kind": IMAGE, "name": name})
    if reference.endswith(".safetensors"):
        file = _existing(Path(reference), reference)
        return Weights(reference, file, sha256(file), _spec_in(file))
    checkpoint = references.resolve(reference, storage, forms=_FORMS)
    manifest = read_manifest(checkpoint)
    files, heads = manifest["files"], None
    if HEADS in files:
        heads = Weights(reference, checkpoint / HEADS, files[HEADS]["sha256"], manifest.get("heads", {}))
    digest, step = files[BACKBONE]["sha256"], manifest["step"]
    return Weights(reference, checkpoint / BACKBONE, digest, manifest["backbone"], heads, step)


def find_training_state(reference: str, storage: Path) -> Published:
    """The checkpoint that `resume_from` means; of a run without a step the newest that has a training state.

    Raises:
        RequestError: There is none, or its training state is not there (any more).
        CheckpointError: Its manifest is damaged.
    """
    found = references.locate(reference, storage, resumable=True)
    if found is None:
        raise RequestError(
            f"{reference!r}: a training state is not in the registry; expected a run, runs:/RUN_ID/STEP, or the "
            "directory or URI of a checkpoint"
        )
    if not found.has_training_state:
        raise RequestError(f"{reference}: {found.location} has no training state; init_from takes its weights alone")
    return found


def checked(recipe: Recipe, run_dir: Path, *, of_stage: str = "") -> Recipe:
    """The recipe with `init_from`, `resume_from` and `teacher_from` looked at, and pinned to what they mean now.

    A run that has a checkpoint of its own goes on from there: it needs neither of the first two any more.

    Args:
        recipe: Of a run or a stage.
        run_dir: Directory of the run.
        of_stage: What stands before keys in messages: `stages[1].` of what a stage alone says.

    Raises:
        RequestError: What they name is not there, or does not fit the recipe.
    """
    if latest(run_dir) is not None:
        return recipe
    if recipe.resume_from is not None:
        with _named("resume_from", recipe.resume_from):
            found = find_training_state(recipe.resume_from, Path(recipe.storage))
            _check_state(found, recipe)
        recipe = replace(recipe, resume_from=_lasting(found, Path(recipe.storage)))
    elif recipe.init_from is not None:
        with _named(f"{of_stage}init_from", recipe.init_from):
            _check_architecture(find_weights(recipe.init_from, Path(recipe.storage)).spec, recipe)
            recipe = replace(recipe, init_from=_pinned(recipe.init_from, Path(recipe.storage)))
    if recipe.teacher_from is not None:
        with _named(f"{of_stage}teacher_from", recipe.teacher_from):
            _check_teacher(find_weights(recipe.teacher_from, Path(recipe.storage)), recipe)
            recipe = replace(recipe, teacher_from=_pinned(recipe.teacher_from, Path(recipe.storage)))
    return recipe


def checked_plan(plan: Plan, run_dir: Path) -> Plan:
    """`checked` for the recipe of every stage. Of a run that goes on, the frozen teachers that it still needs as well.

    Raises:
        RequestError: As `checked`; or a teacher is gone, or is another one than training began with.
    """
    newest = latest(run_dir)
    if newest is None:
        return _each_checked(plan, run_dir)
    mistakes: list[str] = []
    for index, stage in enumerate(plan.stages):
        if stage.last_step > newest.step:
            try:
                _require_teacher(plan, index, newest, run_dir)
            except RequestError as error:
                mistakes += error.mistakes
    if mistakes:
        raise RequestError(*dict.fromkeys(mistakes))
    return plan


def _each_checked(plan: Plan, run_dir: Path) -> Plan:
    said = {(stage.recipe.init_from, stage.recipe.teacher_from) for stage in plan.stages}
    stages: list[Stage] = []
    mistakes: list[str] = []
    for index, stage in enumerate(plan.stages):
        try:
            recipe = checked(stage.recipe, run_dir, of_stage=f"stages[{index}]." if len(said) > 1 else "")
            stages.append(replace(stage, recipe=recipe))
        except RequestError as error:
            mistakes += error.mistakes
    if mistakes:
        raise RequestError(*dict.fromkeys(mistakes))
    return Plan(tuple(stages))


def _require_teacher(plan: Plan, index: int, newest: Published, run_dir: Path) -> None:
    """Look whether what fills the frozen teachers of a stage is there, and is what filled them before."""
    stage = plan.stages[index]
    key = f"stages[{index}].teacher_from" if stage.name else "teacher_from"
    if stage.teacher_from is not None:
        source = plan.stages[stage.teacher_from]
        step = source.last_step if stage.teacher_step is None else stage.teacher_step
        if step <= newest.step and find_published(run_dir, step) is None:
            problem = f"the checkpoint of step {step} of this run is gone, and stage {stage.name} needs it; put it back"
            written = source.name if stage.teacher_step is None else f"{source.name}/{step}"
            raise RequestError(f"{key}={written}: {problem}")
    elif (reference := stage.recipe.teacher_from) is not None:
        with _named(key, reference):
            try:
                weights = find_weights(reference, Path(stage.recipe.storage))
            except RequestError as error:
                remedy = "the run goes on with the teacher that it began with, so put it back"
                raise RequestError(*(f"{mistake}; {remedy}" for mistake in error.mistakes)) from None
            if stage.first_step < newest.step:
                _require_same(weights, newest)


def _require_same(weights: Weights, newest: Published) -> None:
    """Refuse other weights than those that a training state has been learning from."""
    try:
        began_with = parse_json(newest.storage.read(f"{newest.name}/{TRAINING_STATE}/{REFERENCES}"))
    except FileNotFoundError:  # it has none, or has them in itself
        return
    found = {weights.sha256, *([weights.heads.sha256] if weights.heads else [])}
    for place, digest in {(source["location"], source["sha256"]) for source in began_with.values()}:
        if digest not in found and not (Path(place).is_file() and sha256(Path(place)) == digest):
            problem = f"not what the run began with, {place} with SHA-256 {digest[:12]}.."
            raise RequestError(f"{problem}; put that file back, or begin a new run")


def _pinned(reference: str, storage: Path) -> str:
    """A reference that means tomorrow what `reference` means now, also after the storage was moved."""
    if reference.startswith(TIMM) or reference.endswith(".safetensors"):
        return reference
    found = references.locate(reference, storage)
    return references.registered_version(reference, storage) if found is None else _lasting(found, storage)


def _lasting(found: Published, storage: Path) -> str:
    """How a recipe names a published checkpoint: one of a run in `storage` by the run, others by their place."""
    run = RunDir(Path(found.location).parents[1]) if found.storage.directory(found.name) else None
    in_storage = run is not None and run.is_run and run.path.parent.absolute() == storage.absolute()
    return f"runs:/{run.run_id}/{found.step}" if run is not None and in_storage else found.location


def _check_state(found: Published, recipe: Recipe) -> None:
    manifest, train = found.manifest(), recipe.train
    wrong = [
        f"{found.location} was taken with {key}={manifest[name]}, the recipe has {value}{remedy}"
        for key, name, value, remedy in (
            ("objective.name", "objective", recipe.objective.name, ""),
            ("train.zero_stage", "zero_stage", train.zero_stage, f"; add train.zero_stage={manifest['zero_stage']}"),
        )
        if manifest[name] != value
    ]
    if manifest.get("first_step", 0):
        wrong.append(
            f"{found.location} is of stage {manifest['stage']!r}, which began at step {manifest['first_step']} of its "
            "run; a new run can take its weights alone, by init_from"
        )
    elif found.step >= train.steps:
        wrong.append(f"{found.location} is at step {found.step}; train.steps={train.steps} leaves nothing to do")
    is_cut_anew = manifest["world_size"] != train.workers and bool(train.zero_stage)
    shards = 3 if manifest["format"] == 1 else train.zero_stage or 0  # of format 1 all are DeepSpeed's
    if is_cut_anew and not is_reshardable(recipe.optimizer.name, shards):
        wrong.append(f"the shards of {recipe.optimizer.name} fit train.workers={manifest['world_size']} only")
    if wrong:
        raise RequestError(*wrong)
    _check_architecture(manifest["backbone"], recipe)


def _check_architecture(found: Mapping[str, Any], recipe: Recipe) -> None:
    """Refuse another kind or family of backbone by its name; which tensors fit is known when the model is built."""
    wanted = recipe.backbone
    if "name" not in found:
        return
    families = [_SIZES.sub("", name.partition(".")[0]) for name in (found["name"], wanted.name)]
    if (found.get("kind", IMAGE), families[0]) != (wanted.kind, families[1]):
        raise RequestError(
            f"holds a backbone {found['name']} of kind {found.get('kind', IMAGE)}, "
            f"the recipe has backbone.name={wanted.name} of kind {wanted.kind}"
        )


def _check_teacher(found: Weights, recipe: Recipe) -> None:
    """Refuse a teacher by what its checkpoint says of itself; tensors are compared when the model is outlined."""
    use = recipe.objective.teacher_use() if isinstance(recipe.objective, FrozenTeacherConfig) else None
    if use is None:
        return
    if use.needs_heads and found.heads is None:
        raise RequestError(NO_HEADS)
    heads = None if found.heads is None else found.heads.spec
    if wrong := list(recipe.objective.teacher_misfits(patch_size_of(recipe), found.spec, heads)):
        raise RequestError(*wrong)


@contextmanager
def _named(key: str, reference: str) -> Iterator[None]:
    """Mistakes about a reference begin with the key that gave it."""
    try:
        yield
    except RequestError as error:
        raise RequestError(*(about(key, reference, mistake) for mistake in error.mistakes)) from None
    except (CheckpointError, RunFailed) as error:
        raise RequestError(about(key, reference, str(error))) from None


def about(key: str, reference: str, problem: str) -> str:
    """A mistake with the key that gave the reference in front, and the reference once."""
    for named in (f"{reference}: ", f"{reference!r}: ", f"checkpoint {reference}: "):
        problem = problem.removeprefix(named)
    return f"{key}={reference}: {problem}"


def _existing(file: Path, reference: str) -> Path:
    """A file of weights that is there; of safetensors one whose header says so."""
    if not file.is_file():
        raise RequestError(f"{reference}: no such file")
    if file.suffix not in (known := (".safetensors", *STATE_DICT_SUFFIXES)):
        raise RequestError(f"{reference}: expected a file of weights, whose name ends in one of {', '.join(known)}")
    if file.suffix not in STATE_DICT_SUFFIXES:
        try:
            read_shapes(file)
        except BackboneError as error:
            raise CheckpointError(f"{reference}: {str(error).removeprefix(f'{file}: ')}") from error
    return file


def _spec_in(file: Path) -> Mapping[str, Any]:
    """The model that a backbone file of ours says it holds; nothing for files of other tools."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = parse_json(opened.read(min(length, file.stat().st_size)))
            return dict(parse_json(header["__metadata__"]["pretrain.backbone"]))
        except (ValueError, KeyError, TypeError):
            return {}


def _cached_timm_file(name: str, reference: str) -> Path:
    """Pretrained weights of a timm model in the local Hugging Face cache or that of torch.hub.

    Raises:
        RequestError: timm knows no such model, or its weights are not here.
    """
    import timm
    import torch
    from huggingface_hub import try_to_load_from_cache

    try:
        facts = timm.models.get_pretrained_cfg(name)
    except RuntimeError:
        facts = None
    if facts is None or not timm.is_model(name.partition(".")[0]):
        known = timm.list_models()
        raise RequestError(f"{reference}: timm has no model {name!r}{nearest(name.partition('.')[0], known)}")
    if facts.hf_hub_id:
        for file in _HUB_FILES:
            cached = try_to_load_from_cache(facts.hf_hub_id, file)
            if isinstance(cached, str):
                return Path(cached)
    if facts.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / facts.url.rpartition("/")[2]
        if path.is_file() and path.suffix == ".safetensors":
            return path
    where = f"huggingface-cli download {facts.hf_hub_id}" if facts.hf_hub_id else f"{facts.url or 'no weights exist'}"
    raise RequestError(
        f"{reference}: its weights are not in the local cache, and nothing is downloaded here ({where}); "
        f"or give a file: {TIMM}{name}@FILE"
    )
