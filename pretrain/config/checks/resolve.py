"""What settings mean together: paths, names of other packages, batch arithmetic, schedules, DeepSpeed keys.

Each rule runs when the settings it reads are sound by themselves, so one request gets all of its mistakes reported.
`resolve` also fills in what the recipe leaves open; afterwards nothing is derived a second time.
"""

from __future__ import annotations

from dataclasses import replace

from backbones.images.config import ImageConfig
from pretrain.config.checks.batch import with_batch_arithmetic
from pretrain.config.checks.data import (
    check_data,
    check_pairing,
    check_root,
    counted_in_steps,
    loader_workers,
    with_absolute_paths,
)
from pretrain.config.checks.evaluation import check_evaluation_data, check_evaluation_tasks, check_select
from pretrain.config.checks.model import check_crops, check_image_encoder
from pretrain.config.checks.optimizer import check_optimizer
from pretrain.config.checks.places import (
    check_address,
    check_checkpoint_storage,
    check_names,
    check_references,
    check_trackers,
    checked_storage,
    checkpoint_storage,
)
from pretrain.config.checks.zero import check_deepspeed_keys, check_zero_stage, zero_stage
from pretrain.config.mistakes import Mistakes
from pretrain.config.paths import absolute, absolute_reference
from pretrain.config.schema import Recipe
from pretrain.config.suites import in_protocols

__all__ = ["resolve"]


def resolve(draft: Recipe, mistakes: Mistakes, *, check_files: bool) -> Recipe:
    """Check the settings together and fill in paths and derived values.

    Args:
        draft: the merged recipe, with stand-ins where `mistakes` already holds a mistake.
        mistakes: receives the mistakes; the result is only meaningful when it stays empty.
        check_files: also look whether the data is there, and whether a run can be kept where it is to be.
    """
    if mistakes.is_typed("data.root") and draft.data.root is not None and not mistakes.refers_to("data.root"):
        problem = (
            f"{draft.name} reads no data below it; give data.train=SHARDS, or take a recipe with ${{data.root}} in it"
        )
        mistakes.add("data.root", draft.data.root, problem)
    elif check_files:
        check_root(draft, mistakes)
    draft = counted_in_steps(draft, mistakes, check_files=check_files)
    draft = replace(draft, train=replace(draft.train, zero_stage=zero_stage(draft)))
    draft = replace(draft, data=replace(draft.data, loader_workers=loader_workers(draft)))
    check_names(draft, mistakes)
    if isinstance(draft.backbone, ImageConfig):  # of another kind, its own constructor knows what is right
        check_image_encoder(draft.backbone, mistakes)
        check_crops(draft.objective, draft.backbone, mistakes)
    check_optimizer(draft, mistakes)
    check_zero_stage(draft, mistakes)
    check_deepspeed_keys(draft.deepspeed, mistakes)
    check_checkpoint_storage(draft.checkpoints.storage, mistakes)
    check_address(draft.cluster.address, mistakes)
    check_trackers(draft.tracking.also, mistakes, check_files=check_files)
    check_references(draft, mistakes)
    recipe = replace(
        draft,
        data=with_absolute_paths(draft.data),
        train=with_batch_arithmetic(draft.train, mistakes),
        evaluation=replace(
            draft.evaluation, data={name: absolute(path) for name, path in draft.evaluation.data.items()}
        ),
        tracking=replace(draft.tracking, model_name=draft.tracking.model_name or draft.name),
        init_from=absolute_reference(draft.init_from),
        teacher_from=absolute_reference(draft.teacher_from),
        resume_from=absolute_reference(draft.resume_from),
        checkpoints=replace(draft.checkpoints, storage=checkpoint_storage(draft)),
        storage=checked_storage(draft.storage, mistakes, check_files=check_files),
    )
    check_data(draft.data, mistakes, check_files=check_files)
    if check_files and mistakes.sound("backbone.kind"):
        check_pairing(draft, mistakes)
    if recipe.evaluation.enabled:
        if check_files:
            check_evaluation_data(recipe.evaluation, mistakes)
        check_evaluation_tasks(recipe.evaluation, recipe.backbone, mistakes)
    if mistakes.sound("evaluation", "backbone.kind"):
        evaluation = in_protocols(recipe.evaluation, recipe.backbone.kind, mistakes, with_data=check_files)
        recipe = replace(recipe, evaluation=evaluation)
    if recipe.evaluation.enabled:
        check_select(recipe.evaluation, mistakes)
    return recipe
