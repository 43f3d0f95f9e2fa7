"""Where plug-ins import the encoder of images from: `from backbones.base import Backbone`."""

from __future__ import annotations

from backbones.images.base import ImageEncoder as Backbone

__all__ = ["Backbone"]
