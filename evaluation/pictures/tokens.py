"""What an encoder makes of the patches of a few test images, on one sheet.

Rows, from above: the images; the first three principal components of all their patch tokens after the final norm, as
red, green and blue; how alike all patches are to the one in the middle; the same for the patch that is least like that
one; and, where there is a class token with plain attention, where that looks.

Not here: other kinds of backbones than of images, which have no such picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.images.pictures import (
    attention_maps,
    middle_patch,
    most_different_patch,
    principal_colors,
    similarity_maps,
)
from backbones.io import load_backbone
from evaluation.data import EvaluationData
from evaluation.extraction.images import IMAGES, image_size_px
from evaluation.extraction.recipe import Reads, Size
from evaluation.pictures.sheets import Pixels, encoded, on_tiles, sheet
from evaluation.selection import spread
from evaluation.threads import Threads

__all__ = ["MAX_IMAGES", "token_rows", "token_sheet"]

MAX_IMAGES = 8


def token_sheet(
    checkpoint: Path,
    architecture: Mapping[str, Any],
    data: EvaluationData,
    *,
    image_size: Size | None,
    reads: Reads,
    device: torch.device,
    threads: Threads,
) -> bytes:
    """A PNG of test images, see the module.

    Args:
        architecture: of an image encoder of three channels, as the file of `checkpoint` has it.
        image_size, reads: as `evaluation.runner.evaluate` takes them.

    Raises:
        EvaluationError, BackboneError, DataError: what is there cannot be read or does not go together.
    """
    size = image_size_px(image_size, architecture["image_size"], architecture["patch_size"])
    inputs = IMAGES.reading(reads).inputs
    held_out = data.open_held_out(inputs)
    field, recipe = held_out.require_field(*inputs), {"tokens": "encoder", "size": size}
    numbers = spread(held_out.num_samples, MAX_IMAGES)
    prepared: list[Any] = [IMAGES.prepare(held_out.read(number)[field], recipe) for number in numbers]
    images = torch.stack(prepared)  # (n, 3, H, W)
    encoder = threads.run(load_backbone, checkpoint).to(device).eval()
    rows = [on_tiles(row, size) for row in threads.run(token_rows, encoder, images.to(device))]
    return encoded(sheet(rows), rows[0].shape[1:3])


@torch.inference_mode()
def token_rows(encoder: Any, images: Tensor) -> list[Pixels]:
    """The images (n, H, W, 3) and what `encoder` makes of them (n, rows, columns, 3) in [0, 1], see the module.

    Args:
        encoder: an `ImageEncoder` in evaluation mode.
        images: (n, 3, H, W) uint8, of one patch at least three.
    """
    x = encoder.preprocess(images)
    features, attention = encoder.features(x), encoder.attention(x)
    patches, grid = features.patches.float(), features.grid
    apart = most_different_patch(patches, middle_patch(grid))
    rows = [principal_colors(patches, grid), similarity_maps(patches, grid), similarity_maps(patches, grid, apart)]
    rows += [] if attention is None else [attention_maps(attention, grid)]
    return [row.permute(0, 2, 3, 1).cpu().numpy() for row in (images, *rows)]
