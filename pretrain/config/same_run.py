"""Whether a request is that of a run which has begun, so that it can go on, and what of it is to change.

A scheduler gives the same command again after a node was lost or a time limit was met. The run then goes on; but only
if what is asked for is what it learns: another recipe under the name of a run is refused. Not here: reading the recipe
of a run (`pretrain.config.load.load_for_resume`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from data_pipelines.storage.locations import redacted
from pretrain.config.load import may_change
from pretrain.config.mistakes import shown
from pretrain.config.stages import Plan
from pretrain.errors import RequestError

__all__ = ["changes"]

_WHERE = "storage"  # a run may have moved
_PINNED = ("init_from", "teacher_from", "resume_from")  # when the run began, to what they meant then
_DIVISION = ("train.micro_batch_size", "train.accumulation")  # of stages with several workers, left to the resume
_ABSENT = object()


def changes(recorded: Plan, wanted: Plan, run_id: str) -> list[str]:
    """What `pretrain resume` is to be told so that a run goes on as a request wants it: `key=value` texts.

    Args:
        recorded: As the run has it.
        wanted: As requested; both resolved.
        run_id: Name of the run.

    Raises:
        RequestError: They differ in what is learned; one line per setting.
    """
    names = [[stage.name for stage in plan.stages] for plan in (recorded, wanted)]
    if names[0] != names[1]:
        said = [", ".join(filter(None, of_plan)) or "none" for of_plan in names]
        raise RequestError(f"run {run_id}: has the stages {said[0]}, the recipe {said[1]}; give another --run-id")
    is_staged = len(wanted.stages) > 1
    found: dict[str, list[Any]] = {}
    mistakes: list[str] = []
    for index, (old, new) in enumerate(zip(recorded.stages, wanted.stages, strict=True)):
        before, after = _settings(old.recipe), _settings(new.recipe)
        for key in before.keys() | after.keys():
            was, wants = before.get(key, _ABSENT), after.get(key, _ABSENT)
            if was == wants or (key in _PINNED and None not in (was, wants)):
                continue
            if may_change(key, is_staged=is_staged) and wants is not _ABSENT:
                found.setdefault(key, []).append(wants)
            else:
                of_stage = f"stages[{index}]." if is_staged else ""
                here, there = ("not set" if value is _ABSENT else shown(value) for value in (was, wants))
                mistakes.append(f"{of_stage}{key}={there}: run {run_id} has {here}, fixed when it began")
    for key, values in found.items():
        if key not in _DIVISION and (len({json.dumps(v) for v in values}) > 1 or len(values) < len(wanted.stages)):
            mistakes.append(f"{key}: differs between run {run_id} and the recipe in some stages only")
    if mistakes:
        raise RequestError(*sorted(mistakes), f"run {run_id} was begun with another recipe; give another --run-id")
    told = {key: values[0] for key, values in found.items() if not (is_staged and key in _DIVISION)}
    return [f"{key}={_typed(value)}" for key, value in sorted(told.items())]


def _settings(recipe: Any) -> dict[str, Any]:
    """All settings of a resolved recipe by their keys, as they are stored; lists of values are one value."""
    content = redacted(OmegaConf.to_container(OmegaConf.structured(recipe)))
    return {key: value for key, value in _flat(content, "") if key != _WHERE}


def _flat(content: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{key}.")
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for index, part in enumerate(value):
                yield from _flat(part, f"{key}[{index}].")
        else:
            yield key, value


def _typed(value: Any) -> str:
    """A value as it is typed on the command line."""
    return value if isinstance(value, str) else json.dumps(value)
