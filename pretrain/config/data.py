"""Opens the data that a recipe names, and counts what is stated in passes over it.

Imports numpy and more: whoever only checks settings imports it where a recipe counts in epochs. Not here: the order of
samples and their views (`pretrain.training.inputs`).
"""

from __future__ import annotations

import math
from dataclasses import replace

from data_pipelines.shards.dataset import Dataset, open_dataset
from data_pipelines.storage.stores import FetchOptions
from data_pipelines.streaming.joined import Joined
from data_pipelines.streaming.mixture import Mixture, Part
from pretrain.config.schema import DataConfig, Recipe

__all__ = ["fetch_options", "in_steps", "open_data"]


def in_steps(recipe: Recipe) -> Recipe:
    """The recipe with what it counts in epochs counted in steps: `train.epochs` rounded up, the others to the nearest.

    Raises:
        DataError: the data cannot be opened.
    """
    train, optimizer = recipe.train, recipe.optimizer
    steps_per_epoch = open_data(recipe.data).num_samples / train.global_batch_size
    if train.epochs is not None:
        train = replace(train, steps=max(1, math.ceil(train.epochs * steps_per_epoch)), epochs=None)
    if train.checkpoint_every_epochs is not None:
        every = max(1, round(train.checkpoint_every_epochs * steps_per_epoch))
        train = replace(train, checkpoint_every=every, checkpoint_every_epochs=None)
    if optimizer.warmup_epochs is not None:
        warmup = round(optimizer.warmup_epochs * steps_per_epoch)
        optimizer = replace(optimizer, warmup_steps=warmup, warmup_epochs=None)
    return replace(recipe, train=train, optimizer=optimizer)


def open_data(data: DataConfig) -> Dataset | Mixture | Joined:
    """The recipe's data set, or its mixture of several."""
    fetch = fetch_options(data)
    if data.train is not None:
        return open_dataset(data.train, fetch=fetch, limit=data.limit)
    opened = ((part, open_dataset(part.shards, fetch=fetch, limit=part.limit)) for part in data.mixture)
    parts = [Part(part.name, dataset, weight=part.weight, repeat=part.repeat) for part, dataset in opened]
    return Joined(parts) if data.mixture_by == "join" else Mixture(parts)


def fetch_options(data: DataConfig) -> FetchOptions:
    """How remote shards are read and where they are kept."""
    return FetchOptions(
        cache_dir=data.cache_dir, cache_bytes=int(data.cache_gb * 1e9), mode=data.fetch, allow_pipe=data.allow_pipe
    )
