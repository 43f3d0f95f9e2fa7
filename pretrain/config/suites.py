"""Suites in the recipe of a run: each becomes its protocols, a task each, which say which suite they are of.

A recipe that a run has written has protocols only, so that it is evaluated by the same ones whatever later versions
have in their suites. Not here: what is in a suite, and what fits (`evaluation.suites`).
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from data_pipelines.errors import DataError
from evaluation.protocol import EvaluationError
from evaluation.suites import first_shards, misfit, protocols_of
from pretrain.config.checks.evaluation import evaluation_data_problem
from pretrain.config.mistakes import Mistakes
from pretrain.config.schema import EvaluationConfig, EvaluationTask

__all__ = ["in_protocols", "judged"]


def in_protocols(evaluation: EvaluationConfig, kind: str, mistakes: Mistakes, *, with_data: bool) -> EvaluationConfig:
    """The same with one task for each protocol of its suites that fits.

    A protocol is run once on a data set: as the task says that names it, else as the suite has it that is run most
    often.

    Args:
        evaluation: Sound by itself.
        kind: Of the backbone.
        mistakes: Receives suites of which nothing fits.
        with_data: False where the data need not be there; then only what the backbone does not fit is left out.
    """
    if all(task.protocol for task in evaluation.tasks):
        return evaluation
    found: dict[tuple[str, str], EvaluationTask] = {}
    named = {(task.protocol, task.data) for task in evaluation.tasks if task.protocol}
    tasks: list[EvaluationTask] = []
    for index, task in enumerate(evaluation.tasks):
        if task.protocol:
            tasks.append(task)
            continue
        try:
            verdicts = judged(task, kind, evaluation.data[task.data] if with_data else None)
        except EvaluationError as error:  # a plug-in that cannot be imported
            mistakes.add(f"evaluation.tasks[{index}].suite", task.suite, str(error))
            continue
        fitting = [name for name, reason in verdicts.items() if reason is None]
        if not fitting:
            problem = f"none of its protocols fits backbone.kind={kind} and the labels of {task.data}"
            mistakes.add(f"evaluation.tasks[{index}].suite", task.suite, problem)
        for name in fitting:
            label, one = (name, task.data), replace(task, protocol=name)
            if label in named:
                continue
            if label not in found:
                tasks.append(one)
            elif _is_oftener(one, found[label], evaluation.every):
                tasks[tasks.index(found[label])] = one
            else:
                continue
            found[label] = one
    return replace(evaluation, tasks=tasks)


def judged(task: EvaluationTask, kind: str, directory: str | None) -> dict[str, str | None]:
    """The protocols of a task's suite, each with the reason to leave it out, or None.

    Args:
        task: Names the suite.
        kind: Of the backbone.
        directory: Its data; None, and data that are not in order: of them nothing is known.
    """
    assert task.suite is not None
    splits = []
    if directory is not None and evaluation_data_problem(directory) is None:
        with suppress(DataError):  # whoever opens the shards says what is wrong with them
            splits = first_shards(Path(directory))
    return {name: misfit(name, kind, splits) for name in protocols_of(task.suite, kind)}


def _is_oftener(one: EvaluationTask, other: EvaluationTask, every: int) -> bool:
    """Whether a task is run on more checkpoints than another."""

    def gap(task: EvaluationTask) -> tuple[bool, int]:
        return task.at is not None, task.every or every

    return gap(one) < gap(other)
