from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from backbones.errors import BackboneError
from backbones.features import take_tokens
from backbones.images.positions import sincos_positions
from backbones.registry import create_backbone

SMALL = {"embed_dim": 64, "depth": 2, "num_heads": 2}
# One model of each kind of plain ViT: what differs is the prefix tokens, the positions and the norms.
MODELS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "no class token": ("vit_tiny_patch16_224", {"class_token": False}),
    "registers, positions on patches only": ("vit_small_patch14_reg4_dinov2", {}),
    "registers, positions on all": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "norm before the blocks": ("vit_base_patch16_clip_224", {}),
    "rotary and absolute": ("eva02_tiny_patch14_224", {}),
    "rotary and absolute, separate projections": ("eva02_tiny_patch14_224", {"qkv_fused": False}),
    "rotary only, registers": ("vit_small_patch16_dinov3", {}),
    "rotary only, biases of queries and values": ("vit_small_patch16_dinov3_qkvb", {}),
    "rotary per block": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def backbone(request):
    name, options = request.param
    torch.manual_seed(0)
    backbone = create_backbone(name, image_size=32, patch_size=8, options=SMALL | options).eval()
    with torch.no_grad():  # timm's tokens and layer scales start near zero, which would hide mistakes
        for parameter in backbone.vit.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return backbone


def images(size: int = 32, num: int = 2, channels: int = 3) -> torch.Tensor:
    return torch.randn(num, channels, size, size, generator=torch.Generator().manual_seed(1))


class DropPatches(nn.Module):
    """Stands in for timm's own patch dropout with chosen indices: an independent way to run some patches only."""

    def __init__(self, keep_idx: torch.Tensor, num_prefix: int, returns_idx: bool) -> None:
        super().__init__()
        self.keep_idx, self.num_prefix, self.returns_idx = keep_idx, num_prefix, returns_idx

    def forward(self, tokens):
        kept = take_tokens(tokens[:, self.num_prefix :], self.keep_idx)
        tokens = torch.cat([tokens[:, : self.num_prefix], kept], dim=1)
        return (tokens, self.keep_idx) if self.returns_idx else tokens


def test_features__equal_timms_forward_features(backbone):
    x = images()
    expected = backbone.vit.forward_features(x)
    features = backbone.features(x)
    torch.testing.assert_close(backbone.forward_features(x), expected)
    torch.testing.assert_close(backbone(x), expected)
    prefix = backbone.num_prefix_tokens
    torch.testing.assert_close(features.patches, expected[:, prefix:])
    assert features.grid == (4, 4)
    assert (features.cls is None) == (backbone.vit.cls_token is None)
    if features.cls is not None:
        torch.testing.assert_close(features.cls, expected[:, 0])
    num_registers = 0 if features.registers is None else features.registers.shape[1]
    assert num_registers + (features.cls is not None) == prefix
    if features.registers is not None:
        torch.testing.assert_close(features.registers, expected[:, prefix - num_registers : prefix])


def test_features__other_image_size_interpolates_as_timm(backbone):
    x = images(48)
    features = backbone.features(x)
    assert features.grid == (6, 6)
    torch.testing.assert_close(features.patches, backbone.vit.forward_features(x)[:, backbone.num_prefix_tokens :])


def test_features__kept_patches_equal_timms_patch_dropout(backbone):
    x = images()
    keep_idx = torch.tensor([[5, 0, 12], [3, 15, 4]])
    features = backbone.features(x, keep_idx)
    rotary = hasattr(backbone.vit, "rope")
    backbone.vit.patch_drop = DropPatches(keep_idx, backbone.num_prefix_tokens, returns_idx=rotary)
    expected = backbone.vit.forward_features(x)
    torch.testing.assert_close(features.patches, expected[:, backbone.num_prefix_tokens :])
    if features.cls is not None:
        torch.testing.assert_close(features.cls, expected[:, 0])


def test_features__dropped_patches_neither_run_nor_matter(backbone):
    seen = []
    for block in backbone.vit.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    x = images().requires_grad_()
    backbone.features(x, torch.tensor([[0, 5], [0, 5]])).patches.square().sum().backward()
    assert seen == [backbone.num_prefix_tokens + 2] * 2
    used = x.grad.abs().sum(dim=(0, 1)).reshape(4, 8, 4, 8).sum(dim=(1, 3)).flatten() > 0  # (16,) per patch
    assert used.nonzero().flatten().tolist() == [0, 5]


