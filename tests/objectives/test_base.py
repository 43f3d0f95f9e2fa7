from __future__ import annotations

import pytest
import timm.optim

from backbones.registry import create_backbone
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE


@pytest.fixture(params=[{}, {"reg_tokens": 2, "init_values": 0.1}], ids=["plain", "registers and layer scale"])
def mae(request):
    options = {"embed_dim": 32, "depth": 3, "num_heads": 2} | request.param
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options=options)
    return MAE(backbone, MAEConfig(decoder_dim=16, decoder_depth=1, decoder_heads=2))


@pytest.fixture
def name_of(mae):
    return {id(parameter): name for name, parameter in mae.named_parameters()}


def test_param_groups__two_without_layer_decay(mae, name_of):
    groups = mae.param_groups(weight_decay=0.05)
    assert [(g["group_name"], g["weight_decay"], g["wd_scale"], g["lr_scale"]) for g in groups] == [
        ("decay", 0.05, 1.0, 1.0),
        ("no_decay", 0.0, 0.0, 1.0),
    ]
    decayed = {name_of[id(p)] for p in groups[0]["params"]}
    assert {"backbone.vit.cls_token", "decoder.mask_token", "decoder.predict.weight"} <= decayed
    assert not any(name.endswith(".bias") or "norm" in name or "gamma" in name for name in decayed)


@pytest.mark.parametrize("layer_decay", [1.0, 0.75])
def test_param_groups__hold_each_trainable_parameter_once(mae, name_of, layer_decay):
    mae.backbone.vit.blocks[0].norm1.weight.requires_grad_(False)
    groups = mae.param_groups(0.05, layer_decay)
    held = [name_of[id(p)] for g in groups for p in g["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {n for n, p in mae.named_parameters() if p.requires_grad}
    assert len({g["group_name"] for g in groups}) == len(groups)


def test_param_groups__layer_decay_scales_as_timm_does(mae, name_of):
    scales = {name_of[id(p)]: g["lr_scale"] for g in mae.param_groups(0.05, 0.6) for p in g["params"]}
    timm_groups = timm.optim.param_groups_layer_decay(mae.backbone.vit, 0.05, layer_decay=0.6)
    expected = {name_of[id(p)]: g["lr_scale"] for g in timm_groups for p in g["params"]}
    assert {n: s for n, s in scales.items() if n in expected} == pytest.approx(expected)
    assert scales["backbone.vit.cls_token"] == pytest.approx(0.6**3)
    assert scales["backbone.vit.blocks.1.mlp.fc1.weight"] == pytest.approx(0.6)
    assert {s for n, s in scales.items() if n.startswith(("decoder.", "backbone.vit.norm"))} == {1.0}


def test_param_groups__know_that_they_decay_when_the_decay_starts_at_zero(mae):
    groups = mae.param_groups(weight_decay=0.0)
    assert {(g["group_name"], g["weight_decay"], g["wd_scale"]) for g in groups} == {
        ("decay", 0.0, 1.0),
        ("no_decay", 0.0, 0.0),
    }


def test_param_groups__are_what_torch_optimizers_take(mae):
    import torch

    optimizer = torch.optim.AdamW(mae.param_groups(0.05, 0.75), lr=1e-3)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.05}
    assert all("lr_scale" in group for group in optimizer.param_groups)
