"""Every family of timm models behind the one interface: shapes, spatial order, sizes, channels, export, error lines."""

from __future__ import annotations

import json
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from backbones import TimmBackbone, ViTBackbone, load_backbone, save_backbone
from backbones.errors import BackboneError
from backbones.images.base import ImageEncoder
from backbones.registry import create_backbone, from_spec

# Shallow and narrow variants of each family, so that each builds and runs in well under a second.
FAMILIES: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"image_size": 128, "options": {"depths": [1, 1, 2, 1], "embed_dim": 24}},
    "convit_tiny": {"image_size": 64, "options": {"depth": 4, "local_up_to_layer": 3}},
    "crossvit_tiny_240": {"image_size": 120},
    "volo_d1_224": {"image_size": 64},
    "vitamin_small_224": {"image_size": 64},
    "hiera_tiny_224": {"image_size": 128, "options": {"embed_dim": 24, "stages": [1, 1, 2, 1]}},
    "fastvit_t8": {"image_size": 256},
    "convnext_atto": {"image_size": 128},
    "deit_tiny_distilled_patch16_224": {"image_size": 64, "options": {"depth": 2}},
}
EXPECTED = {  # patch_size, embed_dim, has_cls, takes other image sizes
    "swin_tiny_patch4_window7_224": (32, 192, False, True),
    "convit_tiny": (16, 192, True, False),
    "crossvit_tiny_240": (12, 96 + 192, True, False),
    "volo_d1_224": (16, 384, True, False),
    "vitamin_small_224": (16, 384, False, True),
    "hiera_tiny_224": (32, 192, False, False),
    "fastvit_t8": (32, 768, False, True),
    "convnext_atto": (32, 320, False, True),
    "deit_tiny_distilled_patch16_224": (16, 192, True, True),
}


@pytest.fixture(scope="module", params=FAMILIES)
def backbone(request) -> ImageEncoder:
    torch.manual_seed(0)
    return create_backbone(request.param, **FAMILIES[request.param]).eval()


def test_create_backbone__describes_the_output_grid(backbone):
    patch_size, embed_dim, has_cls, _ = EXPECTED[backbone.spec["name"]]
    assert isinstance(backbone, TimmBackbone) and not backbone.can_drop_patches and not backbone.has_plain_blocks
    assert (backbone.patch_size, backbone.embed_dim, backbone.has_cls) == (patch_size, embed_dim, has_cls)
    side = backbone.image_size // patch_size
    assert backbone.grid == (side, side) and backbone.num_patches == side**2


def test_features__shapes_and_finite_values(backbone):
    features = backbone.features(backbone.preprocess(torch.rand(2, 3, backbone.image_size, backbone.image_size)))
    assert features.patches.shape == (2, backbone.num_patches, backbone.embed_dim)
    assert features.grid == backbone.grid
    assert (features.cls is not None) == backbone.has_cls
    for tokens in (features.patches, features.cls, features.registers):
        assert tokens is None or tokens.isfinite().all()
    assert features.cls is None or features.cls.shape == (2, backbone.embed_dim)


