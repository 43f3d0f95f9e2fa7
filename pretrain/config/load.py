"""From a recipe name and `key=value` overrides to a checked `Recipe`.

Layers, later ones win: the defaults in `pretrain.config.schema`, one YAML file, the command line. They are merged in
`pretrain.config.layers`, the stages of a recipe are read in `pretrain.config.stage_list`, and what settings mean
together is checked in `pretrain.config.checks`. Nothing here imports torch or numpy: a wrong request is refused in a
fraction of a second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipelines.storage.locations import redact
from pretrain.config.layers import resolved
from pretrain.config.mistakes import COMMAND_LINE, Mistakes, shown
from pretrain.config.optimizer_facts import RESHARDABLE, is_reshardable
from pretrain.config.recipe_files import read_yaml, recipe_content, recipe_names, recipe_path
from pretrain.config.schema import (
    REQUIRED,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    EvaluationTask,
    OptimizerConfig,
    Recipe,
    TrackingConfig,
    TrainConfig,
)
from pretrain.config.stage_list import (
    given,
    is_about_stages,
    moments_that_do_not_fit,
    read_stages,
    said_once,
    teachers_without_checkpoint,
)
from pretrain.config.stages import Plan, in_order, settings_of, stage_and_step
from pretrain.config.teachers import check_teacher
from pretrain.config.values import Typed, typed
from pretrain.errors import RequestError, nearest
from pretrain.remote.places import is_uri, uri_of

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationTask",
    "OptimizerConfig",
    "Recipe",
    "TrackingConfig",
    "TrainConfig",
    "data_root",
    "in_storage",
    "load_for_resume",
    "load_plan",
    "load_recipe",
    "may_change",
    "recipe_content",
    "recipe_names",
    "recipe_path",
    "replaced_objective",
    "to_yaml",
]

_NONE = object()
_LENGTH = ("train.steps", "train.epochs")  # fixed in a run of stages
# What a resume may change: how and where the work is done, and for how long; never what is learned.
_RESUMABLE = (
    *_LENGTH,
    "train.workers",
    "train.min_workers",
    "train.micro_batch_size",
    "train.accumulation",
    "train.checkpoint_blocks",
    "train.max_failures",
    "train.hang_after_s",
    "train.collective_timeout_s",
    "train.keep_last",
    "train.keep_best",
    "data.train",
    "data.mixture[N].shards",
    "data.loader_workers",
    "data.prefetch_batches",
    "data.max_corrupt_fraction",
    "data.cache_dir",
    "data.cache_gb",
    "data.fetch",
    "tracking.also",
    "checkpoints.asynchronous",
    "cluster.address",
    "cluster.cpus_per_worker",
    "cluster.gpus_per_worker",
    "evaluation.data.NAME",
)
_RESUMABLE_KEYS = re.compile(
    "|".join(re.escape(key).replace("N\\]", r"\d+\]").replace("NAME", r"[^.]+") for key in _RESUMABLE)
)


def data_root(name_or_path: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """`data.root` as it is written in a request, if the shards to train on are given by it.

    Raises:
        RequestError: there is no such recipe or file.
    """
    data = read_yaml(recipe_path(name_or_path)).get("data")
    given = {key.strip(): value for key, _, value in (text.partition("=") for text in overrides)}
    if not isinstance(data, Mapping) or "${data.root}" not in str(data) or given.keys() & {"data.train", "data"}:
        return None
    root = given.get("data.root", data.get("root"))
    return root if isinstance(root, str) and root not in ("", "null", REQUIRED) and "${" not in root else None


def in_storage(path: str, recorded: str, storage: str) -> str:
    """Where data lie now that a run has recorded: those in its storage have moved with it, if they are there."""
    if not path.startswith(f"{recorded}/") or recorded == storage:
        return path
    inside = path.removeprefix(f"{recorded}/")
    is_there = os.path.isdir(os.path.join(storage, os.path.dirname(inside) if "*" in inside else inside))
    return os.path.join(storage, inside) if is_there else path


def replaced_objective(name_or_path: str | Path, overrides: Sequence[str] = ()) -> str | None:
    """What to know when `objective.name=` on the command line replaces a recipe's own; None when it does not.

    Args:
        name_or_path, overrides: of a request that `load_plan` has accepted.
    """
    path = recipe_path(name_or_path)
    written = _objective_of(read_yaml(path))
    named = [text.partition("=")[2] for text in overrides if text.partition("=")[0].strip() == "objective.name"]
    if not named or named[-1] == written:
        return None
    made_for = [name for name in recipe_names() if _objective_of(read_yaml(recipe_path(name))) == named[-1]]
    better = f"; recipes made for {named[-1]}: {', '.join(made_for)}" if made_for else ""
    return (
        f"objective.name={named[-1]}: its settings are its defaults; all others stay those of {path.stem}, made for "
        f"{written}, among them the learning rate, weight decay and batch size{better}"
    )


def _objective_of(content: Mapping[str, Any]) -> str | None:
    objective = content.get("objective")
    return objective.get("name") if isinstance(objective, Mapping) else None


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Recipe:
    """Read, merge, check and resolve a recipe; of one with stages, its last one.

    Args:
        name_or_path: a recipe of the package, or a YAML file.
        overrides: `key=value` texts; a value is YAML, e.g. `train.steps=200`, `evaluation.tasks=[]`.
        check_files: False reads a recipe whose data need not be on this machine, e.g. that of a fetched checkpoint.

    Returns:
        The resolved recipe: absolute paths, batch arithmetic filled in.

    Raises:
        RequestError: with one line per mistake, all of them.
    """
    return load_plan(name_or_path, overrides, check_files=check_files).recipe


def load_plan(name_or_path: str | Path, overrides: Sequence[str] = (), *, check_files: bool = True) -> Plan:
    """All stages of a recipe, each resolved as by `load_recipe`; one without `stages:` is a plan of one stage.

    Args and errors are those of `load_recipe`. `stages[0].train.steps=5` among the overrides changes one stage.
    """
    path = recipe_path(name_or_path)
    return _plan(path, read_yaml(path), overrides, f"pretrain run {name_or_path}", check_files=check_files)


def _plan(path: Path, content: dict[str, Any], overrides: Sequence[str], how_to_set: str, *, check_files: bool) -> Plan:
    origin = f"recipe {path.name}"
    mistakes = Mistakes()
    pairs = list(_parse_overrides(overrides, mistakes))
    content = {"name": path.stem, **content}
    stages = read_stages(content.pop("stages", None) or [], pairs, origin, mistakes)
    common = [(key, value) for key, value in pairs if not is_about_stages(key)]
    if not stages:
        recipe = resolved([(content, origin)], common, mistakes, how_to_set, check_files=check_files)
        if check_files:
            check_teacher(recipe, mistakes, recipe.teacher_from)
        mistakes.raise_if_any()
        return Plan.single(recipe)
    of_list = mistakes.lines
    named: list[tuple[str, Recipe, Mapping[str, Any]]] = []
    lines: list[list[str]] = []
    for index, stage in enumerate(stages):
        mistakes = Mistakes()
        for key in ("init_from", "teacher_from"):
            source, names = stage.keys.get(key), [name for name, _, _ in named]
            is_stage = source in names
            if key == "teacher_from" and isinstance(source, str):
                is_stage = stage_and_step(source, names)[0] is not None
            if source is not None and not is_stage:
                stage.pairs.append((key, source))  # a reference, of which the recipe takes care
        layers = [(content, origin), (stage.settings, f"{origin}, stage {stage.name}")]
        recipe = resolved(layers, [*common, *stage.pairs], mistakes, how_to_set, check_files=check_files)
        if check_files:
            own, key = stage.keys.get("teacher_from"), f"stages[{index}].teacher_from"
            said_by = COMMAND_LINE if key in dict(pairs) else origin
            check_teacher(recipe, mistakes, own or recipe.teacher_from, key=key if own else None, said_by=said_by)
        if "train.seed" not in given(stage):
            seed = recipe.train.seed + index  # or every stage would see the samples in the same order
            recipe = replace(recipe, train=replace(recipe.train, seed=seed))
        if index:  # where the run begins is a matter of the first stage
            init_from = recipe.init_from if "init_from" in dict(stage.pairs) else None
            recipe = replace(recipe, resume_from=None, init_from=init_from)
        named.append((stage.name, recipe, stage.keys))
        lines.append(mistakes.lines)
    if of_list or any(lines):
        raise RequestError(*of_list, *said_once(lines, [stage.name for stage in stages]))
    plan = in_order(named)
    if problems := [*moments_that_do_not_fit(plan), *teachers_without_checkpoint(plan)]:
        raise RequestError(*problems)
    return plan


def load_for_resume(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan of a run that goes on, with what may change about it changed.

    With another number of workers the global batch stays; unless the overrides say how it is divided, the micro-batch
    stays too where that works out, else one micro-batch per worker is taken. The storage is the directory or the store
    that the run lies in now, wherever it was when the run began.

    Args:
        path: The recipe in the directory of the run.
        overrides: `key=value` texts.

    Raises:
        RequestError: a setting may not change any more, or the result does not work out.
    """
    content = read_yaml(path)
    if "storage" not in content:  # what a run writes last
        copy = "the newest checkpoint of the run has a copy of its settings"
        raise RequestError(f"recipe {path}: cut short, for the end is missing; restore it, {copy}")
    may_change = [key for key in _RESUMABLE if key not in _LENGTH or not content.get("stages")]
    pairs = dict(text.partition("=")[::2] for text in overrides)
    forbidden = [key for key in pairs if not _RESUMABLE_KEYS.fullmatch(key)]
    if forbidden:
        mistakes = [f"{shown(key)}={shown(pairs[key])}: {_why_fixed(key, content, may_change)}" for key in forbidden]
        sections: dict[str, list[str]] = {}
        for key in may_change:
            section, _, name = key.partition(".")
            sections.setdefault(section, []).append(name)
        allowed = "; ".join(f"{section}: {', '.join(names)}" for section, names in sections.items())
        raise RequestError(*mistakes, f"a resume may change {allowed}")
    changes_steps = bool(pairs.keys() & set(_LENGTH))
    if changes_steps and content.get("stages"):
        said = ", ".join(f"{key}={shown(pairs[key])}" for key in _LENGTH if key in pairs)
        raise RequestError(f"{said}: fixed in a run of stages; a new run can begin with its weights (init_from)")
    open_keys = {"train.micro_batch_size", "train.accumulation"} - set(pairs)
    derived = [f"{key}=null" for key in open_keys] if len(open_keys) == 1 else []
    if "train.workers" in pairs and _is_written_by_a_run(content):
        workers, are_whole = pairs["train.workers"], True
        for stage in content.get("stages") or [{}]:
            keys = ("optimizer.name", "train.zero_stage", "train.micro_batch_size", "train.global_batch_size")
            optimizer, zero_stage, micro, total = (_written(content, stage, path, key) for key in keys)
            if not is_reshardable(optimizer, zero_stage):
                known = f"DeepSpeed can cut anew only the state of {', '.join(RESHARDABLE)}"
                raise RequestError(f"train.workers={workers}: the run uses {optimizer} in ZeRO stage 3, and {known}")
            most = re.fullmatch(r"\d+|\[\s*\d+\s*,\s*\d+\s*\]", workers.strip())  # or [FEWEST, MOST]
            share = (int(re.findall(r"\d+", workers)[-1]) if most else 0) * (micro if isinstance(micro, int) else 0)
            are_whole = are_whole and share > 0 and isinstance(total, int) and total % share == 0
        if len(open_keys) == 2:
            derived = ["train.accumulation=null", *([] if are_whole else ["train.micro_batch_size=null"])]
    recorded, storage = str(content["storage"]), path.absolute().parents[1]
    content["storage"] = str(storage)
    if is_uri(recorded) and (uri := uri_of(storage)) != recorded:
        if uri is None:
            run_id, place = path.parent.name, redact(recorded)
            remedy = f"go on with it there: pretrain resume {run_id} --storage {place}"
            raise RequestError(f"run {run_id}: {storage} has a copy of what is kept in {place}; {remedy}")
        checkpoints = content.get("checkpoints")
        if isinstance(checkpoints, dict) and checkpoints.get("storage") == recorded:
            checkpoints["storage"] = uri  # they were copied, or renamed, with the rest of the storage
    for section in {"data", "evaluation", "stages"} & content.keys():
        content[section] = _following(content[section], recorded, content["storage"])
    return _plan(path, content, (*derived, *overrides), f"pretrain resume {path.parent.name}", check_files=True)


