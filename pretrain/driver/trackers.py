"""What a run tells its trackers of itself when they are opened: MLflow, and others beside it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pretrain.checkpoints import copies
from pretrain.config.stages import Plan, plan_yaml, settings_of
from pretrain.record.events import Evaluated
from pretrain.record.run_dir import RunDir

if TYPE_CHECKING:
    from pretrain.tracking.also import Mirrors

__all__ = ["open_mirrors", "tracker_of"]


def tracker_of(plan: Plan, run_dir: RunDir) -> Any:
    """MLflow's, in a process of its own, which `start` starts."""
    from pretrain.tracking.client import default_uri
    from pretrain.tracking.sync import Tracker

    recipe = plan.recipe
    tags = {"objective": recipe.objective.name, "backbone": recipe.backbone.name, **_git_tags()}
    if len(plan.stages) > 1:  # parameters are those of the last one
        tags["stages"] = ", ".join(f"{stage.name} ({stage.recipe.train.steps} steps)" for stage in plan.stages)
    return Tracker(
        run_dir.path,
        uri=default_uri(Path(recipe.storage)),
        experiment=recipe.tracking.experiment,
        recipe_yaml=plan_yaml(plan),
        params=settings_of(recipe),
        tags=tags,
        model_name=recipe.tracking.model_name or recipe.name,
        select=recipe.evaluation.select,
        exported=copies.exported,
    )


def open_mirrors(plan: Plan, run_dir: RunDir, scores: Iterable[Evaluated]) -> Mirrors:
    """The trackers beside MLflow, which are shown the scores of before."""
    from pretrain.tracking.also import Mirrors

    tracking = plan.recipe.tracking
    mirrors = Mirrors(tracking.also, run_dir.path, tracking.experiment, settings_of(plan.recipe))
    mirrors.show(scores)
    return mirrors


def _git_tags() -> dict[str, str]:
    """Commit of the working directory, if it is in a repository."""
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"git.commit": answer.stdout.strip(), "git.dirty": str(bool(dirty.stdout.strip())).lower()}
