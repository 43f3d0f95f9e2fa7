"""The pictures of a checkpoint on one data set: kind -> PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from evaluation.data import EvaluationData
from evaluation.extraction.recipe import Reads, Size
from evaluation.pictures.tokens import token_sheet
from evaluation.runner import architecture_of, available_device
from evaluation.threads import Threads

__all__ = ["draw"]


def draw(
    checkpoint: Path,
    data: EvaluationData,
    *,
    image_size: Size | None,
    reads: Reads,
    device: str | torch.device | None,
    threads: Threads,
) -> dict[str, bytes]:
    """Draws what there is to see; of backbones of other kinds than images nothing.

    Args:
        checkpoint: a directory with `backbone.safetensors`.
        image_size, reads, device, threads: as `evaluation.runner.evaluate` takes them.

    Raises:
        EvaluationError, BackboneError, DataError: what is there cannot be read or does not go together.
    """
    architecture = architecture_of(checkpoint)
    if architecture.get("kind", "image") != "image":
        return {}
    on_device = available_device() if device is None else torch.device(device)
    settings: dict[str, Any] = {"image_size": image_size, "reads": reads, "device": on_device, "threads": threads}
    return {"tokens": token_sheet(checkpoint, architecture, data, **settings)}
