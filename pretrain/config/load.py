"""From a recipe name and `key=value` overrides to a checked `Recipe`.

Layers, later ones win: the defaults in `pretrain.config.schema`, one YAML file, the command line. Every setting is
applied on its own through OmegaConf, so that each mistake is found and all are reported together. What settings mean
together is checked in `pretrain.config.checks`. Nothing here imports torch or numpy: a wrong request is refused in a
fraction of a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException
from yaml import YAMLError

from backbones import registry as backbones
from backbones.errors import BackboneError
from objectives import registry as objectives
from pretrain.config import checks
from pretrain.config.fields import Setting, declared_settings, template
from pretrain.config.mistakes import COMMAND_LINE, Mistakes, shown
from pretrain.config.optimizer_facts import RESHARDABLE
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
from pretrain.config.stages import FIXED, STAGE_KEYS, Plan, in_order
from pretrain.errors import RequestError, nearest

__all__ = [
    "ClusterConfig",
    "DataConfig",
    "EvaluationConfig",
    "EvaluationTask",
    "OptimizerConfig",
    "Recipe",
    "TrackingConfig",
    "TrainConfig",
    "load_for_resume",
    "load_plan",
    "load_recipe",
    "recipe_description",
    "recipe_names",
    "recipe_path",
    "to_yaml",
]

_RECIPES = Path(__file__).parents[1] / "recipes"
# What a resume may change: how and where the work is done, never what is learned.
_RESUMABLE = (
    "train.workers",
    "train.micro_batch_size",
    "train.accumulation",
    "train.checkpoint_blocks",
    "train.max_failures",
    "train.keep_last",
    "train.keep_best",
    "data.train",
    "data.loader_workers",
    "data.prefetch_batches",
    "data.max_corrupt_fraction",
    "data.cache_dir",
    "data.cache_gb",
    "data.fetch",
    "cluster.address",
    "cluster.cpus_per_worker",
    "cluster.gpus_per_worker",
)
_INSIDE_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\}")


def recipe_names() -> tuple[str, ...]:
    """Names of the recipes that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _RECIPES.glob("*.yaml")))


def recipe_path(name_or_path: str | Path) -> Path:
    """The file of a recipe given by name or by path.

    Raises:
        RequestError: there is no such recipe or file.
    """
    text = str(name_or_path)
    if text in recipe_names():
        return _RECIPES / f"{text}.yaml"
    path = Path(text).expanduser()
    if path.is_file():
        return path.absolute()
    if "/" in text or path.suffix in (".yaml", ".yml"):
        raise RequestError(f"recipe {text}: no such file{checks.nearest_file(path)}")
    known = recipe_names()
    raise RequestError(f"recipe {text}: unknown; known are {', '.join(known)}, or a path{nearest(text, known)}")


def recipe_description(name: str) -> str:
    """The one-line description of a recipe of the package."""
    return str(_read_yaml(recipe_path(name)).get("description", ""))


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
    return _plan(path, _read_yaml(path), overrides, f"pretrain run {name_or_path}", check_files=check_files)


def _plan(path: Path, content: dict[str, Any], overrides: Sequence[str], how_to_set: str, *, check_files: bool) -> Plan:
    origin = f"recipe {path.name}"
    mistakes = Mistakes()
    pairs = list(_parse_overrides(overrides, mistakes))
    content = {"name": path.stem, **content}
    stages = _stages(content.pop("stages", None) or [], pairs, origin, mistakes)
    common = [(key, value) for key, value in pairs if not _is_about_stages(key)]
    if not stages:
        recipe = _resolved([(content, origin)], common, mistakes, how_to_set, check_files=check_files)
        mistakes.raise_if_any()
        return Plan.single(recipe)
    mistakes.raise_if_any()
    named: list[tuple[str, Recipe, Mapping[str, Any]]] = []
    lines: list[list[str]] = []
    for index, stage in enumerate(stages):
        mistakes = Mistakes()
        for key in ("init_from", "teacher_from"):
            source = stage.keys.get(key)
            if source is not None and source not in [name for name, _, _ in named]:
                stage.pairs.append((key, source))  # a reference, of which the recipe takes care
        layers = [(content, origin), (stage.settings, f"{origin}, stage {stage.name}")]
        recipe = _resolved(layers, [*common, *stage.pairs], mistakes, how_to_set, check_files=check_files)
        if "train.seed" not in _given(stage):
            seed = recipe.train.seed + index  # or every stage would see the samples in the same order
            recipe = replace(recipe, train=replace(recipe.train, seed=seed))
        if index:  # where the run begins is a matter of the first stage
            init_from = recipe.init_from if "init_from" in dict(stage.pairs) else None
            recipe = replace(recipe, resume_from=None, init_from=init_from)
        named.append((stage.name, recipe, stage.keys))
        lines.append(mistakes.lines)
    if any(lines):
        raise RequestError(*_said_once(lines, [stage.name for stage in stages]))
    plan = in_order(named)
    if problems := list(_moments_that_do_not_fit(plan)):
        raise RequestError(*problems)
    return plan