def test_features__all_patches_kept_are_the_patches_of_a_rectangle():
    """Kept patches are cut out and embedded one by one; nothing but rounding may come of that."""
    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options=SMALL).eval()
    x = torch.randn(2, 3, 16, 40)
    every = torch.arange(10).expand(2, -1)
    torch.testing.assert_close(backbone.features(x, every).patches, backbone.features(x).patches, rtol=1e-5, atol=1e-5)


def test_features__follow_the_order_of_keep_idx(backbone):
    x = images()
    order = torch.stack([torch.randperm(16, generator=torch.Generator().manual_seed(s)) for s in (2, 3)])
    expected = take_tokens(backbone.features(x).patches, order)
    torch.testing.assert_close(backbone.features(x, order).patches, expected, atol=2e-5, rtol=1e-4)


def test_features__recomputation_gives_the_same_gradients(backbone):
    keep_idx = torch.tensor([[5, 0, 12], [3, 15, 4]])
    gradients = []
    for recompute in (False, True):
        backbone.vit.set_grad_checkpointing(recompute)
        backbone.zero_grad()
        backbone.features(images(), keep_idx).patches.square().mean().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert len(gradients[0]) > 20
    torch.testing.assert_close(gradients[0], gradients[1])


def test_features__bf16_weights_with_float32_positions(backbone):
    backbone.fix_sincos_positions()
    expected = backbone.features(images())
    for parameter in backbone.parameters():  # what a bf16 engine does: parameters, not buffers
        parameter.data = parameter.data.bfloat16()
    features = backbone.features(images())
    assert features.patches.dtype == torch.bfloat16
    error = (features.patches.float() - expected.patches).norm() / expected.patches.norm()
    assert error < 0.05


@pytest.mark.parametrize("patch_size", [1, 3, 5, 7])
def test_features__any_patch_size(patch_size):
    size = patch_size * 4
    backbone = create_backbone("vit_tiny_patch16_224", image_size=size, patch_size=patch_size, options=SMALL)
    backbone.fix_sincos_positions()
    assert backbone.features(images(size)).patches.shape == (2, 16, 64)


@pytest.mark.parametrize("channels", [1, 2, 6])
def test_features__any_number_of_channels(channels):
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=8, in_chans=channels, options=SMALL,
        pixel_mean=[0.5] * channels, pixel_std=[0.25] * channels,
    )  # fmt: skip
    x = backbone.preprocess(torch.full((2, channels, 16, 16), 255, dtype=torch.uint8))
    torch.testing.assert_close(x, torch.full_like(x, 2.0))
    assert backbone.features(x).patches.shape == (2, 4, 64)


