"""Encoders by kind and name: built in, and what other installed packages add. Imports no torch.

A recipe's `backbone.kind` says what is encoded, its `backbone.name` which encoder of that kind it is: of images any of
timm's models, of the other built-in kinds one of a few classes below `backbones/`, each with settings of its own. An
entry point of a plug-in, in the group `pretrain.backbones`, is one of three things:

    a function that builds a network            one more name of kind "image", see `backbones.images.build`
    a subclass of `backbones.encoder.Encoder`   of a built-in kind, say "points": one more name of it, the entry's
                                                of another kind: that kind, which the entry is named for

NOT here: how an image encoder is built (`backbones.images.build`), weights (`backbones.io`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, overload

from backbones.errors import BackboneError, suggest
from backbones.images.config import ImageConfig
from backbones.images.timm_names import plugins
from backbones.plugins import load_entry, origin

if TYPE_CHECKING:
    from backbones.encoder import Encoder
    from backbones.images.base import ImageEncoder

__all__ = [
    "IMAGE",
    "config_class",
    "create_backbone",
    "encoder_class",
    "from_config",
    "from_spec",
    "has_settings_by_name",
    "kinds",
    "names_of_kind",
]

IMAGE = "image"


class _BuiltIn(NamedTuple):
    """Where an encoder of this package is, as "module:Class"; its settings import no torch."""

    config: str
    encoder: str


# kind -> name -> encoder
_BUILT_IN: dict[str, dict[str, _BuiltIn]] = {
    "voxels": {
        "unified_vit": _BuiltIn("backbones.voxels.config:UnifiedVitConfig", "backbones.voxels.unified:UnifiedVit"),
        "voxel_swin": _BuiltIn("backbones.voxels.config:VoxelSwinConfig", "backbones.voxels.swin:VoxelSwin"),
        "voxel_vit": _BuiltIn("backbones.voxels.config:VoxelVitConfig", "backbones.voxels.vit:VoxelVit"),
    },
    "points": {
        "point_transformer": _BuiltIn(
            "backbones.points.config:PointTransformerConfig", "backbones.points.transformer:PointTransformer"
        )
    },
}


def kinds() -> tuple[str, ...]:
    """All known kinds; this imports every plug-in of backbones, so it is for messages only.

    Raises:
        BackboneError: a plug-in cannot be imported.
    """
    added = {getattr(found, "kind", name) for name, found in _encoder_plugins().items()}
    return (IMAGE, *sorted(_BUILT_IN.keys() | added))


def names_of_kind(kind: str) -> tuple[str, ...]:
    """Names of the encoders of a built-in kind other than "image", plug-ins (which this imports) included.

    Raises:
        BackboneError: a plug-in cannot be imported.
    """
    added = {name for name, found in _encoder_plugins().items() if getattr(found, "kind", None) == kind}
    return tuple(sorted(_BUILT_IN[kind].keys() | added))


def has_settings_by_name(kind: str) -> bool:
    """Whether encoders of a kind differ in their settings, so that the name chooses these."""
    return kind in _BUILT_IN


def config_class(kind: str, name: str | None = None) -> type:
    """The dataclass of the settings of an encoder; for a plug-in it is `Class.Config`, which imports the plug-in.

    Raises:
        BackboneError: as for `encoder_class`.
    """
    if kind == IMAGE:
        return ImageConfig
    built_in = _BUILT_IN.get(kind, {}).get(name or "")
    return _found(built_in.config) if built_in else encoder_class(kind, name).Config


def encoder_class(kind: str, name: str | None = None) -> type[Encoder]:
    """The class of an encoder.

    Args:
        kind: what it encodes.
        name: which of a built-in kind; a kind that a plug-in adds has one class.

    Raises:
        BackboneError: unknown kind or name, or a plug-in that cannot be imported or is no encoder.
    """
    if kind == IMAGE:
        from backbones.images.base import ImageEncoder

        return ImageEncoder
    if kind in _BUILT_IN:
        return _named(kind, name)
    entry = plugins().get(kind)
    if entry is None:
        known = kinds()
        raise BackboneError(f"unknown kind of backbone; known are {', '.join(known)}{suggest(kind, known)}")
    found = load_entry(entry, "backbone", BackboneError)
    _check_plugin(entry, found)
    if found.kind != entry.name:
        raise BackboneError(
            f"backbone {entry.name!r}: {origin(entry)} is of kind {found.kind!r}; name its entry point like its kind"
        )
    return found


def _named(kind: str, name: str | None) -> type[Encoder]:
    """The encoder of that name of a built-in kind other than "image"."""
    built_in, entry = _BUILT_IN[kind].get(name or ""), plugins().get(name or "")
    if built_in is not None:
        return _found(built_in.encoder)
    known = names_of_kind(kind)
    if entry is None or name not in known:
        what = f"unknown backbone {name!r}" if name else "a name is missing"
        hint = suggest(name, known) if name else ""
        raise BackboneError(f"{what} of kind {kind!r}; known are {', '.join(known)}{hint}")
    found = load_entry(entry, "backbone", BackboneError)
    _check_plugin(entry, found)
    return found


@overload
def create_backbone(name: str, *, kind: Literal["image"] = ..., **settings: Any) -> ImageEncoder: ...
@overload
def create_backbone(name: str, *, kind: str, **settings: Any) -> Encoder: ...
def create_backbone(name: str, *, kind: str = IMAGE, **settings: Any) -> Encoder:
    """A randomly initialized backbone; draws from torch's global generator.

    Args:
        name: a model of that kind.
        kind: what it encodes.
        settings: of images, those of `backbones.images.build.create_image_encoder`; of another kind, the fields of its
            `Config`.

    Raises:
        BackboneError: unknown kind or name, or settings that the model does not take.
    """
    if kind == IMAGE:
        from backbones.images.build import create_image_encoder

        return create_image_encoder(name, **settings)
    return encoder_class(kind, name)(_config(kind, {"name": name, **settings}))


def from_config(config: Any) -> Encoder:
    """The randomly initialized backbone that a recipe's settings ask for: an instance of the kind's `Config`.

    Raises:
        BackboneError: as for `create_backbone`.
    """
    if config.kind == IMAGE:
        settings = {entry.name: getattr(config, entry.name) for entry in fields(config)}
        return create_backbone(**settings)
    return encoder_class(config.kind, config.name)(config)


def from_spec(spec: Mapping[str, Any]) -> Encoder:
    """The architecture that `Encoder.spec` describes, with random weights.

    Args:
        spec: of an image encoder also its name alone: timm's model of that name, as it was pretrained.

    Raises:
        BackboneError: a key is missing or unknown, or the model is not available here.
    """
    kind = spec.get("kind", IMAGE)
    if kind == IMAGE:
        from backbones.images.build import image_encoder_from_spec, pretrained_image_encoder

        if spec.keys() <= {"kind", "name"}:
            return pretrained_image_encoder(spec["name"])
        return image_encoder_from_spec(spec)
    expected = {"kind", "library", "name", "settings"}
    if spec.keys() != expected:
        raise BackboneError(f"backbone spec has keys {sorted(spec)}, expected {sorted(expected)}")
    name = spec["settings"].get("name")
    entry = name if kind in _BUILT_IN else kind
    if entry not in _BUILT_IN.get(kind, {}) and entry not in plugins():
        raise BackboneError(
            f"backbone {name!r} of kind {kind!r} is not installed here; it is the plug-in {spec['library']}, so "
            f"install the package with the module {spec['library'].partition(':')[0].partition('.')[0]}"
        )
    return encoder_class(kind, name)(_config(kind, spec["settings"]))


def _config(kind: str, settings: Mapping[str, Any]) -> Any:
    try:
        return config_class(kind, settings.get("name"))(**settings)
    except TypeError as error:
        raise BackboneError(f"backbone of kind {kind!r}: {error}") from error


def _found(place: str) -> Any:
    """What "module:Class" names."""
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)


def _encoder_plugins() -> dict[str, Any]:
    """The plug-ins that are classes of encoders, by the names of their entry points; this imports all of them."""
    loaded = {name: load_entry(entry, "backbone", BackboneError) for name, entry in plugins().items()}
    return {name: found for name, found in loaded.items() if _is_encoder(found)}


def _is_encoder(found: Any) -> bool:
    """Whether what an entry point names is a class of encoders; what is none need not have imported torch."""
    from backbones.encoder import Encoder

    return isinstance(found, type) and issubclass(found, Encoder)


def _check_plugin(entry: EntryPoint, found: Any) -> None:
    """Refuses what is no encoder of its kind, before anything fails in a stranger way.

    Raises:
        BackboneError: it is a function for images, says no kind, or its `Config` is not a dataclass with kind and
            name.
    """
    where = f"backbone {entry.name!r}: {origin(entry)}"
    if not _is_encoder(found):
        raise BackboneError(f"{where} builds image encoders and is no kind; set backbone.name={entry.name} instead")
    if not hasattr(found, "kind"):
        raise BackboneError(f"{where} needs a class attribute kind: what it encodes")
    config = getattr(found, "Config", None)
    settings = {field.name for field in fields(config)} if is_dataclass(config) else set()
    if not {"kind", "name"} <= settings:
        raise BackboneError(
            f"{where} needs a class attribute Config: a dataclass of its settings, with kind: str and name: str"
        )
