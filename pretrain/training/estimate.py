"""How fast a recipe would train here, measured in a few seconds with some of the photos that it is for."""

from __future__ import annotations

import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from data_pipelines.views.maker import ViewMaker
from data_pipelines.views.photometric import finish
from data_pipelines.views.specs import views_from
from objectives.base import Progress
from pretrain.config.schema import Recipe
from pretrain.training.inputs import to_device
from pretrain.training.model import build_objective

__all__ = ["samples_per_second"]


def samples_per_second(recipe: Recipe, samples: Sequence[Mapping[str, Any]], device: torch.device) -> float:
    """Samples per second of one worker: decoding, views, forward and backward, without the optimizer.

    Args:
        recipe: What to train.
        samples: Bytes by field of at least one sample, as shards hold them; all are one batch.
        device: Where to compute; on the CPU with one thread, as a worker does.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            objective = build_objective(recipe).to(device)
        maker = ViewMaker(views_from(objective.views()), frozenset(samples[0]), resampler=recipe.data.resampler)
        seconds = []
        for attempt in range(3):
            began = time.perf_counter()
            made = [maker(sample, seed) for seed, sample in enumerate(samples)]
            batch = maker.collate(made)
            batch.setdefault("seed", torch.arange(len(samples)))
            objective(finish(to_device(batch, device), maker.views), Progress(attempt, 100)).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return len(samples) / min(seconds[1:])
