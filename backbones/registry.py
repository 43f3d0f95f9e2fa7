"""Backbones by name: timm's registered ViTs and those of other installed packages.

NOT here: pretrained weights (`backbones.io` loads ours; nothing is downloaded).
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from backbones.errors import BackboneError
from backbones.names import model_names, plugins
from backbones.vit import ViTBackbone

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "create_backbone", "from_spec"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# timm source files whose models are plain ViTs; the others window, pool or convolve between patches.
_PLAIN_FAMILIES = {"vision_transformer", "deit", "eva"}
# Set by create_backbone itself, so a recipe's `options` may not.
_RESERVED = {
    "img_size": "image_size",
    "patch_size": "patch_size",
    "in_chans": "in_chans",
    "num_classes": None,
    "global_pool": None,
    "dynamic_img_size": None,
    "dynamic_img_pad": None,
    "pretrained": None,
}


def create_backbone(
    name: str,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    in_chans: int = 3,
    options: Mapping[str, Any] | None = None,
    pixel_mean: Sequence[float] = IMAGENET_MEAN,
    pixel_std: Sequence[float] = IMAGENET_STD,
) -> ViTBackbone:
    """A randomly initialised backbone; draws from torch's global generator, as timm does.

    Args:
        name: one of `backbones.names.model_names()`.
        image_size, patch_size: pixels per side; None takes the model's own.
        in_chans: channels of the images.
        options: further arguments of the timm model, for example `{"depth": 6, "embed_dim": 192, "reg_tokens": 4}`.
        pixel_mean, pixel_std: per channel, for pixels in [0, 1].

    Raises:
        BackboneError: unknown name, a model that is not a plain ViT, or an argument it does not take.
    """
    options = dict(options or {})
    sizes = {"img_size": image_size, "patch_size": patch_size}
    arguments = options | {key: size for key, size in sizes.items() if size is not None}
    for key in sorted(_RESERVED.keys() & options.keys()):
        remedy = f"use backbone.{_RESERVED[key]}" if _RESERVED[key] else "leave it out"
        raise BackboneError(f"backbone {name!r}: option {key!r} is set by the platform; {remedy}")
    library, build = _find(name)
    try:
        vit = build(in_chans=in_chans, num_classes=0, global_pool="", dynamic_img_size=True, **arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items()) or "its defaults"
        raise BackboneError(f"backbone {name!r} cannot be built with {given}: {error}") from error
    return ViTBackbone(vit, library=library, name=name, options=options, pixel_mean=pixel_mean, pixel_std=pixel_std)


def from_spec(spec: Mapping[str, Any]) -> ViTBackbone:
    """The architecture that `ViTBackbone.spec` describes, with random weights.

    Raises:
        BackboneError: a key is missing or unknown, or the model is not available here.
    """
    expected = {"library", "name", "image_size", "patch_size", "in_chans", "options", "pixel_mean", "pixel_std"}
    if spec.keys() != expected:
        raise BackboneError(f"backbone spec has keys {sorted(spec)}, expected {sorted(expected)}")
    return create_backbone(**{key: value for key, value in spec.items() if key != "library"})


def _find(name: str) -> tuple[str, Callable[..., nn.Module]]:
    """Where `name` comes from ("timm" or the plug-in's distribution) and the function that builds it."""
    if name not in model_names():
        near = difflib.get_close_matches(name, model_names(), n=3)
        hint = f"nearest: {', '.join(near)}" if near else "timm.list_models() lists all"
        raise BackboneError(f"backbone {name!r} is not known; {hint}")
    if name in plugins():
        return plugins()[name].value, plugins()[name].load()
    import timm  # here, because a rejected name need not pay for it

    family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    if family not in _PLAIN_FAMILIES:
        raise BackboneError(
            f"backbone {name!r} is not a plain ViT (timm family {family!r}): masked patches can only be left out "
            "when each patch is embedded alone and keeps its own token; use for example vit_tiny_patch16_224"
        )
    return "timm", partial(timm.create_model, name)
