"""How series are given to a backbone when it is evaluated."""

from __future__ import annotations

import torch

from data_pipelines.decode import decode_array
from evaluation.extraction.recipe import Extraction

__all__ = ["SERIES"]

SERIES = Extraction(
    inputs=("series.npy",),
    tokens=("pooled",),  # protocols that need one vector per sample
    recipe=lambda spec, architecture, size: {},  # nothing but weights and data decides the features
    prepare=lambda content, recipe: torch.tensor(decode_array(content)),
)
