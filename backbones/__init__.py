"""Encoders with one output type (`Features`), of images around timm's models, and the file they travel in.

Importing the package imports neither torch nor timm; each name below loads its module on first use.
NOT here: learning objectives (`objectives`), scores (`evaluation`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from backbones.base import Backbone
    from backbones.encoder import Encoder
    from backbones.errors import BackboneError
    from backbones.features import Features
    from backbones.images.base import ImageEncoder
    from backbones.images.timm_model import TimmBackbone
    from backbones.images.timm_names import model_names
    from backbones.images.vit import ViTBackbone
    from backbones.io import initialize_from, load_backbone, save_backbone, weights_digest
    from backbones.registry import create_backbone, from_config, from_spec

__all__ = [
    "Backbone",
    "BackboneError",
    "Encoder",
    "Features",
    "ImageEncoder",
    "TimmBackbone",
    "ViTBackbone",
    "create_backbone",
    "from_config",
    "from_spec",
    "initialize_from",
    "load_backbone",
    "model_names",
    "save_backbone",
    "weights_digest",
]

_HOME = {
    "Backbone": "base",
    "BackboneError": "errors",
    "Encoder": "encoder",
    "Features": "features",
    "ImageEncoder": "images.base",
    "TimmBackbone": "images.timm_model",
    "ViTBackbone": "images.vit",
    "create_backbone": "registry",
    "from_config": "registry",
    "from_spec": "registry",
    "initialize_from": "io",
    "load_backbone": "io",
    "model_names": "images.timm_names",
    "save_backbone": "io",
    "weights_digest": "io",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'backbones' has no attribute {name!r}")
    return getattr(import_module(f"backbones.{_HOME[name]}"), name)