def _said_once(lines: Sequence[Sequence[str]], names: Sequence[str]) -> Iterator[str]:
    """The mistakes of all stages: what they share is said once, the rest with the name of its stage."""
    shared = {line for line in lines[0] if all(line in others for others in lines)}
    yield from (line for line in lines[0] if line in shared)
    for own, name in zip(lines, names, strict=True):
        for line in own:
            if line not in shared:
                yield line if f", stage {name}:" in line else f"stage {name}: {line}"


def _moments_that_do_not_fit(plan: Plan) -> Iterator[str]:
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


def _resolved(
    contents: Sequence[tuple[dict[str, Any], str]],
    pairs: Sequence[tuple[str, Any]],
    mistakes: Mistakes,
    how_to_set: str,
    *,
    check_files: bool,
) -> Recipe:
    """Layers of file contents, each with its origin, and the command line on top, merged and checked."""
    chosen = {
        "objective": _choose_objective(contents, pairs, mistakes),
        "backbone": _choose_backbone(contents, pairs, mistakes),
    }
    layers = _Layers({key: settings for key, (settings, _) in chosen.items()}, mistakes)
    for number, (content, origin) in enumerate(contents):
        # Without the settings of another objective, or kind of backbone, than the one that is trained.
        counted = {key: value for key, value in content.items() if key not in chosen or number >= chosen[key][1]}
        layers.assign("", counted, origin)
    for key, value in pairs:
        layers.assign(key, value, COMMAND_LINE)
    draft = layers.draft(contents[0][1], how_to_set=how_to_set)
    return checks.resolve(draft, mistakes, check_files=check_files)


