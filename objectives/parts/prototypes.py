"""The projection head of DINO: cosines between a token and learned prototypes.

M. Caron et al., 2021, arXiv:2104.14294, section 3.1 (network architecture). The last layer is weight-normalised with
its gain fixed at 1 (`norm_last_layer` in the authors' code), in functional form: no hook, nothing frozen, a plain state
dict.

Legend: D width of a token, E bottleneck width, K prototypes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from objectives.parts.initialization import initialize_linear

__all__ = ["DINOHead"]


class DINOHead(nn.Module):
    """Three-layer perceptron, l2 normalisation, cosine with each row of `prototypes` (K, E)."""

    def __init__(self, dim: int, num_prototypes: int, *, hidden_dim: int, bottleneck_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        initialize_linear(self.mlp)
        # Only directions count, but the length sets how fast they turn: that of torch's linear layers, as the authors'.
        nn.init.uniform_(self.prototypes, -1 / math.sqrt(bottleneck_dim), 1 / math.sqrt(bottleneck_dim))

    def forward(self, tokens: Tensor, freeze_prototypes: bool = False) -> Tensor:
        """Cosines in -1 .. 1, (..., D) -> (..., K); with `freeze_prototypes` they get no gradient.

        Sharded optimizers see zeros then, count the step and decay the weights (which a cosine does not notice), where
        the authors' AdamW skips the prototypes: its moments begin at the thaw.
        """
        prototypes = self.prototypes.detach() if freeze_prototypes else self.prototypes
        directions = functional.normalize(self.mlp(tokens), dim=-1)  # (..., E)
        return functional.linear(directions, functional.normalize(prototypes, dim=-1))
