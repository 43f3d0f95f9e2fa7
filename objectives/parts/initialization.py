"""Initial values of layers that timm or torch would draw otherwise. Everything draws from torch's global generator."""

from __future__ import annotations

from torch import nn

__all__ = ["initialize_linear"]


def initialize_linear(module: nn.Module) -> None:
    """N(0, 0.02^2) for the matrices of linear layers and zeros for their biases, as the authors have it."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
