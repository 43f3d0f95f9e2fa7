"""What an encoder makes of the patches of a few test images, on one sheet.

Rows, from above: the images; the first three principal components of all their patch tokens after the final norm, as
red, green and blue; how alike all patches are to the one in the middle; the same for the patch that is least like that
one, each map from the lowest to the highest cosine in it, which the caption of the sheet says; and, where there is a
class token with plain attention, where that looks.

Not here: clouds and volumes (`evaluation.pictures.space`).
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
    similarity_ranges,
)
from backbones.io import load_backbone
from evaluation.data import EvaluationData
from evaluation.extraction.images import IMAGES, image_size_px
from evaluation.extraction.recipe import Reads, Size
from evaluation.pictures.sheets import Pixels, encoded, on_tiles, sheet
from evaluation.selection import spread
from evaluation.threads import Threads

__all__ = ["MAX_IMAGES", "cosines_in_words", "token_rows", "token_sheet"]

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
    pictures, caption = threads.run(token_rows, encoder, images.to(device))
    rows = [on_tiles(row, size) for row in pictures]
    return encoded(sheet(rows), rows[0].shape[1:3], caption)


@torch.inference_mode()
def token_rows(encoder: Any, images: Tensor) -> tuple[list[Pixels], str]:
    """The images (n, H, W, 3) and what `encoder` makes of them (n, rows, columns, 3) in [0, 1], see the module.

    With the caption: the cosines between which the maps of similarity go.

    Args:
        encoder: an `ImageEncoder` in evaluation mode.
        images: (n, 3, H, W) uint8, of one patch at least three.
    """
    x = encoder.preprocess(images)
    features, attention = encoder.features(x), encoder.attention(x)
    patches, grid = features.patches.float(), features.grid
    middle = torch.full((len(patches),), middle_patch(grid), device=patches.device)
    apart = most_different_patch(patches, middle_patch(grid))
    caption = cosines_in_words(similarity_ranges(patches, middle), similarity_ranges(patches, apart))
    rows = [principal_colors(patches, grid), similarity_maps(patches, grid), similarity_maps(patches, grid, apart)]
    rows += [] if attention is None else [attention_maps(attention, grid)]
    return [row.permute(0, 2, 3, 1).cpu().numpy() for row in (images, *rows)], caption


def cosines_in_words(middle: Tensor, apart: Tensor) -> str:
    """Of the maps of similarity of all samples, ranges (n, 2): the caption of a sheet."""
    shown = [", ".join(f"{low:.2f} to {high:.2f}" for low, high in ranges.tolist()) for ranges in (middle, apart)]
    return f"cosines, from left to right: to the one marked {shown[0]}; to the one least like it {shown[1]}"
