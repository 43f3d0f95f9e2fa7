"""Initial weights that encoders of several kinds and the heads of objectives share: those of MAE.

K. He et al. 2021, arXiv:2111.06377, draw all matrices Xavier-uniform and tokens from N(0, 0.02^2).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

__all__ = ["TOKEN_STD", "draw_matrices"]

TOKEN_STD = 0.02


def draw_matrices(modules: Iterable[nn.Module]) -> None:
    """Xavier-uniform weights and zero biases of linear layers; norms become the identity."""
    for module in modules:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm) and module.elementwise_affine:
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
