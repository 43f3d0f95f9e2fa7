"""Attentive probe: multi-head cross-attention of one learned query to the patch tokens, then a linear classifier.

It tells "the information is in the tokens" from "it is in the CLS token, or in their mean", which differ by many points
in masked autoencoders. Query and keys of a head act on a token only through their product, so that one vector per head
stands for both; values are projected after the sum over tokens, which is the same and costs a token less. How it is
trained and what is chosen is in `evaluation.protocols.token_probes`.

Legend: B batch, N patch tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome
from evaluation.protocols.token_probes import Parameters, num_groups, probed

__all__ = ["Attention", "score"]


def score(
    train: Dense[Tensor],
    test: Dense[Tensor],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Trains and tests the probe."""
    settings: dict[str, Any] = {"num_classes": num_classes, "params": params, "seed": seed, "device": device}
    return probed(train, test, Attention(), **settings)[0]


class Attention:
    """Pooling by attention; it begins close to the mean."""

    rates: Mapping[str, float] = MappingProxyType({})

    def start(self, dim: int, generator: torch.Generator) -> tuple[Parameters, int]:
        num_heads = num_groups(dim)
        query = 0.02 * torch.randn(num_heads, dim, generator=generator)
        value = dim**-0.5 * torch.randn(num_heads, dim, dim // num_heads, generator=generator)
        return {"query": query, "value": value}, dim

    def __call__(self, tokens: Tensor, parameters: Parameters) -> Tensor:
        attention = (tokens @ parameters["query"].T).softmax(dim=1)  # (B, N, H)
        pooled = attention.mT @ tokens  # (B, H, D)
        return torch.einsum("bhd,hde->bhe", pooled, parameters["value"]).flatten(1)  # (B, D)
