"""The pictures of a checkpoint and its results on one data set: kind -> PNG."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evaluation.data import EvaluationData
from evaluation.extraction.recipe import Reads, Size, extraction_of
from evaluation.pictures.outcomes import OutcomePictures
from evaluation.pictures.space import SPACES, space_sheet
from evaluation.pictures.tokens import token_sheet
from evaluation.registry import protocol
from evaluation.results import EvaluationResult, ResultStore
from evaluation.runner import architecture_of, available_device
from evaluation.threads import Threads

__all__ = ["draw"]


def draw(
    checkpoint: Path,
    data: EvaluationData,
    results: Sequence[EvaluationResult],
    *,
    store: Path,
    image_size: Size | None,
    reads: Reads,
    device: str | torch.device | None,
    threads: Threads,
) -> Iterator[tuple[str, bytes]]:
    """Draws what there is to see, one kind after the other; one that fails stops no other.

    Of the tokens of images, clouds and volumes there is a sheet; other kinds of backbones have none. Results are drawn
    of what is stored with them: nothing is computed again, and one that an older version has stored has no picture.

    Args:
        checkpoint: a directory with `backbone.safetensors`.
        results: of its protocols on `data`.
        store, image_size, reads, device, threads: as `evaluation.runner.evaluate` takes them.

    Raises:
        Exception: the first that kept a picture from being drawn, after all others.
    """
    architecture = architecture_of(checkpoint)
    kind, drawings = architecture.get("kind", "image"), dict[str, Callable[[], bytes]]()
    on_device = available_device() if device is None else torch.device(device)
    settings: dict[str, Any] = {"reads": reads, "device": on_device, "threads": threads}
    if kind == "image":
        drawings["tokens"] = partial(token_sheet, checkpoint, architecture, data, image_size=image_size, **settings)
    elif kind in SPACES:
        drawings[SPACES[kind]] = partial(space_sheet, checkpoint, architecture, data, **settings)
    inputs = extraction_of(kind).reading(reads).inputs
    for result in results:
        shown, size = ResultStore(store).shown(result.key), result.details.get("image_size")
        seen_at = tuple(size) if kind == "image" and size is not None else None
        drawings |= OutcomePictures(protocol(result.protocol), shown, data, inputs, seen_at).drawings()
    failed: Exception | None = None
    for shows, drawing in drawings.items():
        try:
            png = drawing()
        except Exception as error:  # of any type: what one picture takes says nothing of the others
            failed = failed or error
        else:
            yield shows, png
    if failed is not None:
        raise failed
