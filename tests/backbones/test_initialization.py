"""Initial weights by name: what is drawn, what stays timm's, and who takes it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from backbones.errors import BackboneError
from backbones.images.positions import sincos_positions
from backbones.registry import create_backbone

SMALL = {"image_size": 32, "patch_size": 8, "options": {"depth": 2, "embed_dim": 48, "num_heads": 3}}
ROTARY = {**SMALL, "options": {**SMALL["options"], "num_reg_tokens": 2}}


def created(name: str, init: str, **settings):
    torch.manual_seed(0)
    return create_backbone(name, init=init, **settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", SMALL),
        ("vit_tiny_patch16_224", {**SMALL, "options": {**SMALL["options"], "reg_tokens": 2, "class_token": False}}),
        ("vit_small_patch16_dinov3_qkvb", ROTARY),
    ],
)
def test_initialize__matrices_are_xavier_and_positions_sincos(name, settings):
    vit = created(name, "mae", **settings)
    matrices = {part: module for part, module in vit.network.named_modules() if isinstance(module, nn.Linear)}
    assert len(matrices) >= 8
    for part, module in matrices.items():
        bound = math.sqrt(6 / sum(module.weight.shape))  # Xavier: uniform in [-bound, bound]
        assert 0.97 * bound < module.weight.abs().max() <= bound, part
        assert module.bias is None or not module.bias.any(), part
    projection = vit.patch_projection
    bound = math.sqrt(6 / sum(projection.shape))
    assert projection.shape == (48, 3 * 8 * 8) and 0.97 * bound < projection.abs().max() <= bound
    positions = vit.learned_positions()
    if name.startswith("vit_tiny"):
        assert torch.equal(positions, sincos_positions(48, (4, 4)))
        assert vit.network.pos_embed.requires_grad  # learned from there on
    else:
        assert positions is None  # it only rotates


def test_initialize__other_weights_stay_timms_and_so_does_the_description():
    timm, mae = (created("vit_tiny_patch16_224", init, **SMALL) for init in ("timm", "mae"))
    assert timm.spec == mae.spec  # an architecture; weights come with files
    assert torch.equal(timm.network.patch_embed.proj.bias, mae.network.patch_embed.proj.bias)
    assert timm.learned_positions().std() < 0.05 < mae.learned_positions().std()
    assert torch.equal(created("vit_tiny_patch16_224", "mae", **SMALL).patch_projection, mae.patch_projection)


def test_initialize__is_for_plain_vits():
    with pytest.raises(BackboneError, match=r"'resnet10t' is not a plain ViT, which init=mae is for"):
        created("resnet10t", "mae", image_size=64)
    with pytest.raises(BackboneError, match=r"backbone.init 'mea' is not known; did you mean 'mae'\?"):
        created("vit_tiny_patch16_224", "mea", **SMALL)
