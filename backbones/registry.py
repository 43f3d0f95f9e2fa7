"""Encoders by kind and name: images through timm's models, and what other installed packages add. Imports no torch.

A recipe's `backbone.kind` chooses the class and its settings, as `objective.name` does for objectives; "image" is built
in. An entry point of a plug-in, in the group `pretrain.backbones`, is one of two things:

    a subclass of `backbones.encoder.Encoder`   a kind of its own; the entry's name is the kind
    a function that builds a network            one more name of kind "image", see `backbones.images.build`

NOT here: how an image encoder is built (`backbones.images.build`), weights (`backbones.io`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Literal, overload

from backbones.errors import BackboneError, suggest
from backbones.images.config import ImageConfig
from backbones.images.timm_names import plugins
from backbones.plugins import load_entry, origin

if TYPE_CHECKING:
    from backbones.encoder import Encoder
    from backbones.images.base import ImageEncoder

__all__ = ["IMAGE", "config_class", "create_backbone", "encoder_class", "from_config", "from_spec", "kinds"]

IMAGE = "image"


def kinds() -> tuple[str, ...]:
    """All known kinds; this imports every plug-in of backbones, so it is for messages only.

    Raises:
        BackboneError: a plug-in cannot be imported.
    """
    loaded = {name: load_entry(entry, "backbone", BackboneError) for name, entry in plugins().items()}
    return (IMAGE, *sorted(name for name, found in loaded.items() if _is_encoder(found)))


def config_class(kind: str) -> type:
    """The dataclass of the settings of a kind; for a plug-in it is `Class.Config`, which imports the plug-in.

    Raises:
        BackboneError: as for `encoder_class`.
    """
    return ImageConfig if kind == IMAGE else encoder_class(kind).Config


def encoder_class(kind: str) -> type[Encoder]:
    """The class of encoders of a kind.

    Raises:
        BackboneError: unknown kind, or a plug-in that cannot be imported or is no encoder.
    """
    if kind == IMAGE:
        from backbones.images.base import ImageEncoder

        return ImageEncoder
    entry = plugins().get(kind)
    if entry is None:
        known = kinds()
        raise BackboneError(f"unknown kind of backbone; known are {', '.join(known)}{suggest(kind, known)}")
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
    return encoder_class(kind)(_config(kind, {"name": name, **settings}))


def from_config(config: Any) -> Encoder:
    """The randomly initialized backbone that a recipe's settings ask for: an instance of the kind's `Config`.

    Raises:
        BackboneError: as for `create_backbone`.
    """
    if config.kind == IMAGE:
        settings = {entry.name: getattr(config, entry.name) for entry in fields(config)}
        return create_backbone(**settings)
    return encoder_class(config.kind)(config)


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
    if kind not in plugins():
        raise BackboneError(
            f"backbones of kind {kind!r} are not installed here; they are the plug-in {spec['library']}, so install "
            f"the package with the module {spec['library'].partition(':')[0].partition('.')[0]}"
        )
    return encoder_class(kind)(_config(kind, spec["settings"]))


def _config(kind: str, settings: Mapping[str, Any]) -> Any:
    try:
        return config_class(kind)(**settings)
    except TypeError as error:
        raise BackboneError(f"backbone of kind {kind!r}: {error}") from error


def _is_encoder(found: Any) -> bool:
    """Whether what an entry point names is a class of encoders; what is none need not have imported torch."""
    from backbones.encoder import Encoder

    return isinstance(found, type) and issubclass(found, Encoder)


def _check_plugin(entry: EntryPoint, found: Any) -> None:
    """Refuses what is no encoder of its kind, before anything fails in a stranger way.

    Raises:
        BackboneError: it is a function for images, has another kind, or its `Config` is not a dataclass with kind and
            name.
    """
    where = f"backbone {entry.name!r}: {origin(entry)}"
    if not _is_encoder(found):
        raise BackboneError(f"{where} builds image encoders and is no kind; set backbone.name={entry.name} instead")
    if getattr(found, "kind", None) != entry.name:
        raise BackboneError(f"{where} is of kind {getattr(found, 'kind', None)!r}; name its entry point like its kind")
    config = getattr(found, "Config", None)
    settings = {field.name for field in fields(config)} if is_dataclass(config) else set()
    if not {"kind", "name"} <= settings:
        raise BackboneError(
            f"{where} needs a class attribute Config: a dataclass of its settings, with kind: str and name: str"
        )
