"""GGeM: a generalized mean of the patch tokens, with one learned exponent per group of channels, then a linear layer.

(1/N sum x^p)^(1/p) is the mean at p = 1 and the maximum for large p (Ko et al. 2022, arXiv:2212.04114). It is of
positive numbers, and half of a normed token is negative: tokens are standardised and moved up by 4 deviations first,
what is still negative becomes 1e-6, and the pooled ones are moved back. Groups are of about 64 channels, as heads of
ViTs; exponents learn ten times as fast as weights, and without decay. How the rest is trained and what is chosen is in
`evaluation.protocols.token_probes`.

Legend: B batch, N patch tokens, D width, G groups of channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from evaluation.extraction.forward import Dense
from evaluation.metrics import Outcome
from evaluation.protocols.token_probes import Parameters, num_groups, probed

__all__ = ["GroupMean", "ggem", "score"]

LEAST = 1e-6
EXPONENTS = (0.1, 30.0)  # beyond them powers of float32 numbers are 0 or infinite


def score(
    train: Dense[Tensor],
    test: Dense[Tensor],
    *,
    num_classes: int,
    params: Mapping[str, Any],
    seed: int,
    device: torch.device,
) -> Outcome:
    """Trains and tests the probe; the details say which exponents it has learned."""
    pooling = GroupMean(params["first_p"], params["shift"], MappingProxyType({"p": params["p_rate"]}))
    settings: dict[str, Any] = {"num_classes": num_classes, "params": params, "seed": seed, "device": device}
    outcome, learned = probed(train, test, pooling, **settings)
    return replace(outcome, details={**outcome.details, "p": learned["p"].clamp(*EXPONENTS).tolist()})


@dataclass(frozen=True)
class GroupMean:
    """Pooling by `ggem` of tokens that are moved up and back."""

    first_p: float
    shift: float
    rates: Mapping[str, float]

    def start(self, dim: int, generator: torch.Generator) -> tuple[Parameters, int]:
        return {"p": torch.full((num_groups(dim),), self.first_p)}, dim

    def __call__(self, tokens: Tensor, parameters: Parameters) -> Tensor:
        return ggem(tokens + self.shift, parameters["p"].clamp(*EXPONENTS)) - self.shift


def ggem(tokens: Tensor, p: Tensor) -> Tensor:
    """Generalized means (..., D) of positive tokens (..., N, D) with exponents (G,) of equal groups of channels."""
    exponents = p.repeat_interleave(tokens.shape[-1] // len(p))  # (D,)
    return tokens.clamp(min=LEAST).pow(exponents).mean(dim=-2).pow(1 / exponents)
