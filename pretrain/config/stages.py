"""Recipes in stages: a list of overrides, resolved to one recipe per stage before the run.

    stages:
      - {name: small, backbone: {image_size: 64}, train: {steps: 800}}
      - {name: large, backbone: {image_size: 96}, train: {steps: 200}, reset_optimizer: true}

Everything outside `stages:` holds for all of them. A stage overrides settings of what is learned and how; where work
is done, on how many workers, and how it is recorded is one decision for the whole run. The command line comes last, as
always: `train.steps=20` sets every stage, `stages[1].train.steps=20` one.

Each stage has a sample order of its own, by a seed that is `train.seed` plus its number unless it says otherwise. Four
keys say how a stage begins:

    init_from         where its weights come from: an earlier stage's name, or whatever `init_from` of a recipe takes.
                      Left out, the stage before; the first stage has what the recipe says.
    init_with         after a stage with a teacher: student (the default) or teacher, whose weights the student has.
    teacher_from      where frozen teachers come from, in the words of init_from; also STAGE/STEP, the checkpoint of a
                      step of the run within an earlier stage.
    reset_optimizer   true (the default) begins with new moments; false carries them over, which needs a stage before
                      with the same parameters.

A recipe without `stages:` is a plan of one nameless stage. NOT here: carrying weights over (`pretrain.training`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from data_pipelines.storage.locations import redacted
from pretrain.config.schema import Recipe
from pretrain.remote.places import shown_storage

__all__ = ["FIXED", "INIT_WITH", "STAGE_KEYS", "Plan", "Stage", "in_order", "plan_yaml", "stage_and_step"]

STAGE_KEYS = ("name", "init_from", "init_with", "teacher_from", "reset_optimizer")
INIT_WITH = ("student", "teacher")
# Decided once for a run: who it is, where it runs, and how it is evaluated.
FIXED = (
    "name",
    "description",
    "suits",
    "storage",
    "resume_from",
    "cluster",
    "evaluation",
    "tracking",
    "train.workers",
    "train.min_workers",
    "train.device",
    "train.keep_last",
    "train.keep_best",
    "train.max_failures",
    "train.hang_after_s",
    "train.collective_timeout_s",
    "train.max_skipped_steps",
    "train.stop_on_collapse",
)


@dataclass(frozen=True)
class Stage:
    """One stage of a run.

    Attributes:
        name: Unique within the run; empty for the only stage of a recipe without `stages:`.
        recipe: Resolved as if it were a recipe of its own; `train.steps` and all schedules count its own steps.
        first_step, first_sample: Steps of the run that are done when it begins, and samples that were seen in them.
        init_from: Index of the earlier stage that its weights come from; None: as `recipe.init_from` says.
        init_with: Whether the student of this stage begins as the student or as the teacher of the stage before.
        teacher_from: Index of the earlier stage that frozen teachers come from; None: as `recipe.teacher_from` says.
        teacher_step: Of the run, whose checkpoint that is; None: the stage's last.
        reset_optimizer: Whether it begins with new optimizer moments.
    """

    name: str
    recipe: Recipe
    first_step: int = 0
    first_sample: int = 0
    init_from: int | None = None
    init_with: str = "student"
    teacher_from: int | None = None
    teacher_step: int | None = None
    reset_optimizer: bool = True

    @property
    def last_step(self) -> int:
        """Steps of the run that are done when it ends."""
        return self.first_step + self.recipe.train.steps

    def samples_seen(self, step: int) -> int:
        """Samples of the run after its step `step`, which is one of this stage."""
        return self.first_sample + (step - self.first_step) * self.recipe.train.global_batch_size


@dataclass(frozen=True)
class Plan:
    """What a run does, stage after stage. Settings in `FIXED` are the same in all of them."""

    stages: tuple[Stage, ...]

    @classmethod
    def single(cls, recipe: Recipe) -> Plan:
        """The plan of a recipe without stages."""
        return cls((Stage("", recipe),))

    @property
    def recipe(self) -> Recipe:
        """The last stage's recipe: what holds for the whole run can be read from it."""
        return self.stages[-1].recipe

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.stages[-1].last_step

    def optimizer_steps(self, index: int, step: int) -> int:
        """Updates that the optimizer of stage `index` counts when `step` steps of the run are done."""
        first = index
        while not self.stages[first].reset_optimizer:
            first -= 1
        return step - self.stages[first].first_step

    def index_at(self, step: int) -> int:
        """The stage that is at work when `step` steps of the run are done; at a border, the one that has just ended."""
        return next((i for i, stage in enumerate(self.stages) if step <= stage.last_step), len(self.stages) - 1)


