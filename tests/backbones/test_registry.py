from __future__ import annotations

import json
from importlib.metadata import EntryPoint

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from backbones import registry
from backbones.errors import BackboneError
from backbones.registry import create_backbone, from_spec

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def tiny_plugin(**arguments):
    return VisionTransformer(patch_size=8, img_size=16, embed_dim=16, depth=1, num_heads=2, **arguments)


def test_create_backbone__takes_the_models_own_sizes():
    backbone = create_backbone("vit_tiny_patch16_224", options=TINY)
    assert (backbone.image_size, backbone.patch_size, backbone.grid) == (224, 16, (14, 14))
    assert (backbone.embed_dim, backbone.in_chans, backbone.num_prefix_tokens) == (32, 3, 1)
    assert sum(p.numel() for n, p in backbone.named_parameters() if "head" in n) == 0


def test_spec__json_round_trip_rebuilds_the_architecture():
    options = TINY | {"reg_tokens": 2, "class_token": False, "drop_path_rate": 0.1}
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=20, patch_size=5, in_chans=2, options=options,
        pixel_mean=[0.1, 0.2], pixel_std=[0.3, 0.4],
    )  # fmt: skip
    again = from_spec(json.loads(json.dumps(backbone.spec)))
    assert again.spec == backbone.spec
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in backbone.state_dict().items()}
    torch.testing.assert_close(again.pixel_std, backbone.pixel_std)


def test_from_spec__wrong_keys_are_named():
    spec = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=16, options=TINY).spec
    with pytest.raises(BackboneError, match="options"):
        from_spec({key: value for key, value in spec.items() if key != "options"})


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("vit_tiny_patch16_225", {}, "vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224", {"options": {"img_size": 32}}, "use backbone.image_size"),
        ("vit_tiny_patch16_224", {"options": {"num_classes": 10}}, "leave it out"),
        ("vit_tiny_patch16_224", {"options": {"dept": 3}}, "dept"),
        ("vit_tiny_patch16_224", {"options": {"embed_dim": 30, "num_heads": 4}}, "embed_dim=30"),
        ("vit_tiny_patch16_224", {"image_size": 33, "patch_size": 4}, "33 is not a multiple of patch_size 4"),
        ("vit_tiny_patch16_224", {"image_size": (32, 64)}, "32 x 64 is not square"),
        ("vit_tiny_patch16_224", {"in_chans": 4}, "pixel_mean .* must hold 4 numbers"),
        ("vit_tiny_patch16_224", {"pixel_std": [1.0, 0.0, 1.0]}, "pixel_std .* positive"),
    ],
)
def test_create_backbone__rejections_are_one_clear_line(name, arguments, message):
    arguments = arguments if "options" in arguments else {"options": TINY} | arguments
    arguments = {} if name != "vit_tiny_patch16_224" else arguments
    with pytest.raises(BackboneError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)


def test_create_backbone__builds_plugins_with_timms_arguments(monkeypatch):
    point = EntryPoint("tiny_plugin", "plug.models:tiny_plugin", "pretrain.backbones")
    monkeypatch.setattr(EntryPoint, "load", lambda self: tiny_plugin)
    monkeypatch.setattr(registry, "plugins", lambda: {"tiny_plugin": point})
    monkeypatch.setattr(registry, "model_names", lambda: ("tiny_plugin",))
    backbone = create_backbone("tiny_plugin")
    assert backbone.spec["library"] == "plug.models:tiny_plugin"
    assert backbone.features(torch.zeros(1, 3, 16, 16)).patches.shape == (1, 4, 16)
