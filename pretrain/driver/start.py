"""Starts a run, or goes on with one: what is refused before its driver begins, and what is taken back after that.

Not here: what the driver does then (`pretrain.driver.drive`).
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from pretrain.checkpoints import store
from pretrain.checkpoints.initialization import checked_plan
from pretrain.config.load import load_for_resume
from pretrain.config.same_run import changes
from pretrain.config.schema import Recipe
from pretrain.config.stages import Plan
from pretrain.driver.drive import Driver, OnStart, RunResult
from pretrain.driver.placement import given_address, require_room_for_workers
from pretrain.errors import RequestError, RunStopped
from pretrain.record.remote_runs import bring, brought
from pretrain.record.run_dir import RunDir, checked_run_id, find_run, new_run_id
from pretrain.reporting.progress import shown_while
from pretrain.screen import say
from pretrain.training.schedules import schedules_line

__all__ = ["begun_run", "resume", "run"]


def run(
    recipe: Plan | Recipe | str,
    overrides: Sequence[str] = (),
    *,
    run_id: str | None = None,
    on_start: OnStart | None = None,
) -> RunResult:
    """Train, evaluate and record a run: a new one, or the one that `run_id` names, if it has begun.

    Args:
        recipe: A resolved recipe or plan of stages, or the name or file of one.
        overrides: `key=value` texts for a recipe given by name.
        run_id: Name of the run, so that the same call begins it, goes on with it, or finds it finished; None: a new
            run, named by the recipe and the time.
        on_start: Called with the run's directory before anything is started.

    Raises:
        RequestError: The recipe is wrong, or is not that of the run of that name.
        RunFailed: Training failed more often than `train.max_failures`.
        RunStopped: SIGTERM or Ctrl-C ended it, after a checkpoint of the step that was at work.
    """
    if isinstance(recipe, str):
        from pretrain.photos import load

        recipe = load(recipe, overrides)
    plan = Plan.single(recipe) if isinstance(recipe, Recipe) else recipe
    launched = time.time()
    if run_id is not None and (begun := begun_run(plan, run_id)) is not None:
        told = changes(load_for_resume(begun.recipe, ()), plan, run_id)
        return resume(run_id, plan.recipe.storage, told, on_start=on_start)
    require_room_for_workers(plan.recipe)
    references = ("init_from", "teacher_from", "resume_from")
    if any(getattr(stage.recipe, key) for stage in plan.stages for key in references):
        bring(Path(plan.recipe.storage))  # they may name other runs of a remote storage
    run_dir = RunDir(Path(plan.recipe.storage) / (run_id or new_run_id(plan.recipe.name)))
    plan = checked_plan(plan, run_dir.path)
    # A cluster may be long in giving workers a place, and a teacher, or weights of a stage before, may not fit another
    # backbone; of other runs the workers look.
    backbones = [stage.recipe.backbone for stage in plan.stages]
    has_teacher = any((stage.teacher_from, stage.recipe.teacher_from) != (None, None) for stage in plan.stages)
    if given_address(plan.recipe) or has_teacher or any(each != backbones[0] for each in backbones):
        with shown_while("looking at the model and the data"):
            from pretrain.training.preflight import look_ahead  # imports torch

            look_ahead(plan)
    new = [folder for folder in run_dir.path.parents if not folder.exists()]
    is_ours = _made(run_dir.path)
    try:
        return Driver(plan, run_dir, launched).drive(on_start)
    except (RequestError, RunStopped):
        if (
            is_ours and not run_dir.journal.exists()
        ):  # what never began leaves nothing behind; a run that began is never deleted
            shutil.rmtree(run_dir.path)
            with suppress(OSError):  # another run has been put there meanwhile
                for folder in new:
                    folder.rmdir()
        raise


def resume(
    run_id: str,
    storage: str | os.PathLike[str] = "runs",
    overrides: Sequence[str] = (),
    *,
    on_start: OnStart | None = None,
) -> RunResult:
    """Go on with a run from its newest complete checkpoint, with the recipe it was started with.

    Args:
        run_id: Name of the run.
        storage: Directory of the runs, or a URI.
        overrides: `key=value` texts for what may change, such as `train.workers=1`; kept for later resumes.
        on_start: Called with the run's directory before anything is started.

    Raises:
        RequestError: There is no such run, another process drives it, or an override is not allowed.
        RunFailed, RunStopped: As for `run`.
    """
    launched = time.time()
    run_dir = find_run(run_id, brought(storage, run_id))
    plan = load_for_resume(run_dir.recipe, overrides)
    if any(text.startswith(("train.steps=", "train.epochs=")) for text in overrides):
        newest = store.latest(run_dir.path)
        done = newest.step if newest else 0
        if plan.total_steps < done:
            raise RequestError(
                f"train.steps={plan.total_steps}: {done} steps of the run are done; give that many or more"
            )
        before = load_for_resume(run_dir.recipe, ())
        if before.total_steps != plan.total_steps:
            say(schedules_line(before.recipe, plan.recipe, done))
    require_room_for_workers(plan.recipe)
    plan = checked_plan(plan, run_dir.path)
    return Driver(plan, run_dir, launched).drive(on_start)


def begun_run(plan: Plan, run_id: str) -> RunDir | None:
    """The run of that name in the storage of a plan; None when it has not begun.

    Raises:
        RequestError: No run can have that name, or something else has it.
    """
    run_dir = RunDir(Path(plan.recipe.storage) / checked_run_id(run_id))
    bring(run_dir.path.parent, run_id)
    if run_dir.is_run:
        return run_dir
    if not run_dir.is_free:
        raise RequestError(f"--run-id {run_id}: {run_dir.path} is there, and is no run; give another name")
    return None


def _made(folder: Path) -> bool:
    """Make a directory; False when it is there, which another process may have done at this moment."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder.mkdir()
    except FileExistsError:
        return False
    return True
