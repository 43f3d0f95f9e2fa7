"""Image encoders by name: timm's registered models and networks of other installed packages.

The entry point of a plug-in is a function that builds a network for the keywords `img_size`, `patch_size` and
`in_chans` and the recipe's `options`. The network needs two of timm's methods: `forward_features(x)`, which gives what
`backbones.images.timm_model` understands, and `group_matcher(coarse)`, which says how deep each parameter lies.
NOT here: other kinds of encoders (`backbones.registry`); pretrained weights (`backbones.io` loads ours; nothing is
downloaded).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from backbones.encoder import Encoder
from backbones.errors import BackboneError, suggest
from backbones.images.base import ImageEncoder
from backbones.images.config import IMAGENET_MEAN, IMAGENET_STD
from backbones.images.initialization import initialize
from backbones.images.timm_internals import is_plain_vit
from backbones.images.timm_model import TimmBackbone, token_size
from backbones.images.timm_names import model_names, plugins
from backbones.images.vit import ViTBackbone
from backbones.plugins import load_entry

__all__ = ["create_image_encoder", "image_encoder_from_spec", "pretrained_image_encoder"]

# timm source files whose `patch_size` is that of the output tokens; the others' stages may shrink the grid further.
_PLAIN_FAMILIES = {"vision_transformer", "deit", "eva"}
# Set by `create_image_encoder` itself, so a recipe's `options` may not.
_RESERVED = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": None,
    "global_pool": None,
    "dynamic_img_size": None,
    "dynamic_img_pad": None,
    "strict_img_size": None,
    "pretrained": None,
}
_PLUGIN_METHODS = ("forward_features", "group_matcher")


def create_image_encoder(
    name: str,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    options: Mapping[str, Any] | None = None,
    pixel_mean: Sequence[float] = IMAGENET_MEAN,
    pixel_std: Sequence[float] = IMAGENET_STD,
    position_resampling: str = "timm",
    init: str = "timm",
) -> ImageEncoder:
    """A randomly initialized image encoder; draws from torch's global generator, as timm does.

    Args:
        name: one of `backbones.images.timm_names.model_names()`; timm's may be followed by the tag of a pretrained
            variant, whose sizes it then has.
        image_size: pixels per side; None takes the model's own.
        patch_size: pixels per side of an output token; None takes the model's own. Swin's stem has patches of an eighth
            of it. Many models have no choice.
        in_chans: channels of the images.
        options: further arguments of the timm model, for example `{"depth": 6, "embed_dim": 192, "reg_tokens": 4}`.
        pixel_mean, pixel_std: per channel, for pixels in [0, 1].
        position_resampling: how a plain ViT's absolute positions follow images of another size, see
            `backbones.images.positions`.
        init: initial weights by name, see `backbones.images.initialization`.

    Returns:
        A `ViTBackbone` for a plain ViT, else a `TimmBackbone`.

    Raises:
        BackboneError: unknown name, an argument that the model does not take, or a model that yields no patches.
    """
    options = dict(options or {})
    _check_options(name, options)
    library, build = _find(name)
    arguments = {**options, **_patch_argument(name, build, patch_size), "in_chans": in_chans}
    model = _built(name, build, arguments, image_size)
    described: dict[str, Any] = {
        "library": library, "name": name, "options": options, "pixel_mean": pixel_mean, "pixel_std": pixel_std,
    }  # fmt: skip
    backbone: ImageEncoder
    if is_plain_vit(model):
        backbone = ViTBackbone(model, **described, position_resampling=position_resampling)
    elif position_resampling != "timm":
        raise BackboneError(f"backbone {name!r} is not a plain ViT, so position_resampling is timm's only")
    else:
        size = _own_image_size(name, model) if image_size is None else image_size
        backbone = TimmBackbone(model, **described, image_size=size, in_chans=in_chans)
    if patch_size not in (None, backbone.patch_size):
        raise BackboneError(
            f"backbone {name!r} has tokens of {backbone.patch_size} px; leave out patch_size {patch_size}"
        )
    initialize(backbone, init)
    return backbone


def image_encoder_from_spec(spec: Mapping[str, Any]) -> ImageEncoder:
    """The architecture that `ImageEncoder.spec` describes, with random weights.

    Raises:
        BackboneError: a key is missing or unknown, or the model is not available here.
    """
    expected = {"library", "name", "image_size", "patch_size", "in_chans", "options", "pixel_mean", "pixel_std"}
    if spec.keys() - {"position_resampling"} != expected:
        raise BackboneError(f"backbone spec has keys {sorted(spec)}, expected {sorted(expected)}")
    if spec["library"] != "timm" and spec["name"] not in plugins():
        raise BackboneError(
            f"backbone {spec['name']!r} is not installed here; it is the plug-in {spec['library']}, so install the "
            f"package with the module {spec['library'].partition(':')[0].partition('.')[0]}"
        )
    return create_image_encoder(**{key: value for key, value in spec.items() if key != "library"})


def pretrained_image_encoder(name: str) -> ImageEncoder:
    """timm's model of this name for the images that its weights were trained on: their size, mean and deviation.

    The weights are random.

    Raises:
        BackboneError: timm has no such model, or cannot say what its images are.
    """
    import timm

    if name.partition(".")[0] not in model_names() or name in plugins():
        raise BackboneError(f"backbone {name!r} is no model of timm's{suggest(name, model_names())}")
    facts = timm.models.get_pretrained_cfg(name)
    if facts is None:
        raise BackboneError(f"timm does not say what images its model {name!r} was trained on")
    return create_image_encoder(
        name, in_chans=facts.input_size[0], pixel_mean=list(facts.mean), pixel_std=list(facts.std)
    )


def _check_options(name: str, options: Mapping[str, Any]) -> None:
    """Refuses options that would be overruled or have no effect.

    Raises:
        BackboneError: naming the first one.
    """
    for key in sorted(_RESERVED.keys() & options.keys()):
        remedy = f"use backbone.{_RESERVED[key]}" if _RESERVED[key] else "leave it out"
        raise BackboneError(f"backbone {name!r}: option {key!r} is set by the platform; {remedy}")
    if options.get("patch_drop_rate"):
        raise BackboneError(
            f"backbone {name!r}: option 'patch_drop_rate' {options['patch_drop_rate']} has no effect, because the "
            "objective chooses the patches that run (objective.mask_ratio of mae); leave it out"
        )


def _find(name: str) -> tuple[str, Callable[..., nn.Module]]:
    """Where `name` comes from ("timm", or the plug-in's MODULE:FUNCTION) and the function that builds it."""
    if name in plugins():
        build = load_entry(plugins()[name], "backbone", BackboneError)
        if isinstance(build, type) and issubclass(build, Encoder):
            raise BackboneError(f"backbone {name!r} does not encode images; set backbone.kind={build.kind}")
        return plugins()[name].value, build
    if name.partition(".")[0] not in model_names():
        hint = suggest(name, model_names()) or "; timm.list_models() lists all"
        raise BackboneError(f"backbone {name!r} is not known{hint}")
    import timm  # here, because a rejected name need not pay for it

    return "timm", partial(timm.create_model, name)


def _built(name: str, build: Callable[..., nn.Module], arguments: dict[str, Any], image_size: int | None) -> nn.Module:
    """The model without classifier. What not every model takes is left out for those that do not.

    Raises:
        BackboneError: it does not take the arguments, or what is built is no encoder.
    """
    optional: dict[str, Any] = {
        "num_classes": 0, "global_pool": "", "dynamic_img_size": True, "strict_img_size": False,
    }  # fmt: skip
    if image_size is not None:
        optional["img_size"] = image_size  # convolutional models take images of any size and no such argument
    if name in plugins() and "patch_size" in arguments:
        optional["patch_size"] = arguments["patch_size"]
        arguments = {key: value for key, value in arguments.items() if key != "patch_size"}
    while True:
        try:
            model = build(**optional, **arguments)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            unexpected = re.search(r"unexpected keyword argument(?:\(s\): \[| )'(\w+)'", str(error))
            refused = unexpected[1] if unexpected else "global_pool"  # some check its value, in ways of their own
            if refused in optional:
                del optional[refused]
                continue
            shown = arguments if image_size is None else {"img_size": image_size, **arguments}
            given = ", ".join(f"{key}={value!r}" for key, value in shown.items())
            reason = " ".join(str(error).split())
            raise BackboneError(f"backbone {name!r} cannot be built with {given}: {reason}") from error
        _check_plugin(name, model)
        return model


def _check_plugin(name: str, model: nn.Module) -> None:
    """Refuses what a plug-in may have built by mistake, before it fails somewhere else.

    Raises:
        BackboneError: it lacks a method that every backbone needs.
    """
    lacking = [method for method in _PLUGIN_METHODS if not callable(getattr(model, method, None))]
    if name in plugins() and lacking:
        raise BackboneError(f"backbone {name!r} is a {type(model).__name__} without {' and '.join(lacking)}")


def _patch_argument(name: str, build: Callable[..., nn.Module], patch_size: int | None) -> dict[str, int]:
    """timm's `patch_size`, with which the output tokens are `patch_size` pixels wide; empty where it need not be given.

    Raises:
        BackboneError: the stages of the model shrink the grid by a factor that does not divide the size.
    """
    if patch_size is None:
        return {}
    if name in plugins() or _family(name) in _PLAIN_FAMILIES:
        return {"patch_size": patch_size}
    with torch.device("meta"):  # shapes only: no memory, no random numbers
        model = build(num_classes=0)
    own = token_size(model)
    if own is None or patch_size == own:
        return {}
    stem = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    if stem is None:
        parameter = inspect.signature(type(model).__init__).parameters.get("patch_size")
        stem = None if parameter is None else parameter.default
    stem = stem[0] if isinstance(stem, tuple) and len(set(stem)) == 1 else stem
    if not isinstance(stem, int) or own % stem or stem == 1:
        raise BackboneError(
            f"backbone {name!r} has tokens of {own} px and no other choice; leave out patch_size {patch_size}"
        )
    factor = own // stem
    if patch_size % factor:
        raise BackboneError(
            f"backbone {name!r}: patch_size {patch_size} is not a multiple of {factor}, by which its stages "
            "shrink the grid"
        )
    return {"patch_size": patch_size // factor}


def _family(name: str) -> str:
    import timm

    return timm.models.model_entrypoint(name.partition(".")[0]).__module__.rpartition(".")[2]


def _own_image_size(name: str, model: nn.Module) -> int:
    """The image side that timm gives the model.

    Raises:
        BackboneError: timm gives none, or not a square.
    """
    settings = getattr(model, "pretrained_cfg", None) or {}
    height, width = tuple(settings.get("input_size") or (0, 0, 0))[1:]
    if not height or height != width:
        raise BackboneError(f"backbone {name!r} has no square image size of its own; give image_size")
    return int(height)