def test_preprocess__types_and_values():
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=SMALL)
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    from_bytes = backbone.preprocess(pixels)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = (pixels.double() / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(from_bytes.double(), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(backbone.preprocess(pixels / 255), from_bytes)
    assert from_bytes.dtype == backbone.preprocess((pixels / 255).bfloat16()).dtype == torch.float32
    assert backbone.preprocess(pixels.double() / 255).dtype == torch.float64
    assert "pixel_mean" not in backbone.state_dict()


def test_sincos_positions__golden_rows():
    golden = json.loads((Path(__file__).parent.parent / "golden" / "mae.json").read_text())["mae"]["encoder_pos_embed"]
    table = sincos_positions(64, (8, 8)).double()
    # The file counts the class token as row 0, and its row of zeros takes part in the mean.
    assert table.sum().item() / (65 * 64) == pytest.approx(golden["mean"], rel=1e-9)
    assert table.norm().item() == pytest.approx(golden["l2"], rel=1e-9)
    for row in (1, 2, 9):
        assert table[row - 1, :8].tolist() == pytest.approx(golden[f"row{row}_first8"], rel=1e-9)


def test_sincos_positions__column_before_row_on_a_rectangle():
    table = sincos_positions(8, (2, 3)).double()
    frequency = torch.tensor([1.0, 0.01], dtype=torch.float64)
    row, column = 1, 2
    expected = torch.cat([f(i * frequency) for i in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(table[row * 3 + column], expected, atol=1e-7, rtol=0)


def test_sincos_positions__width_must_be_a_multiple_of_four():
    with pytest.raises(BackboneError, match="not 30"):
        sincos_positions(30, (2, 2))


def test_fix_sincos_positions__same_key_but_a_float32_buffer(backbone):
    before = {name: tensor.shape for name, tensor in backbone.timm_state_dict().items()}
    learned = backbone.vit.pos_embed is not None
    backbone.fix_sincos_positions()
    assert {name: tensor.shape for name, tensor in backbone.timm_state_dict().items()} == before
    assert "vit.pos_embed" not in dict(backbone.named_parameters())
    if learned:
        table = dict(backbone.named_buffers())["vit.pos_embed"]
        num_prefix = table.shape[1] - 16
        assert table.dtype == torch.float32
        assert table[:, :num_prefix].abs().sum() == 0
        torch.testing.assert_close(table[0, num_prefix:], sincos_positions(64, (4, 4)))


def test_timm_state_dict__loads_strictly_into_a_plain_timm_model(backbone):
    backbone.fix_sincos_positions()
    spec = backbone.spec
    plain = timm.create_model(
        spec["name"], img_size=32, patch_size=8, num_classes=0, global_pool="", **spec["options"]
    ).eval()
    plain.load_state_dict(backbone.timm_state_dict(), strict=True)
    torch.testing.assert_close(plain.forward_features(images()), backbone.forward_features(images()))


def test_layer_ids__stem_blocks_norm():
    backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=8, options=SMALL | {"reg_tokens": 1})
    ids = backbone.layer_ids()
    assert {ids[name] for name in ("cls_token", "reg_token", "pos_embed", "patch_embed.proj.bias")} == {0}
    assert ids["blocks.0.norm1.weight"] == 1
    assert ids["blocks.1.mlp.fc2.bias"] == 2
    assert ids["norm.weight"] == 2
    assert ids.keys() == dict(backbone.vit.named_parameters()).keys()


POOLED = [
    ("vit_tiny_patch16_224", {}),
    ("vit_tiny_patch16_224", {"reg_tokens": 2, "qk_norm": True, "init_values": 0.1}),
    ("vit_tiny_patch16_224", {"drop_path_rate": 0.5}),
    ("vit_small_patch16_dinov3_qkvb", {"num_reg_tokens": 2, "init_values": 0.1}),
    ("vit_small_patch16_rope_224", {}),  # another attention
    ("vit_tiny_patch16_224", {"class_token": False}),
]


@pytest.mark.parametrize(("name", "options"), POOLED)
def test_pooled__is_what_features_say_and_so_are_its_gradients(name, options):
    options = {"depth": 3, "embed_dim": 48, "num_heads": 3, **options}
    vit = create_backbone(name, image_size=32, patch_size=8, options=options).train()
    vit.prepare_pooled()
    x = torch.randn(4, 3, 16, 32)
    found = []
    for encode in (lambda x: vit.features(x).pooled, vit.pooled):
        torch.manual_seed(0)  # of stochastic depth
        vector = encode(x)
        (vector * torch.arange(48)).sum().backward()
        found.append((vector, {name: parameter.grad for name, parameter in vit.named_parameters()}))
        vit.zero_grad()
    (whole, gradients), (alone, others) = found
    torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-3, rtol=1e-4, msg=name)


def test_pooled__the_last_mlp_sees_the_class_token_alone():
    vit = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 2})
    vit.prepare_pooled()
    vit = copy.deepcopy(vit)  # as a teacher's, which must not compute with the student's weights
    shapes = []
    for block in vit.network.blocks:
        block.mlp.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape)))
    assert vit.pooled(torch.zeros(2, 3, 32, 32)).shape == (2, 192)
    assert shapes == [(2, 17, 192), (2, 1, 192)]


def test_pooled__runs_the_hooks_of_the_last_block():
    """Engines gather the weights of a block in them."""
    vit = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 2})
    vit.prepare_pooled()
    calls = []
    vit.network.blocks[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    vit.pooled(torch.zeros(1, 3, 32, 32))
    assert calls == [1]


def test_pooled__recomputes_its_blocks_where_the_others_do():
    vit = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=8, options={"depth": 2})
    vit.prepare_pooled()
    x = torch.randn(2, 3, 32, 32)
    expected = vit.pooled(x)
    vit.network.set_grad_checkpointing(True)
    calls = []
    vit.network.blocks[-1].norm1.register_forward_hook(lambda *_: calls.append(1))
    vector = vit.pooled(x)
    torch.testing.assert_close(vector, expected)
    vector.sum().backward()
    assert len(calls) == 2