def in_order(named: Sequence[tuple[str, Recipe, Mapping[str, Any]]]) -> Plan:
    """Stages one after the other.

    Args:
        named: Name, resolved recipe and the keys of `STAGE_KEYS` that each stage gives.
    """
    stages: list[Stage] = []
    for index, (name, recipe, keys) in enumerate(named):
        source = keys.get("init_from")
        earlier = [stage.name for stage in stages]
        teacher, teacher_step = stage_and_step(keys.get("teacher_from"), earlier)
        stages.append(
            Stage(
                name,
                recipe,
                first_step=stages[-1].last_step if stages else 0,
                first_sample=stages[-1].samples_seen(stages[-1].last_step) if stages else 0,
                init_from=earlier.index(source) if source in earlier else index - 1 if stages and not source else None,
                init_with=keys.get("init_with", "student"),
                teacher_from=teacher,
                teacher_step=teacher_step,
                reset_optimizer=keys.get("reset_optimizer", True),
            )
        )
    return Plan(tuple(stages))


def stage_and_step(source: str | None, names: Sequence[str]) -> tuple[int | None, int | None]:
    """The stage that `teacher_from` names, by its index in `names`, and the step of the run if it names one, too."""
    name, _, step = (source or "").partition("/")
    if name not in names or (step and not step.isdecimal()):
        return None, None
    return names.index(name), int(step) if step else None


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """All settings, as they are stored: without credentials, and with a remote storage by its URI."""
    settings: dict[str, Any] = redacted(OmegaConf.to_container(OmegaConf.structured(recipe)))
    return settings | {"storage": shown_storage(Path(recipe.storage))}


def plan_yaml(plan: Plan) -> str:
    """The plan as YAML: what all stages share, the differences, and `storage` last, which says that the text is whole.

    `load_plan` reads it back to an equal one, but for credentials in URLs, which are not stored.
    """
    contents = [settings_of(stage.recipe) for stage in plan.stages]
    if len(contents) == 1 and not plan.stages[0].name:
        return OmegaConf.to_yaml(OmegaConf.create(contents[0]))
    shared = {key: _shared(key, [content[key] for content in contents]) for key in contents[0]}
    shared = {key: value for key, value in shared.items() if value is not _DIFFERS}
    shared["resume_from"] = contents[0]["resume_from"]  # of the run: later stages have none
    # Left out of a stage these two would not mean the shared value, so each stage says its own.
    shared.pop("init_from", None)
    shared["train"] = {key: value for key, value in shared["train"].items() if key != "seed"}
    stages = []
    for stage, content in zip(plan.stages, contents, strict=True):
        keys: dict[str, Any] = {"name": stage.name, "reset_optimizer": stage.reset_optimizer}
        if stage.init_from is not None:
            keys["init_from"] = plan.stages[stage.init_from].name
        if stage.teacher_from is not None:
            name = plan.stages[stage.teacher_from].name
            keys["teacher_from"] = name if stage.teacher_step is None else f"{name}/{stage.teacher_step}"
        if stage.init_with != "student":
            keys["init_with"] = stage.init_with
        stages.append(_difference(shared, content) | keys)
    last = {"storage": shared.pop("storage")}
    return OmegaConf.to_yaml(OmegaConf.create(shared | {"stages": stages} | last))


def written_stages(content: Any) -> list[dict[str, Any]]:
    """The stages of a recipe that a run has written, each with all its settings; without `stages:` the one there is.

    For who only reads what was written: no setting is checked.

    Raises:
        ValueError: It has not the shape of a recipe.
    """
    stages = content.get("stages") if isinstance(content, Mapping) else None
    if not isinstance(content, Mapping) or not all(isinstance(stage, Mapping) for stage in _listed(stages)):
        raise ValueError("not a mapping of settings")
    shared = {key: value for key, value in content.items() if key != "stages"}
    found = []
    for stage in _listed(stages) or [{}]:
        whole = dict(shared)
        for key, value in stage.items():
            if key in _SECTIONS and isinstance(value, Mapping) and isinstance(shared.get(key), Mapping):
                whole[key] = {**shared[key], **value}
            else:
                whole[key] = value if key != "name" else shared.get("name")
        found.append(whole | ({"stage": stage["name"]} if "name" in stage else {}))
    return found


def _listed(stages: Any) -> list[Any]:
    return stages if isinstance(stages, list) else [] if stages is None else [stages]


_DIFFERS = object()
_SECTIONS = ("objective", "backbone", "data", "optimizer", "train")  # taken apart; other mappings are values


def _shared(key: str, values: Sequence[Any]) -> Any:
    """What all values of a key agree on; of sections, the settings that they agree on."""
    if all(value == values[0] for value in values):
        return values[0]
    if key not in _SECTIONS or len({value.get("name") for value in values}) > 1:  # another objective: other settings
        return _DIFFERS
    return {key: values[0][key] for key in values[0] if all(key in v and v[key] == values[0][key] for v in values)}


def _difference(shared: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in content.items():
        if key == "resume_from":
            continue
        if key not in shared:
            found[key] = value
        elif value != shared[key]:
            found[key] = {name: below for name, below in value.items() if name not in shared[key]}
    return found
