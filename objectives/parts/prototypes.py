"""The projection head of DINO: products of a token's direction with learned prototypes.

M. Caron et al., 2021, arXiv:2104.14294, section 3.1 (network architecture). Three kinds of last layer:

    weight_norm_frozen   cosines: prototypes of length 1 (`norm_last_layer` in DINO's code)
    weight_norm          cosines times a gain that each prototype learns, 1 at the start (DINOv2)
    linear               prototypes of any length (DINOv3). Logits start at 0.02 / sqrt(1 / E) of the others' size, so
                         that the targets of a short run with few images stay uniform for a long time.

Weight norm is in functional form: no hook, nothing frozen, a plain state dict.

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
    """Three-layer perceptron, l2 normalisation, product with each row of `prototypes` (K, E).

    Attributes:
        spec: the arguments that it was built with, JSON-able.
    """

    def __init__(
        self,
        dim: int,
        num_prototypes: int,
        *,
        hidden_dim: int,
        bottleneck_dim: int,
        last_layer: str = "weight_norm_frozen",
    ) -> None:
        """`last_layer` is one of `objectives.parts.settings.LAST_LAYERS`."""
        super().__init__()
        self.spec = {
            "dim": dim,
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "last_layer": last_layer,
        }
        self.last_layer = last_layer
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.GELU(),
            nn.Linear(hidden_dim, bottleneck_dim),
        )
        self.prototypes = nn.Parameter(torch.empty(num_prototypes, bottleneck_dim))
        self.gain = nn.Parameter(torch.ones(num_prototypes)) if last_layer == "weight_norm" else None
        initialize_linear(self.mlp)
        if last_layer == "linear":
            nn.init.normal_(self.prototypes, std=0.02)
            return
        # Only directions count, but the length sets how fast they turn: that of torch's linear layers, as the authors'.
        nn.init.uniform_(self.prototypes, -1 / math.sqrt(bottleneck_dim), 1 / math.sqrt(bottleneck_dim))

    def forward(self, tokens: Tensor, freeze_prototypes: bool = False) -> Tensor:
        """Logits, (..., D) -> (..., K); cosines in -1 .. 1 where the gain is fixed. With `freeze_prototypes` the
        prototypes get no gradient.

        Sharded optimizers see zeros then, count the step and decay the weights (which a cosine does not notice), where
        the authors' AdamW skips the prototypes: its moments begin at the thaw.
        """
        prototypes = self.prototypes.detach() if freeze_prototypes else self.prototypes
        directions = functional.normalize(self.mlp(tokens), dim=-1)  # (..., E)
        if self.last_layer == "linear":
            return functional.linear(directions, prototypes)
        cosines = functional.linear(directions, functional.normalize(prototypes, dim=-1))
        return cosines if self.gain is None else cosines * self.gain
