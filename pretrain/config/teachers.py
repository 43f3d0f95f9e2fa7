"""Is there a frozen teacher where the settings need one, and none where they do not? Imports no torch.

Not here: what `teacher_from` may say (`pretrain.config.stage_list`, `pretrain.checkpoints.initialization`), whether a
teacher's tensors fit (`pretrain.training.frozen_teachers`).
"""

from __future__ import annotations

from collections.abc import Iterator

from backbones.images.config import ImageConfig
from objectives import registry as objectives
from objectives.parts.frozen_use import FrozenTeacherConfig
from pretrain.config.checks.model import sizes
from pretrain.config.mistakes import Mistakes
from pretrain.config.schema import Recipe

__all__ = ["check_teacher", "patch_size_of", "use_problem"]


def check_teacher(
    recipe: Recipe, mistakes: Mistakes, named: str | None, *, key: str | None = None, said_by: str | None = None
) -> None:
    """Note a frozen teacher that is missing, or that nothing is learned from.

    Args:
        recipe: Resolved, of a run that is to begin.
        mistakes: Of its settings.
        named: Where the teacher comes from; None: nothing says it.
        key, said_by: What says it, and who has set that; None: `teacher_from`, and whoever has set that.
    """
    if not mistakes.sound("objective", "teacher_from") or not _is_known(recipe):
        return
    use = recipe.objective.teacher_use() if isinstance(recipe.objective, FrozenTeacherConfig) else None
    if named and use is None:
        mistakes.add(key or "teacher_from", named, f"{_no_use(recipe)}; leave it out", origin=said_by if key else None)
    elif use is not None and not named:
        without = f", or objective.{use.setting}={use.without}" if use.without is not None else ""
        problem = f"needs {use.role}; give teacher_from=REFERENCE{without}"
        mistakes.add(f"objective.{use.setting}", use.value, problem)


def use_problem(recipe: Recipe, named: str | None) -> str | None:
    """The same in one line, for who has no list of mistakes."""
    mistakes = Mistakes()
    check_teacher(recipe, mistakes, named)
    return mistakes.lines[0].removeprefix("default: ") if mistakes.lines else None


def patch_size_of(recipe: Recipe) -> int | None:
    """Pixels of a patch of the student; None where only the model tells."""
    return sizes(recipe.backbone)[1] if isinstance(recipe.backbone, ImageConfig) else None


def _is_known(recipe: Recipe) -> bool:
    """Whether the settings tell; those of a plug-in may be silent about a teacher that its objective has."""
    return isinstance(recipe.objective, FrozenTeacherConfig) or recipe.objective.name in objectives.built_in_names()


def _no_use(recipe: Recipe) -> str:
    objective = recipe.objective
    if isinstance(objective, FrozenTeacherConfig):
        return f"nothing is learned from it; what would is {objective.teacher_settings}"
    with_one = ", ".join(_objectives_with_one())
    return f"objective {objective.name} learns from no frozen teacher, as {with_one} do"


def _objectives_with_one() -> Iterator[str]:
    for name in objectives.built_in_names():
        if issubclass(objectives.config_class(name), FrozenTeacherConfig):
            yield name