def test_features__tokens_are_in_row_major_order(backbone):
    """A token depends most on its own pixels, or its neighbours': found by the gradient of each token's features."""
    torch.manual_seed(1)
    x = torch.randn(1, 3, backbone.image_size, backbone.image_size, requires_grad=True)
    patches = backbone.features(x).patches[0]  # (N, D)
    size, found = backbone.patch_size, []
    probe = torch.randn(backbone.embed_dim)
    indices = range(0, backbone.num_patches, 1 + backbone.num_patches // 20)
    for index in indices:
        (gradient,) = torch.autograd.grad(patches[index] @ probe, x, retain_graph=True)
        energy = gradient.square().sum((0, 1)).unflatten(1, (-1, size)).unflatten(0, (-1, size)).sum((1, 3))
        found.append(int(energy.argmax()))
    cells = [[divmod(index, backbone.grid[1]) for index in some] for some in (indices, found)]
    distances = [max(abs(r - s), abs(c - d)) for (r, c), (s, d) in zip(*cells, strict=True)]
    assert backbone.grid[0] >= 4 and sum(distances) / len(distances) < 1, found


def test_grid_at__other_sizes_or_one_clear_line(backbone):
    *_, takes_sizes = EXPECTED[backbone.spec["name"]]
    larger = backbone.image_size + 2 * backbone.patch_size
    if takes_sizes:
        side = larger // backbone.patch_size
        assert backbone.grid_at(larger, backbone.image_size) == (side, backbone.grid[1])
        features = backbone.features(torch.randn(1, 3, larger, backbone.image_size))
        assert features.patches.shape[1] == side * backbone.grid[1]
        with pytest.raises(BackboneError, match="px"):
            backbone.grid_at(larger + 1, larger)
        return
    with pytest.raises(BackboneError, match=f"{larger} x {larger} px") as caught:
        backbone.features(torch.randn(1, 3, larger, larger))
    assert "\n" not in str(caught.value) and backbone.spec["name"] in str(caught.value)


def test_features__patches_cannot_be_left_out(backbone):
    with pytest.raises(BackboneError, match="cannot leave patches out"):
        backbone.features(
            torch.randn(1, 3, backbone.image_size, backbone.image_size), torch.zeros(1, 1, dtype=torch.int64)
        )


def test_gradient__reaches_every_trainable_parameter(backbone):
    features = backbone.features(torch.randn(2, 3, backbone.image_size, backbone.image_size))
    outputs = [tokens for tokens in (features.patches, features.cls, features.registers) if tokens is not None]
    sum((tokens * torch.randn_like(tokens)).sum() for tokens in outputs).backward()
    named = dict(backbone.network.named_parameters())
    assert {name for name, p in named.items() if p.grad is None} == set(backbone.unused)
    assert all(named[name].requires_grad is (name not in backbone.unused) for name in named)
    assert backbone.unused == ()
    backbone.zero_grad(set_to_none=True)


def test_io__round_trip_and_plain_timm_loads_it_strictly(backbone, tmp_path):
    file = tmp_path / "backbone.safetensors"
    save_backbone(file, backbone.timm_state_dict(), backbone.spec)
    x = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    with torch.no_grad():  # as evaluation loads it
        loaded = load_backbone(file)
        assert loaded.spec == backbone.spec and not loaded.training
        torch.testing.assert_close(loaded.features(x).patches, backbone.features(x).patches, rtol=0, atol=0)
    weights = load_file(file)
    options, size = backbone.spec["options"], {"img_size": backbone.image_size}
    if backbone.spec["name"] in ("fastvit_t8", "convnext_atto"):
        size = {}
    pool = {"global_pool": ""} if backbone.spec["name"] == "vitamin_small_224" else {}
    plain = timm.create_model(backbone.spec["name"], num_classes=0, **size, **pool, **options)
    plain.load_state_dict(weights, strict=True)


def test_layer_ids__cover_every_parameter(backbone):
    assert backbone.layer_ids().keys() == {name for name, _ in backbone.network.named_parameters()}
    assert max(backbone.layer_ids().values()) >= 2


def test_features__bf16_weights_beside_float32_buffers(backbone):
    x = torch.randn(2, 3, backbone.image_size, backbone.image_size)
    expected = backbone.features(x).patches.detach()
    half = from_spec(backbone.spec)
    half.network.load_state_dict(backbone.network.state_dict())
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    features = half.eval().features(x)
    assert features.patches.dtype == torch.bfloat16
    difference = (features.patches.float() - expected).norm() / expected.norm()
    assert difference < 0.1
    half.train().features(x).patches.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in half.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("channels", [1, 5])
def test_create_backbone__any_number_of_channels(name, channels):
    pixels = {"pixel_mean": [0.5] * channels, "pixel_std": [0.2] * channels}
    backbone = create_backbone(name, in_chans=channels, **pixels, **FAMILIES[name]).eval()
    size = backbone.image_size
    assert backbone.in_chans == backbone.spec["in_chans"] == channels
    assert backbone.features(backbone.preprocess(torch.rand(1, channels, size, size))).patches.isfinite().all()


@pytest.mark.parametrize(
    ("name", "patch_size", "image_size"),
    [
        ("swin_tiny_patch4_window7_224", 8, 32),
        ("swin_tiny_patch4_window7_224", 16, 64),
        ("convit_tiny", 5, 20),
        ("volo_d1_224", 8, 32),
    ],
)
def test_create_backbone__patch_size_is_that_of_the_output(name, patch_size, image_size):
    options = FAMILIES[name].get("options")
    backbone = create_backbone(name, image_size=image_size, patch_size=patch_size, options=options).eval()
    assert backbone.patch_size == patch_size
    patches = backbone.features(torch.randn(1, 3, image_size, image_size)).patches
    assert patches.shape[1] == (image_size // patch_size) ** 2
    assert from_spec(json.loads(json.dumps(backbone.spec))).spec == backbone.spec


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("swin_tiny_patch4_window7_224", {"patch_size": 12}, "patch_size 12 is not a multiple of 8"),
        ("hiera_tiny_224", {"patch_size": 16}, "tokens of 32 px and no other choice"),
        ("resnet18", {"patch_size": 16}, "tokens of 32 px and no other choice"),
        ("fastvit_t8", {"image_size": 100}, "a multiple of 32"),
        ("convit_tiny", {"options": {"dept": 3}}, "dept"),
        ("convit_tiny", {"options": {"strict_img_size": True}}, "leave it out"),
        ("convit_tiny", {"in_chans": 4}, "pixel_mean .* must hold 4 numbers"),
        ("coat_tiny", {"image_size": 64}, "returns list; tokens .* or one feature map is needed"),
        ("convit_tiny", {"position_resampling": "dino"}, "not a plain ViT, so position_resampling"),
        ("resnet18.nonsense", {}, "cannot be built"),
    ],
)
def test_create_backbone__rejections_are_one_clear_line(name, arguments, message):
    with pytest.raises(BackboneError, match=message) as caught:
        create_backbone(name, **arguments)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_create_backbone__unused_parameters_are_frozen():
    class Model(nn.Module):
        def __init__(self, num_classes: int, in_chans: int) -> None:
            super().__init__()
            self.stem, self.idle = nn.Conv2d(in_chans, 8, 4, 4), nn.Linear(8, 8)

        def forward_features(self, x):
            return self.stem(x)

    backbone = TimmBackbone(
        Model(0, 3), library="test", name="test", image_size=16, options={}, in_chans=3,
        pixel_mean=[0.5] * 3, pixel_std=[0.5] * 3,
    )  # fmt: skip
    assert backbone.unused == ("idle.weight", "idle.bias")
    assert not backbone.model.idle.weight.requires_grad and backbone.model.stem.weight.requires_grad
    assert (backbone.patch_size, backbone.grid, backbone.training) == (4, (4, 4), True)


def test_create_backbone__dry_run_leaves_no_trace():
    backbone = create_backbone("fastvit_t8", image_size=64)
    state = torch.get_rng_state()
    norms = [module for module in backbone.modules() if isinstance(module, nn.BatchNorm2d)]
    backbone.grid_at(96, 96)
    assert torch.equal(torch.get_rng_state(), state)
    assert norms and all(norm.training and int(norm.num_batches_tracked) == 0 for norm in norms)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_create_backbone__a_tag_chooses_the_sizes_of_its_variant():
    assert create_backbone("convnext_atto.d2_in1k").image_size == 224
    assert isinstance(create_backbone("vit_tiny_patch16_224.augreg_in21k", options={"depth": 1}), ViTBackbone)


def test_flags__plain_vit_can_do_everything():
    vit = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options={"depth": 1})
    assert vit.can_drop_patches and vit.has_cls and vit.has_plain_blocks
    assert vit.grid_at(8, 12) == (2, 3)
    with pytest.raises(BackboneError, match="10 x 8 px is not a multiple of patch_size 4"):
        vit.grid_at(10, 8)
    bare = create_backbone("vit_tiny_patch16_224", options={"depth": 1, "class_token": False})
    assert not bare.has_cls
