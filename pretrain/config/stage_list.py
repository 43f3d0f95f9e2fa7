"""The list `stages:` as a recipe and the command line write it: read, and refused where it cannot be followed.

What the keys mean is told in `pretrain.config.stages`; that each stage's settings are right is checked with the layers
below them, in `pretrain.config.layers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from data_pipelines.files import expanded
from pretrain.config.mistakes import COMMAND_LINE, Mistakes, shown
from pretrain.config.stages import FIXED, INIT_WITH, STAGE_KEYS, Plan
from pretrain.config.values import Typed
from pretrain.errors import nearest

__all__ = [
    "WrittenStage",
    "backbones_unlike",
    "given",
    "is_about_stages",
    "moments_that_do_not_fit",
    "read_stages",
    "said_once",
    "teachers_without_checkpoint",
]


class WrittenStage(NamedTuple):
    """A stage as a recipe and the command line state it."""

    name: str
    keys: dict[str, Any]  # of STAGE_KEYS, without the name
    settings: dict[str, Any]
    pairs: list[tuple[str, Typed | str]]  # settings of this stage from the command line


def is_about_stages(key: str) -> bool:
    return key == "stages" or key.startswith(("stages[", "stages."))


def read_stages(
    written: Any, pairs: Sequence[tuple[str, Typed]], origin: str, mistakes: Mistakes
) -> list[WrittenStage]:
    """The stages of a recipe, with what the command line says of the list and of single stages."""
    for key, value in pairs:
        if key == "stages":
            written, origin = value.value, COMMAND_LINE
            if value.problem is not None:
                mistakes.add("stages", value, value.problem, origin=origin)
                return []
    if not isinstance(written, list) or not all(isinstance(stage, Mapping) for stage in written):
        mistakes.add("stages", written, "expected a list of mappings, one of overrides per stage", origin=origin)
        return []
    settings = [{str(key): value for key, value in stage.items()} for stage in written]
    given: list[list[tuple[str, Typed | str]]] = [[] for _ in settings]
    for key, value in pairs:
        match = re.fullmatch(r"stages\[(\d{1,9})\]\.(.+)", key, re.DOTALL)
        if match and int(match[1]) >= len(settings):
            mistakes.add(key, value, f"stages has {len(settings)} items, counted from 0", origin=COMMAND_LINE)
        elif match and match[2] in STAGE_KEYS:
            settings[int(match[1])][match[2]] = value.value if match[2] == "reset_optimizer" else value.as_text
        elif match:
            given[int(match[1])].append((match[2], value))
        elif key != "stages" and is_about_stages(key):
            problem = "name one stage and a setting, e.g. stages[0].train.steps=200"
            mistakes.add(key, value, problem, origin=COMMAND_LINE)
    stages = []
    for index, (own, pairs_of_it) in enumerate(zip(settings, given, strict=True)):
        keys = {key: own.pop(key) for key in STAGE_KEYS if key in own}
        stages.append(WrittenStage(str(keys.pop("name", index)), keys, own, pairs_of_it))
    for index, stage in enumerate(stages):
        names = [other.name for other in stages]
        of_this = {key.partition("].")[2] for key, _ in pairs if key.startswith(f"stages[{index}].")}
        _check_stage(index, stage, names[:index], names[index:], origin, of_this, mistakes)
    return stages


def _check_stage(
    index: int,
    stage: WrittenStage,
    earlier: list[str],
    later: list[str],
    origin: str,
    typed_keys: set[str],
    mistakes: Mistakes,
) -> None:
    """What a stage may say, and what only the list as a whole can tell."""
    where = f"stages[{index}]"

    def wrong(key: str, value: Any, problem: str) -> None:
        said_by = COMMAND_LINE if key in typed_keys else origin
        mistakes.add(f"{where}.{key}", value, problem, origin=said_by)

    if stage.name in earlier:
        wrong("name", stage.name, "named twice; give each stage its own name")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage.name):
        wrong("name", stage.name, "expected letters, digits, '_' and '-' only")
    if problem := _teacher_problem(stage, earlier, later):
        wrong("teacher_from", stage.keys["teacher_from"], problem)
    reset = stage.keys.get("reset_optimizer", True)
    if not isinstance(reset, bool):
        wrong("reset_optimizer", reset, "expected true or false")
    elif not reset and not index:
        problem = "the first stage has no moments to carry over; leave it out"
        wrong("reset_optimizer", reset, problem)
    source = stage.keys.get("init_from")
    if source is not None and not (isinstance(source, str) and source):
        wrong("init_from", source, "expected an earlier stage, or a reference as docs/stages.md lists them")
    elif source in later:
        wrong("init_from", source, "that stage comes later; expected an earlier one")
    elif source and source not in earlier and not Path(source).exists() and (hint := nearest(source, earlier)):
        wrong("init_from", source, f"no earlier stage has that name{hint}")
    if reset is False and source not in (None, *earlier[-1:]):
        problem = "moments are carried over from the stage before only; leave init_from out, or reset the optimizer"
        wrong("init_from", source, problem)
    how = stage.keys.get("init_with", "student")
    if how not in INIT_WITH:
        wrong("init_with", how, "expected student or teacher")
    elif how == "teacher" and not (index and source in (None, *earlier[-1:])):
        wrong("init_with", how, "the stage before is the one whose teacher is at hand; leave init_from and this out")
    for key in given(stage):
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            said_by = COMMAND_LINE if key in typed_keys else origin
            mistakes.add_stray(f"{where}.{key}", "is one for all stages; set it outside stages", origin=said_by)


def _teacher_problem(stage: WrittenStage, earlier: list[str], later: list[str]) -> str | None:
    """What is wrong with `teacher_from` of a stage, as far as names tell; None: nothing, or it is a reference."""
    source = stage.keys.get("teacher_from")
    forms = "expected an earlier stage, STAGE/STEP, or a reference as docs/stages.md lists them"
    if source is None:
        return None
    if not (isinstance(source, str) and source):
        return forms
    name, slash, step = source.partition("/")
    if name in earlier:
        return None if not slash or step.isdecimal() else f"{step!r} is no step of stage {name}; expected {name}/STEP"
    if name == stage.name:
        return "that is this stage itself, which has nothing to give when it begins; expected an earlier one"
    if name in later:
        return "that stage comes later; expected an earlier one"
    is_word = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*(/[0-9]+)?", source) is not None and not expanded(source).exists()
    if is_word and (slash or (earlier and nearest(name, earlier))):
        known = f"; earlier stages are {', '.join(earlier)}" if earlier else ""
        hint = nearest(name, earlier) or known
        return f"no earlier stage {name!r}{hint}; {forms}, such as timm:NAME@FILE"
    return None


def given(stage: WrittenStage) -> list[str]:
    """The settings that a stage states, in the recipe and on the command line."""
    values = ((key, value.value if isinstance(value, Typed) else value) for key, value in stage.pairs)
    of_pairs = (_dotted(key, value) if isinstance(value, Mapping) else [key] for key, value in values)
    return [*_dotted("", stage.settings), *chain.from_iterable(of_pairs)]


def _dotted(prefix: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """`{train: {steps: 5}}` -> `train.steps`."""
    for key, value in settings.items():
        name = f"{prefix}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            yield from _dotted(name, value)
        else:
            yield name


def said_once(lines: Sequence[Sequence[str]], names: Sequence[str]) -> Iterator[str]:
    """The mistakes of all stages: what they share is said once, the rest with the name of its stage."""
    shared = {line for line in lines[0] if all(line in others for others in lines)}
    yield from (line for line in lines[0] if line in shared)
    for index, (own, name) in enumerate(zip(lines, names, strict=True)):
        for line in own:
            if line not in shared:
                says_it = f", stage {name}:" in line or f": stages[{index}]." in line
                yield line if says_it else f"stage {name}: {line}"


def moments_that_do_not_fit(plan: Plan) -> Iterator[str]:
    """Stages that keep the optimizer of the one before, and what they change that its moments depend on."""
    for index, stage in enumerate(plan.stages):
        if stage.reset_optimizer:
            continue
        before = plan.stages[index - 1].recipe
        facts = {
            "optimizer": ("name", "betas", "eps", "layer_decay"),
            "train": ("zero_stage", "precision"),
            "backbone": tuple(vars(stage.recipe.backbone)),
        }
        for section, names in facts.items():
            for name in names:
                now, was = (getattr(getattr(recipe, section), name, None) for recipe in (stage.recipe, before))
                if now != was:
                    yield (
                        f"stages[{index}].{section}.{name}={shown(now)}: was {shown(was)} in the stage before, whose "
                        "optimizer this one keeps; leave it, or set reset_optimizer: true"
                    )


def backbones_unlike(plan: Plan, index: int, source: int) -> str:
    """In what the backbone of a stage differs from that of an earlier one: `backbone.options.depth=2, in a 4`."""
    own, other = (_flat("backbone", vars(plan.stages[each].recipe.backbone)) for each in (index, source))
    name = plan.stages[source].name
    return ", ".join(
        f"{key}={shown(own.get(key))}, in {name} {shown(other.get(key))}"
        for key in {**own, **other}
        if own.get(key) != other.get(key)
    )


def _flat(prefix: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        found |= _flat(f"{prefix}.{key}", value) if isinstance(value, Mapping) else {f"{prefix}.{key}": value}
    return found


def teachers_without_checkpoint(plan: Plan) -> Iterator[str]:
    """Stages whose frozen teacher is of a step that no checkpoint is made of."""
    for index, stage in enumerate(plan.stages):
        if stage.teacher_from is None or stage.teacher_step is None:
            continue
        source = plan.stages[stage.teacher_from]
        every, step = source.recipe.train.checkpoint_every, stage.teacher_step - source.first_step
        if step != source.recipe.train.steps and not (0 < step < source.recipe.train.steps and step % every == 0):
            first, last = source.first_step, source.last_step
            steps = listed_steps([*range(first + every, last, every), last])
            yield (
                f"stages[{index}].teacher_from={source.name}/{stage.teacher_step}: no checkpoint of that step; stage "
                f"{source.name} has {steps}"
            )


def listed_steps(steps: Sequence[int]) -> str:
    """Steps that a checkpoint is made of, ascending: `that of step 20`, `those of steps 20, 40, 60, .. 200`."""
    if len(steps) == 1:
        return f"that of step {steps[0]}"
    shown_steps = steps if len(steps) <= 4 else steps[:3]
    rest = "" if len(steps) <= 4 else f", .. {steps[-1]}"
    return f"those of steps {', '.join(map(str, shown_steps))}{rest}"
