"""Initial weights of image encoders by name, for recipes that want others than timm's.

    timm   what timm draws: matrices of deviation 0.02, learned positions near 0
    mae    what K. He et al. 2021 (arXiv:2111.06377) draw, for any objective: Xavier-uniform matrices, the patch
           projection as one of (D, C * p * p), tokens from N(0, 0.02^2), and sin-cos positions, learned from there on
           where the encoder learns them

Runs of minutes begin several points higher with "mae", and stay there; published recipes of other objectives are
timm's. NOT here: what an objective decides for itself (MAE always begins like this, with positions that stay fixed;
DINOv3 draws matrices as its authors do, unless a recipe names others than timm's).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from backbones.errors import BackboneError, suggest
from backbones.images.base import ImageEncoder
from backbones.images.config import INITIALIZATIONS
from backbones.images.positions import sincos_positions
from backbones.images.vit import ViTBackbone
from backbones.initialization import TOKEN_STD, draw_matrices

__all__ = ["draw_patch_projection", "initialize"]


def initialize(backbone: ImageEncoder, init: str) -> None:
    """Draws the weights anew by name from torch's global generator; those of "timm" are there already.

    Raises:
        BackboneError: no such name, or it is for plain ViTs and this is none.
    """
    if init not in INITIALIZATIONS:
        raise BackboneError(f"backbone.init {init!r} is not known{suggest(init, INITIALIZATIONS)}")
    backbone.init = init
    if init == "timm":
        return
    if not isinstance(backbone, ViTBackbone):
        raise BackboneError(
            f"backbone {backbone.spec['name']!r} is not a plain ViT, which init={init} is for; leave backbone.init out"
        )
    draw_matrices(backbone.network.modules())
    draw_patch_projection(backbone)
    backbone.reset_tokens(TOKEN_STD)
    positions = backbone.learned_positions()  # (N, D)
    if positions is not None:
        with torch.no_grad():
            positions.copy_(sincos_positions(backbone.embed_dim, backbone.grid))


def draw_patch_projection(backbone: ViTBackbone) -> Tensor:
    """Xavier-uniform weights of the patch projection, which counts as one matrix (D, C * p * p); its bias stays."""
    return nn.init.xavier_uniform_(backbone.patch_projection)