def load_for_resume(path: Path, overrides: Sequence[str]) -> Plan:
    """The plan of a run that goes on, with what may change about it changed.

    With another number of workers the global batch stays; unless the overrides say how it is divided, the micro-batch
    stays too where that works out, else one micro-batch per worker is taken.

    Raises:
        RequestError: a setting may not change any more, or the result does not work out.
    """
    pairs = dict(text.partition("=")[::2] for text in overrides)
    forbidden = [key for key in pairs if key not in _RESUMABLE]
    if forbidden:
        allowed = f"a resume may change {', '.join(_RESUMABLE)}"
        raise RequestError(*(f"{key}={pairs[key]}: fixed when the run began; {allowed}" for key in forbidden))
    content = _read_yaml(path)
    open_keys = {"train.micro_batch_size", "train.accumulation"} - set(pairs)
    derived = [f"{key}=null" for key in open_keys] if len(open_keys) == 1 else []
    if "train.workers" in pairs and _is_written_by_a_run(content):
        workers, are_whole = pairs["train.workers"], True
        for stage in content.get("stages") or [{}]:
            keys = ("optimizer.name", "train.zero_stage", "train.micro_batch_size", "train.global_batch_size")
            optimizer, zero_stage, micro, total = (_written(content, stage, path, key) for key in keys)
            if zero_stage and optimizer not in RESHARDABLE:
                known = f"DeepSpeed can cut anew only the state of {', '.join(RESHARDABLE)}"
                raise RequestError(f"train.workers={workers}: the run uses {optimizer} sharded, and {known}")
            share = (int(workers) if workers.isdigit() else 0) * (micro if isinstance(micro, int) else 0)
            are_whole = are_whole and share > 0 and isinstance(total, int) and total % share == 0
        if len(open_keys) == 2:
            derived = ["train.accumulation=null", *([] if are_whole else ["train.micro_batch_size=null"])]
    return _plan(path, content, (*derived, *overrides), f"pretrain resume {path.parent.name}", check_files=True)


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
    """The recipe as YAML that `load_recipe` reads back to an equal recipe."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


class _WrittenStage(NamedTuple):
    """A stage as a recipe and the command line state it."""

    name: str
    keys: dict[str, Any]  # of STAGE_KEYS, without the name
    settings: dict[str, Any]
    pairs: list[tuple[str, Any]]  # settings of this stage from the command line


def _is_about_stages(key: str) -> bool:
    return key == "stages" or key.startswith(("stages[", "stages."))


def _stages(written: Any, pairs: Sequence[tuple[str, Any]], origin: str, mistakes: Mistakes) -> list[_WrittenStage]:
    """The stages of a recipe, with what the command line says of the list and of single stages."""
    for key, value in pairs:
        if key == "stages":
            written, origin = value, COMMAND_LINE
    if not isinstance(written, list) or not all(isinstance(stage, Mapping) for stage in written):
        mistakes.add("stages", written, "expected a list of mappings, one of overrides per stage", origin=origin)
        return []
    settings = [{str(key): value for key, value in stage.items()} for stage in written]
    given: list[list[tuple[str, Any]]] = [[] for _ in settings]
    for key, value in pairs:
        match = re.fullmatch(r"stages\[(\d+)\]\.(.+)", key)
        if match and int(match[1]) >= len(settings):
            mistakes.add(key, value, f"stages has {len(settings)} items, counted from 0", origin=COMMAND_LINE)
        elif match and match[2] in STAGE_KEYS:
            settings[int(match[1])][match[2]] = value
        elif match:
            given[int(match[1])].append((match[2], value))
        elif key != "stages" and _is_about_stages(key):
            problem = "name one stage and a setting, e.g. stages[0].train.steps=200"
            mistakes.add(key, value, problem, origin=COMMAND_LINE)
    stages = []
    for index, (own, pairs_of_it) in enumerate(zip(settings, given, strict=True)):
        keys = {key: own.pop(key) for key in STAGE_KEYS if key in own}
        stages.append(_WrittenStage(str(keys.pop("name", index)), keys, own, pairs_of_it))
    for index, stage in enumerate(stages):
        names = [other.name for other in stages]
        _check_stage(index, stage, names[:index], names[index:], origin, mistakes)
    return stages


def _check_stage(
    index: int, stage: _WrittenStage, earlier: list[str], later: list[str], origin: str, mistakes: Mistakes
) -> None:
    """What a stage may say, and what only the list as a whole can tell."""
    where = f"stages[{index}]"
    if stage.name in earlier:
        mistakes.add(f"{where}.name", stage.name, "named twice; give each stage its own name", origin=origin)
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", stage.name):
        mistakes.add(f"{where}.name", stage.name, "expected letters, digits, '_' and '-' only", origin=origin)
    reset = stage.keys.get("reset_optimizer", True)
    if not isinstance(reset, bool):
        mistakes.add(f"{where}.reset_optimizer", reset, "expected true or false", origin=origin)
    elif not reset and not index:
        problem = "the first stage has no moments to carry over; leave it out"
        mistakes.add(f"{where}.reset_optimizer", reset, problem, origin=origin)
    source = stage.keys.get("init_from")
    if source is not None and not (isinstance(source, str) and source):
        mistakes.add(
            f"{where}.init_from",
            source,
            "expected an earlier stage, or a reference as docs/stages.md lists them",
            origin=origin,
        )
    elif source in later:
        mistakes.add(f"{where}.init_from", source, "that stage comes later; expected an earlier one", origin=origin)
    elif source and source not in earlier and not Path(source).exists() and (hint := nearest(source, earlier)):
        mistakes.add(f"{where}.init_from", source, f"no earlier stage has that name{hint}", origin=origin)
    if reset is False and source not in (None, *earlier[-1:]):
        problem = "moments are carried over from the stage before only; leave init_from out, or reset the optimizer"
        mistakes.add(f"{where}.init_from", source, problem, origin=origin)
    for key in _given(stage):
        if any(key == fixed or key.startswith(f"{fixed}.") for fixed in FIXED):
            mistakes.add_stray(f"{where}.{key}", "is one for all stages; set it outside stages", origin=origin)


def _given(stage: _WrittenStage) -> list[str]:
    """The settings that a stage states, in the recipe and on the command line."""
    typed = (_dotted(key, value) if isinstance(value, Mapping) else [key] for key, value in stage.pairs)
    return [*_dotted("", stage.settings), *chain.from_iterable(typed)]


def _dotted(prefix: str, settings: Mapping[str, Any]) -> Iterator[str]:
    """`{train: {steps: 5}}` -> `train.steps`."""
    for key, value in settings.items():
        name = f"{prefix}.{key}".removeprefix(".")
        if isinstance(value, Mapping):
            yield from _dotted(name, value)
        else:
            yield name


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        node = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RequestError(f"recipe {path}{where}: not readable as YAML: {what}") from None
    content = OmegaConf.to_container(node, resolve=False)
    if not isinstance(content, dict):
        raise RequestError(f"recipe {path}: expected settings (key: value), found a list")
    return {str(key): value for key, value in content.items()}


def _parse_overrides(overrides: Sequence[str], mistakes: Mistakes) -> Iterator[tuple[str, Any]]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            mistakes.add_stray(text, "expected key=value, e.g. train.steps=200")
            continue
        try:
            parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
        except (YAMLError, OmegaConfBaseException) as error:
            what = getattr(error, "problem", None) or str(error).splitlines()[0]
            mistakes.add(key, value, f"not readable as a YAML value: {what}", origin=COMMAND_LINE)
            continue
        assert isinstance(parsed, dict)
        yield key.strip(), parsed["value"]


def _choose_objective(
    contents: Sequence[tuple[dict[str, Any], str]], pairs: Sequence[tuple[str, Any]], mistakes: Mistakes
) -> tuple[type | None, int]:
    """The settings class of the named objective (None, with a mistake noted, when there is none).

    A later layer, or the command line, may name another objective than the one before: then the earlier layers'
    settings of the objective are not its own, and it starts from its defaults. The second answer is the number of the
    first layer whose settings count.
    """
    name, source, first = _named("objective", "name", None, contents, pairs)
    known = objectives.names()
    if name is None:
        mistakes.add_missing("objective.name", source, f"one of {', '.join(known)}")
    elif name not in known:
        problem = f"unknown objective; known are {', '.join(known)}{nearest(str(name), known)}"
        mistakes.add("objective.name", name, problem, origin=source)
    else:
        return objectives.config_class(name), first
    mistakes.distrust("objective")
    return None, first


def _choose_backbone(
    contents: Sequence[tuple[dict[str, Any], str]], pairs: Sequence[tuple[str, Any]], mistakes: Mistakes
) -> tuple[type | None, int]:
    """The settings class of the kind of backbone, as `_choose_objective` finds that of the objective."""
    kind, source, first = _named("backbone", "kind", backbones.IMAGE, contents, pairs)
    try:
        return backbones.config_class(str(kind)), first
    except BackboneError as error:
        mistakes.add("backbone.kind", kind, str(error), origin=source)
    mistakes.distrust("backbone")
    return None, first


def _named(
    section: str,
    key: str,
    default: str | None,
    contents: Sequence[tuple[dict[str, Any], str]],
    pairs: Sequence[tuple[str, Any]],
) -> tuple[Any, str, int]:
    """What the last layer says of the key that chooses the settings of a section.

    Returns:
        the value, the layer's origin, and the number of the first layer from which on it is the same.
    """
    name, source, first = default, contents[0][1], 0
    for number, (content, origin) in enumerate(contents):
        settings = content.get(section)
        if isinstance(settings, Mapping) and key in settings:
            first = first if settings[key] == name else number
            name, source = settings[key], origin
    for given, value in pairs:
        named = value if given == f"{section}.{key}" else None
        if given == section and isinstance(value, Mapping):
            named = value.get(key)
        if named is not None:
            first = first if named == name else len(contents)
            name, source = named, COMMAND_LINE
    return name, source, first


class _Layers:
    """The settings while layers are put on one another."""

    def __init__(self, chosen: Mapping[str, type | None], mistakes: Mistakes) -> None:
        """`chosen` has the settings class of each section that a name chooses; None where the name is wrong."""
        self._mistakes = mistakes
        self._unknown = {section for section, settings in chosen.items() if settings is None}
        self._settings, self._sections = declared_settings(chosen)
        self._references: dict[str, Any] = {}  # key -> value as written, where it refers to another setting
        self._cfg = OmegaConf.structured(Recipe)
        _unlock(self._cfg)
        for section, settings in chosen.items():
            self._cfg[section] = None if settings is None else OmegaConf.structured(settings)
        _unlock(self._cfg)

    def assign(self, key: str, value: Any, origin: str) -> None:
        """Put `value` at a dotted key such as `train.steps` or `evaluation.tasks[0].image_size`.

        A mapping given to a section is taken apart, so that each setting is checked on its own.
        """
        declared = template(key)
        if problem := self._absent_item(key):
            self._mistakes.add(key, value, problem, origin=origin)
        elif declared in self._sections:
            self._assign_section(key, value, origin)
        elif owner := self._owner(key):
            self._assign_setting(key, owner, value, origin)
        elif declared.partition(".")[0] in self._unknown:
            pass  # which settings exist is unknown; that the name which chooses them is wrong is reported already
        else:
            self._mistakes.add(key, value, f"unknown setting{nearest(key, self._settings)}", origin=origin)

    def draft(self, origin: str, how_to_set: str) -> Recipe:
        """The merged recipe. Where a mistake was found it holds a stand-in; `Mistakes.sound` tells."""
        self._check_required(origin, how_to_set)
        self._check_references()
        for key, setting in self._concrete_settings():
            if self._mistakes.sound(key):
                value = _plain(self._cfg, key)
                if not setting.is_in_range(value):
                    self._mistakes.add(key, value, f"expected {setting.expectation}")
        for key, setting in self._concrete_settings():
            if self._mistakes.is_wrong(key):
                OmegaConf.update(self._cfg, key, setting.stand_in, merge=False)
        recipe = OmegaConf.to_object(self._cfg)
        assert isinstance(recipe, Recipe)
        return recipe

    def _assign_section(self, key: str, value: Any, origin: str) -> None:
        if not isinstance(value, Mapping | None):
            example = next(name for name in self._settings if name.startswith(f"{template(key)}."))
            problem = f"expected settings below it, e.g. {example}"
            self._mistakes.add_stray(f"{key}={shown(value)}", problem, origin=origin)
            return
        for name, below in (value or {}).items():
            self.assign(f"{key}.{name}".removeprefix("."), below, origin)

    def _absent_item(self, key: str) -> str | None:
        """The mistake of an index behind the end of a list; None when all indices in `key` exist."""
        for match in re.finditer(r"\[(\d+)\]", key):
            holder = OmegaConf.select(self._cfg, key[: match.start()])
            if isinstance(holder, ListConfig) and int(match.group(1)) >= len(holder):
                return f"{key[: match.start()]} has {len(holder)} items, counted from 0"
        return None

    def _owner(self, key: str) -> Setting | None:
        """The declared setting that `key` is, or lies in (an item of a list, a name in a mapping)."""
        declared = template(key)
        if declared in self._settings:
            return self._settings[declared]
        for name, setting in self._settings.items():
            if setting.is_mapping and declared.startswith(f"{name}."):
                return setting
            if declared == f"{name}[]" and not setting.item_class:
                return setting
        return None

    def _assign_setting(self, key: str, setting: Setting, value: Any, origin: str) -> None:
        if setting.item_class and isinstance(value, list):
            self._put(key, [setting.item_class() for _ in value])
            self._mistakes.note_origin(key, origin, value)
            for index, item in enumerate(value):
                self.assign(f"{key}[{index}]", item, origin)
            return
        refers = any("${" in text for text in _texts(value))
        whole = template(key) == setting.key
        if problem := _forbidden_reference(value):
            self._mistakes.add(key, value, problem, origin=origin)
        elif not self._fits(key, setting, value, checked=whole and not refers and value != REQUIRED):
            expected = setting.expectation if whole else f"{setting.key} to be {setting.expectation}"
            self._mistakes.add(key, value, f"expected {expected}", origin=origin)
        else:
            self._mistakes.note_origin(key, origin, value)
            if whole:
                self._references.pop(key, None)
            if refers:
                self._references[key if whole else setting.key] = value

    def _fits(self, key: str, setting: Setting, value: Any, *, checked: bool) -> bool:
        """Put the value; False when its type is wrong or `key` names an item that is not there."""
        if checked and not setting.has_right_type(value):
            return False
        try:
            self._put(key, value, free_names=setting.is_mapping)
        except (OmegaConfBaseException, TypeError, AttributeError):
            return False
        return True

    def _put(self, key: str, value: Any, *, free_names: bool = False) -> None:
        OmegaConf.update(self._cfg, key, value, merge=False, force_add=free_names)
        if isinstance(value, list):
            _unlock(OmegaConf.select(self._cfg, key))

    def _concrete_settings(self) -> Iterator[tuple[str, Setting]]:
        """Every setting with real list indices in its key."""
        for name, setting in self._settings.items():
            if "[]" not in name:
                yield name, setting
                continue
            outer, _, inner = name.partition("[]")
            for index in range(len(OmegaConf.select(self._cfg, outer))):
                yield f"{outer}[{index}]{inner}", setting

    def _check_required(self, origin: str, how_to_set: str) -> None:
        for key, setting in self._concrete_settings():
            section, _, name = key.rpartition(".")
            holder = OmegaConf.select(self._cfg, section) if section else self._cfg
            if self._mistakes.sound(key) and OmegaConf.is_missing(holder, name):
                self._mistakes.add_missing(key, origin, f"{how_to_set} {key}={setting.metavar}")

    def _check_references(self) -> None:
        for key, written in self._references.items():
            try:
                _plain(self._cfg, key)
            except InterpolationToMissingValueError:
                self._mistakes.distrust(key)  # the missing setting is reported itself
            except OmegaConfBaseException:
                self._mistakes.add(key, written, self._reference_problem(key, written))

    def _reference_problem(self, key: str, written: Any) -> str:
        for name in _INSIDE_REFERENCE.findall(" ".join(_texts(written))):
            if name not in self._settings:
                return f"unknown setting in ${{{name}}}{nearest(name, self._settings)}"
        return f"what it refers to is not {self._settings[template(key)].expectation}"


def _unlock(node: Any) -> None:
    """Let values be put into nodes made from frozen dataclasses."""
    if isinstance(node, DictConfig | ListConfig):
        OmegaConf.set_readonly(node, False)
        names: Iterable[Any] = node.keys() if isinstance(node, DictConfig) else range(len(node))
        for name in names:
            _unlock(node._get_node(name))


def _plain(cfg: Container, key: str) -> Any:
    """The value at `key` with references followed, as plain Python."""
    value = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(value, resolve=True) if isinstance(value, Container) else value


def _texts(value: Any) -> Iterator[str]:
    """All texts inside a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for below in value.values():
            yield from _texts(below)
    elif isinstance(value, list):
        for below in value:
            yield from _texts(below)


def _forbidden_reference(value: Any) -> str | None:
    """Why a reference is refused: resolvers such as oc.env would put one machine's secrets into shared records."""
    for text in _texts(value):
        if "${" in _REFERENCE.sub("", text):
            return "only references to other settings such as ${data.root} are allowed"
    return None
