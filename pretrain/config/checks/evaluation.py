"""Evaluation: are its data there, do its tasks fit the backbone, is there a score to select by?

Not here: which tasks a suite becomes (`pretrain.config.suites`).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from backbones.images.config import ImageConfig
from data_pipelines.errors import DataError
from data_pipelines.shards.source import check_source
from data_pipelines.split_names import held_out
from evaluation import registry as evaluations
from evaluation.extraction.recipe import EXTRACTIONS
from pretrain.config.checks.model import check_divisible, sizes
from pretrain.config.mistakes import Mistakes
from pretrain.config.schema import EvaluationConfig, EvaluationTask
from pretrain.errors import nearest, nearest_file

__all__ = ["check_evaluation_data", "check_evaluation_tasks", "check_select", "evaluation_data_problem"]


def evaluation_data_problem(directory: str | Path) -> str | None:
    """What is wrong with a directory of evaluation data; None when it holds both splits."""
    folder = Path(directory)
    if not folder.is_dir():
        return f"no such directory{nearest_file(folder)}"
    patterns = ("train-*.tar", f"{held_out(folder)}-*.tar")
    absent = [pattern for pattern in patterns if not any(folder.glob(pattern))]
    if absent:
        wanted = "evaluation data has shards train-*.tar and test-*.tar (or val-*.tar)"
        pack = f"pretrain data pack {folder} DEST --split train=0.9,test=0.1"
        remedy = "" if any(folder.glob("*.tar")) else f"; photos become such by: {pack}"
        return f"no {' and no '.join(absent)} in it; {wanted}{remedy}"
    try:
        check_source([folder / pattern for pattern in patterns])
    except DataError as error:
        return str(error)
    return None


def check_evaluation_data(evaluation: EvaluationConfig, mistakes: Mistakes) -> None:
    for name, directory in evaluation.data.items():
        key = f"evaluation.data.{name}"
        if mistakes.sound(key) and (problem := evaluation_data_problem(directory)):
            mistakes.add(key, directory, problem)


def check_evaluation_tasks(evaluation: EvaluationConfig, backbone: Any, mistakes: Mistakes) -> None:
    patch_size = sizes(backbone)[1] if isinstance(backbone, ImageConfig) else None
    protocols = evaluations.names()
    for index, task in enumerate(evaluation.tasks):
        key = f"evaluation.tasks[{index}]"
        if not task.protocol and task.suite is None and mistakes.sound(key):
            mistakes.add(key, {"data": task.data}, "names neither a protocol nor a suite; add one of them")
        if task.protocol:
            _check_known(f"{key}.protocol", task.protocol, "protocol", protocols, mistakes)
        if task.protocol and mistakes.sound(f"{key}.protocol", "backbone.kind"):
            _check_fits(key, task, backbone.kind, mistakes)
        if task.every is not None and task.at is not None:
            mistakes.add(f"{key}.every", task.every, f"beside at={task.at}; give one of them")
        if mistakes.sound("evaluation.data"):
            _check_known(f"{key}.data", task.data, "entry of evaluation.data", evaluation.data, mistakes)
        _check_size(key, task, patch_size, mistakes)


def check_select(evaluation: EvaluationConfig, mistakes: Mistakes) -> None:
    """Is there the score that the best checkpoint is chosen by? Suites have become their protocols."""
    if evaluation.select is not None and not evaluation.tasks and mistakes.sound("evaluation"):
        key = mistakes.latest("evaluation.select", "evaluation.tasks")
        value = evaluation.select if key == "evaluation.select" else []
        mistakes.add(key, value, "no task has a score to select by; add evaluation.select=null")
    elif evaluation.select is not None and mistakes.sound("evaluation.select", "evaluation.tasks"):
        scores = {
            f"{task.protocol}/{task.data}/{metric.name}": metric
            for task in evaluation.tasks
            for metric in evaluations.protocol(task.protocol).metrics
        }
        choices = [name for name, metric in scores.items() if metric.better is not None]
        at_last = {f"{task.protocol}/{task.data}" for task in evaluation.tasks if task.at == "last"}
        if evaluation.select.rpartition("/")[0] in at_last:
            problem = "only the last checkpoint has this score (at: last), so none can be best by it"
            others = [name for name in choices if name.rpartition("/")[0] not in at_last]
            remedy = f"those of every checkpoint: {', '.join(others)}" if others else "add evaluation.select=null"
            mistakes.add("evaluation.select", evaluation.select, f"{problem}; {remedy}")
        elif evaluation.select in scores and evaluation.select not in choices:
            problem = f"only reported, nothing can be best by it; those that say which is better: {', '.join(choices)}"
            mistakes.add("evaluation.select", evaluation.select, problem)
        else:
            _check_known("evaluation.select", evaluation.select, "score of evaluation.tasks", choices, mistakes)


def _check_size(key: str, task: EvaluationTask, patch_size: int | None, mistakes: Mistakes) -> None:
    sides = {f"{key}.image_size": task.image_size, f"{key}.image_width": task.image_width}
    for side, pixels in sides.items():
        if mistakes.sound(side, "backbone.patch_size") and pixels and patch_size:
            check_divisible(side, pixels, patch_size, mistakes)
    if not mistakes.sound(f"{key}.protocol", *sides) or task.image_width in (None, task.image_size):
        return
    if task.image_size is None:
        mistakes.add(f"{key}.image_width", task.image_width, f"needs {key}.image_size, the height")
    elif not task.protocol or evaluations.protocol(task.protocol).tokens == "pooled":
        what = f"protocol {task.protocol} takes" if task.protocol else "protocols of suites take"
        mistakes.add(f"{key}.image_width", task.image_width, f"{what} square images; give image_size as one number")


def _check_fits(key: str, task: EvaluationTask, kind: str, mistakes: Mistakes) -> None:
    """Refuse what a backbone of this kind cannot be evaluated by."""
    try:
        does_fit = bool(evaluations.fitting(kind, [task.protocol]))
    except evaluations.EvaluationError as error:  # a plug-in that cannot be imported
        mistakes.add(f"{key}.protocol", task.protocol, str(error))
        return
    if not does_fit:
        problem = f"does not fit backbone.kind={kind}; built-in ones that do: {', '.join(evaluations.fitting(kind))}"
        mistakes.add(f"{key}.protocol", task.protocol, problem)
    elif task.image_size is not None and kind in EXTRACTIONS and kind != "image":
        mistakes.add(f"{key}.image_size", task.image_size, f"is of images; with backbone.kind={kind} leave it out")


def _check_known(key: str, name: str, noun: str, known: Iterable[str], mistakes: Mistakes) -> None:
    names = list(known)
    if mistakes.sound(key) and name not in names:
        listing = ", ".join(names) if names else "none"
        mistakes.add(key, name, f"unknown {noun}; known are {listing}{nearest(name, names)}")
