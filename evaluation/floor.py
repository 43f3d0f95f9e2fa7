"""What raw pixels score by the head that a backbone is evaluated with: a backbone that is no better is worth nothing.

Images are brought to `SIDE` x `SIDE` pixels and taken as they are. At 16 pixels CIFAR-10 photos score as high as at 32
by nearest neighbors and a linear layer, for a quarter of the cost. A protocol of pooled features has this floor if it
has a metric `HEADLINE_pixels`. It depends on data and protocol alone, so it is computed once.
"""

from __future__ import annotations

from typing import Any

import torch

from data_pipelines.decode import decode_image
from data_pipelines.shards.dataset import Dataset
from data_pipelines.views.crops import eval_view
from evaluation.data import OpenedData, class_label
from evaluation.extraction.forward import Pooled
from evaluation.protocol import FLOOR, Protocol
from evaluation.threads import Threads

__all__ = ["SIDE", "floor_facts", "has_floor", "is_small", "pixels_of"]

SIDE = 16
MOST_SAMPLES = 50_000  # for training; of more, pixels take longer than most backbones


def has_floor(spec: Protocol, kind: str) -> bool:
    """Whether a protocol has raw pixels as a floor for backbones of a kind, where data are small enough."""
    is_told = f"{spec.headline.name}_{FLOOR}" in {metric.name for metric in spec.metrics}
    return is_told and kind == "image" and spec.tokens == "pooled"


def is_small(data: OpenedData) -> bool:
    """Whether raw pixels of the data are scored at all."""
    return data.train.num_samples <= MOST_SAMPLES


def floor_facts(data: OpenedData) -> dict[str, Any]:
    """What decides the features, in the place of weights, recipe and data."""
    return {"weights": FLOOR, "features": {"side": SIDE}, "data": data.digest}


def pixels_of(data: OpenedData, inputs: tuple[str, ...], threads: Threads) -> tuple[Pooled, Pooled]:
    """Both splits as heads take them, pixels in [0, 1] in the place of the mean of patches: (n, 3 * SIDE * SIDE)."""
    train, test = (_split(getattr(data, split), data, inputs, threads) for split in ("train", "test"))
    return train, test


def _split(dataset: Dataset, data: OpenedData, inputs: tuple[str, ...], threads: Threads) -> Pooled:
    field = dataset.require_field(*inputs)
    pixels = torch.empty(dataset.num_samples, 3 * SIDE * SIDE)
    labels = torch.empty(dataset.num_samples, dtype=torch.int64)

    def read() -> None:
        for number in range(dataset.num_samples):
            sample = dataset.read(number)
            labels[number] = class_label(sample, data.classes)
            pixels[number] = eval_view(decode_image(sample[field]), SIDE).flatten().float() / 255

    threads.run(read)
    return Pooled(cls=None, patch_mean=pixels, labels=labels)