def may_change(key: str, *, is_staged: bool) -> bool:
    """Whether a resume takes the setting."""
    return bool(_RESUMABLE_KEYS.fullmatch(key)) and not (is_staged and key in _LENGTH)


def _why_fixed(key: str, content: Mapping[str, Any], may_change: Sequence[str]) -> str:
    """Why a resume does not take a key: the run has it as it is, or there is none such."""
    found: Any = content
    for name in key.split("."):
        found = found.get(name, _NONE) if isinstance(found, Mapping) else _NONE
    return f"unknown setting{nearest(key, may_change)}" if found is _NONE else "fixed when the run began"


def _following(settings: Any, recorded: str, storage: str) -> Any:
    """Settings with all paths in them as `in_storage` finds them."""
    if isinstance(settings, dict):
        return {key: _following(value, recorded, storage) for key, value in settings.items()}
    if isinstance(settings, list):
        return [_following(value, recorded, storage) for value in settings]
    return in_storage(settings, recorded, storage) if isinstance(settings, str) else settings


def _is_written_by_a_run(content: Mapping[str, Any]) -> bool:
    """Whether stages have the shape that a run gives them; else checking the whole plan says what is wrong."""
    stages = content.get("stages") or []
    return isinstance(stages, list) and all(isinstance(stage, Mapping) for stage in stages)


def _written(content: Mapping[str, Any], stage: Mapping[str, Any], path: Path, key: str) -> Any:
    """A setting of one stage of a recipe that a run has written, which holds all of them."""
    section, _, name = key.partition(".")
    for layer in (stage, content):
        if isinstance(below := layer.get(section), Mapping) and name in below:
            return below[name]
    raise RequestError(f"recipe {path}: {key} is missing; the recipe of a run holds every setting")


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML that `load_recipe` reads back to an equal recipe, but for credentials in URLs."""
    return OmegaConf.to_yaml(OmegaConf.create(settings_of(recipe)))


def _parse_overrides(overrides: Sequence[str], mistakes: Mistakes) -> Iterator[tuple[str, Typed]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            mistakes.add_stray(text, "expected key=value, e.g. train.steps=200")
            continue
        yield key.strip(), typed(value)
