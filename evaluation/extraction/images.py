"""Images for a backbone: resized and centre-cropped for pooled features, squeezed whole to the size for dense ones.

A crop would lose labelled pixels, so dense features see all of the image. Normalisation belongs to the backbone. What
plug-ins import from here, `Pooled` and `Dense`, is what a head gets whatever the kind of backbone.

Not here: running the backbone (`evaluation.extraction.forward`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data_pipelines.decode import IMAGE_FIELDS, decode_image
from data_pipelines.views.crops import eval_view
from evaluation.extraction.forward import Dense, Pooled
from evaluation.extraction.recipe import Extraction, Size
from evaluation.protocol import EvaluationError, Protocol

__all__ = ["IMAGES", "Dense", "Pooled", "image_size_px"]


def image_size_px(requested: Size | None, trained: Size, patch_size: Size) -> tuple[int, int]:
    """Returns the (height, width) images are brought to, in pixels.

    Args:
        requested: one number for a square, (height, width), or None for the size the backbone was built for.

    Raises:
        EvaluationError: patches do not tile the size; names the nearest that they do.
    """
    height, width = _pair(trained if requested is None else requested)
    for side, patch, name in ((height, _pair(patch_size)[0], "height"), (width, _pair(patch_size)[1], "width")):
        if side < patch or side % patch:
            below = max(patch, side // patch * patch)
            raise EvaluationError(
                f"image_size {name} {side} is not a multiple of the backbone's patch size {patch}; "
                f"nearest allowed: {below} or {below + patch}"
            )
    return height, width


def _pair(size: Size) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    rows, cols = size
    return int(rows), int(cols)


def _recipe(spec: Protocol, architecture: Mapping[str, Any], size: Size | None) -> dict[str, Any]:
    if architecture["in_chans"] != 3:
        raise EvaluationError(f"the backbone takes {architecture['in_chans']} channels; evaluation images are RGB (3)")
    height, width = image_size_px(size, architecture["image_size"], architecture["patch_size"])
    if spec.tokens == "pooled" and height != width:
        raise EvaluationError(
            f"image_size {(height, width)}: protocol {spec.name!r} takes square images, give one number"
        )
    resize = "shorter side, centre crop" if spec.tokens == "pooled" else "squeeze, bicubic"
    return {"size": [height, width], "resize": resize}


def _prepare(content: Any, recipe: Mapping[str, Any]) -> Tensor:
    """A uint8 image (3, H, W) of the recipe's size."""
    height, width = recipe["size"]
    pixels = decode_image(content)
    if recipe["tokens"] == "pooled":
        return eval_view(pixels, height)
    squeezed = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squeezed)).permute(2, 0, 1)


IMAGES = Extraction(inputs=IMAGE_FIELDS, tokens=("pooled", "patches", "encoder"), recipe=_recipe, prepare=_prepare)
