"""What an engine exports, kept for a comparison with what it exports later."""

from __future__ import annotations

from torch import Tensor

from pretrain.training.engine import Engine

__all__ = ["exported_now"]


def exported_now(engine: Engine) -> dict[str, Tensor]:
    """Copies of the exported backbone's weights by name. A collective under ZeRO."""
    return {name: tensor.to("cpu", copy=True) for name, tensor in engine.exported_weights()}
