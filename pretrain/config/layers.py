"""Layers of settings put on one another: defaults, files, the command line. The result is one checked `Recipe`.

Every setting is applied on its own through OmegaConf, so that each mistake is found and all are reported together.
Which settings there are depends on two names, the objective's and the kind of backbone, so those are read first.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from omegaconf import Container, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, OmegaConfBaseException

from backbones import registry as backbones
from backbones.errors import BackboneError
from data_pipelines.storage.locations import scheme_of
from objectives import registry as objectives
from pretrain.config.checks.resolve import resolve
from pretrain.config.fields import Setting, declared_settings, template
from pretrain.config.mistakes import COMMAND_LINE, Mistakes, shown
from pretrain.config.schema import REQUIRED, Recipe
from pretrain.config.values import Typed, texts_in
from pretrain.errors import nearest
from pretrain.screen import control_character

__all__ = ["REFERENCE_IN_A_NAME", "resolved"]

# What settings are called elsewhere, by the last part of a key that is not one of ours.
HABITS = {
    **dict.fromkeys(("gpus", "num_gpus", "n_gpus", "devices", "gpus_per_node"), "cluster.gpus_per_worker"),
    **dict.fromkeys(("epochs", "num_epochs", "max_epochs", "n_epochs", "num_train_epochs"), "train.epochs"),
    **dict.fromkeys(("batch_size", "batch", "bs", "train_batch_size", "total_batch_size"), "train.global_batch_size"),
    **dict.fromkeys(("batch_size_per_gpu", "per_device_train_batch_size"), "train.micro_batch_size"),
    **dict.fromkeys(("grad_accum", "accum_iter", "gradient_accumulation_steps"), "train.accumulation"),
    **dict.fromkeys(("lr", "learning_rate"), "optimizer.lr"),
    **dict.fromkeys(("blr", "base_learning_rate"), "optimizer.base_lr"),
    **dict.fromkeys(("wd", "weight_decay"), "optimizer.weight_decay"),
    **dict.fromkeys(("warmup", "warmup_steps"), "optimizer.warmup_steps"),
    **dict.fromkeys(("warmup_epochs",), "optimizer.warmup_epochs"),
    **dict.fromkeys(("max_steps", "num_steps", "iterations", "iters"), "train.steps"),
    **dict.fromkeys(("save_every", "save_freq", "save_steps"), "train.checkpoint_every"),
    **dict.fromkeys(("num_workers", "dataloader_num_workers"), "data.loader_workers"),
    **dict.fromkeys(("nproc", "nproc_per_node", "world_size"), "train.workers"),
    **dict.fromkeys(("img_size", "input_size", "image_size"), "backbone.image_size"),
    **dict.fromkeys(("model", "arch", "encoder"), "backbone.name"),
    **dict.fromkeys(("data_path", "data_dir", "dataset", "train_dir"), "data.train"),
    **dict.fromkeys(("output_dir", "save_dir", "log_dir"), "storage"),
    **dict.fromkeys(("fp16", "bf16", "amp", "dtype"), "train.precision"),
    "allow_tf32": "train.tf32",
    "objective.window": "backbone.voxel_window",  # `data.window` is something else
}
# What may be counted in passes over the data, and what it is in steps.
IN_EPOCHS = {
    "train.epochs": "train.steps",
    "train.checkpoint_every_epochs": "train.checkpoint_every",
    "optimizer.warmup_epochs": "optimizer.warmup_steps",
}
# What takes a list of two as well: the settings of its section that these stand for, in their order, and their names.
PAIRS = {
    "train.workers": {"min_workers": "FEWEST", "workers": "MOST"},
    "evaluation.tasks[].image_size": {"image_size": "HEIGHT", "image_width": "WIDTH"},
}
REFERENCE_IN_A_NAME = "what has ${ in its own name has to be renamed, or reached through a link"
_INSIDE_REFERENCE = re.compile(r"\$\{([^}]*)\}")
_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\}")


def resolved(
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
    return resolve(draft, mistakes, check_files=check_files)


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
    name, name_source, first_named = _named("backbone", "name", None, contents, pairs)
    by_name = backbones.has_settings_by_name(str(kind))
    try:
        return backbones.config_class(str(kind), name), max(first, first_named) if by_name else first
    except BackboneError as error:
        key, value, origin = ("name", name, name_source) if by_name else ("kind", kind, source)
        mistakes.add(f"backbone.{key}", value, str(error), origin=origin)
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
        named = None
        if given == f"{section}.{key}":
            named = value.as_text if isinstance(value, Typed) else value
        elif given == section:
            settings = value.value if isinstance(value, Typed) else value
            named = settings.get(key) if isinstance(settings, Mapping) else None
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

        A mapping given to a section is taken apart, so that each setting is checked on its own. What was typed is read
        as its setting wants it: a text as it stands, all else as YAML.
        """
        declared, written = template(key), value
        if isinstance(value, Typed):
            owner = self._owner(key)
            if owner is not None and owner.takes_text(declared):
                value = value.as_text
            elif value.problem is not None and (owner is not None or declared in self._sections):
                self._mistakes.add(key, value, value.problem, origin=origin)
                return
            else:
                value = value.text if value.problem is not None else value.value
        if problem := self._absent_item(key):
            self._mistakes.add(key, written, problem, origin=origin)
        elif declared in PAIRS and self._assign_pair(key, PAIRS[declared], value, origin, written):
            pass
        elif declared in self._sections:
            self._assign_section(key, value, origin)
        elif owner := self._owner(key):
            self._assign_setting(key, owner, value, origin, written)
        elif declared.partition(".")[0] in self._unknown:
            pass  # which settings exist is unknown; that the name which chooses them is wrong is reported already
        else:
            self._mistakes.add(key, written, f"unknown setting{self._meant(key)}", origin=origin)

    def _assign_pair(self, key: str, parts: Mapping[str, str], value: Any, origin: str, written: Any) -> bool:
        """Take a list of two apart; a plain number takes back the other one of an earlier layer."""
        section, _, own = key.rpartition(".")
        (other,) = (f"{section}.{name}" for name in parts if name != own)
        if isinstance(value, list) and len(value) == 2:
            numbers = {f"{section}.{name}": (number, parts[name]) for name, number in zip(parts, value, strict=True)}
            for one in (key, other):
                number, part = numbers[one]
                self._mistakes.note_part(one, number, f"{key}={shown(written)}: {part}={shown(number)}")
                self.assign(one, number, origin)
            return True
        if self._mistakes.is_given(other) and self._mistakes.origin(other) != origin:
            self.assign(other, None, origin)
        return False

    def draft(self, origin: str, how_to_set: str) -> Recipe:
        """The merged recipe. Where a mistake was found it holds a stand-in; `Mistakes.sound` tells."""
        self._settle_epochs()
        self._check_required(origin, how_to_set)
        self._check_references(how_to_set)
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

    def _meant(self, key: str) -> str:
        """The hint for a setting that there is not: what other tools call it, or the closest name of its section."""
        declared = template(key)
        section, _, name = declared.rpartition(".")
        if (meant := HABITS.get(declared) or HABITS.get(name)) in self._settings and meant != declared:
            return f"; did you mean '{meant}'?"
        if section == "objective" and (others := _objectives_with(name)):
            *first, last = others
            return f"; it is a setting of {', '.join(first)}{' and ' if first else ''}{last}"
        same_name = [known for known in self._settings if known.rpartition(".")[2] == name and "[]" not in known]
        if same_name:
            return f"; did you mean '{same_name[0]}'?"
        inside = {known.rpartition(".")[2]: known for known in self._settings if known.rpartition(".")[0] == section}
        close = difflib.get_close_matches(name, inside, n=1, cutoff=0.6)
        close = close or [known for known in inside if known.startswith(f"{name}_")]  # `mask` for `mask_ratio`
        if close:
            return f"; did you mean '{inside[close[0]]}'?"
        return "" if inside else nearest(key, self._settings)

    def _absent_item(self, key: str) -> str | None:
        """The mistake of an index behind the end of a list; None when all indices in `key` exist."""
        for match in re.finditer(r"\[(\d+)\]", key):
            holder = OmegaConf.select(self._cfg, key[: match.start()])
            digits = match.group(1)
            if isinstance(holder, ListConfig) and (len(digits) > 9 or int(digits) >= len(holder)):
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

    def _assign_setting(self, key: str, setting: Setting, value: Any, origin: str, written: Any) -> None:
        if setting.item_class and isinstance(value, list):
            self._put(key, [setting.item_class() for _ in value])
            self._mistakes.note_origin(key, origin, written)
            for index, item in enumerate(value):
                self.assign(f"{key}[{index}]", item, origin)
            return
        refers = any("${" in text for _, text in texts_in(value))
        whole = template(key) == setting.key
        if problem := _forbidden_reference(value) or _control_character(value):
            self._mistakes.add(key, written, problem, origin=origin)
        elif not self._fits(key, setting, value, checked=whole and not refers and value != REQUIRED):
            expected = setting.expectation if whole else f"{setting.key} to be {setting.expectation}"
            self._mistakes.add(key, written, f"expected {expected}", origin=origin)
        else:
            self._mistakes.note_origin(key, origin, written)
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
        except (OmegaConfBaseException, TypeError, AttributeError, ValueError, OverflowError):
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

    def _settle_epochs(self) -> None:
        """Of a count in steps and the same one in epochs, that of the later layer counts."""
        for epochs, steps in IN_EPOCHS.items():
            if OmegaConf.select(self._cfg, epochs) is None or not self._mistakes.sound(epochs):
                continue
            given = self._mistakes.is_given(steps) and OmegaConf.select(self._cfg, steps) is not None
            if given and self._mistakes.origin(steps) == self._mistakes.origin(epochs):
                problem = f"{steps} is given too and only one can count; leave one of them out"
                self._mistakes.add(epochs, OmegaConf.select(self._cfg, epochs), problem)
            elif given and self._mistakes.latest(steps, epochs) == steps:
                OmegaConf.update(self._cfg, epochs, None)
            else:  # until the data are counted, in `pretrain.config.checks.data`
                self._mistakes.forget(steps)
                OmegaConf.update(self._cfg, steps, 0 if steps == "optimizer.warmup_steps" else 1)

    def _check_required(self, origin: str, how_to_set: str) -> None:
        for key, setting in self._concrete_settings():
            section, _, name = key.rpartition(".")
            holder = OmegaConf.select(self._cfg, section) if section else self._cfg
            if self._mistakes.sound(key) and OmegaConf.is_missing(holder, name):
                self._mistakes.add_missing(key, origin, f"{how_to_set} {key}={setting.metavar}")

    def _check_references(self, how_to_set: str) -> None:
        # A reference that leads to a wrong one is no mistake of its own.
        for key, written in sorted(self._references.items(), key=lambda item: not self._unknown_inside(item[1])):
            try:
                if (absent := self._null_inside(written)) is not None:
                    if not self._mistakes.is_wrong(absent):
                        remedy = f"{how_to_set} {absent}={self._settings[absent].metavar}"
                        self._mistakes.add_missing(absent, self._mistakes.origin(absent), remedy)
                    self._mistakes.distrust(key)
                else:
                    _plain(self._cfg, key)
            except InterpolationToMissingValueError:
                self._mistakes.distrust(key)  # the missing setting is reported itself
            except OmegaConfBaseException:
                if any(self._mistakes.is_wrong(name) for name in _named_inside(written)):
                    self._mistakes.distrust(key)
                else:
                    self._mistakes.add(key, written, self._reference_problem(key, written))

    def _null_inside(self, written: Any) -> str | None:
        """The setting that is null, though a text wants to have it as a part, or a mapping as a value."""
        for _, text in texts_in(written):
            for name in _named_inside(text):
                is_part = text != f"${{{name}}}" or not isinstance(written, str)
                if is_part and name in self._settings and OmegaConf.select(self._cfg, name) is None:
                    return name
        return None

    def _unknown_inside(self, written: Any) -> list[str]:
        """Names in references that are none of a setting."""
        return [name for name in _named_inside(written) if name not in self._settings]

    def _reference_problem(self, key: str, written: Any) -> str:
        for name in self._unknown_inside(written):
            near = nearest(name, self._settings) or f"; {REFERENCE_IN_A_NAME}"
            return f"unknown setting in ${{{name}}}{near}"
        return f"what it refers to is not {self._settings[template(key)].expectation}"


def _objectives_with(name: str) -> list[str]:
    """The objectives of this package that have a setting of that name."""
    return [
        known
        for known in objectives.built_in_names()
        if name in [field.name for field in fields(objectives.config_class(known))]
    ]


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


def _named_inside(value: Any) -> list[str]:
    """What the references in a value name."""
    return _INSIDE_REFERENCE.findall(" ".join(text for _, text in texts_in(value)))


def _control_character(value: Any) -> str | None:
    """Why a text with an end of line or the like is refused: hardly any is meant, and it would be in names of files.

    A command that makes shards is read by a shell, which takes them.
    """
    for _, text in texts_in(value):
        if scheme_of(text) != "pipe" and (character := control_character(text)):
            return f"{character} is in it, a control character; leave it out"
    return None


def _forbidden_reference(value: Any) -> str | None:
    """Why a text with `${` is refused: resolvers such as oc.env would put one machine's secrets into shared records."""
    for _, text in texts_in(value):
        if "${" in _REFERENCE.sub("", text):
            return f"only references to other settings such as ${{data.root}} are allowed; {REFERENCE_IN_A_NAME}"
    return None
