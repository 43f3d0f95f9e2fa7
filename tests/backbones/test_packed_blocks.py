"""Crops of several sizes in one pass, against one pass per size."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import ParallelThingsBlock
from torch import Tensor

from backbones.errors import BackboneError
from backbones.images import timm_internals
from backbones.images.packed_blocks import BlockDraw, Crops
from backbones.images.vit import ViTBackbone
from backbones.registry import create_backbone
from pretrain.training.blocks import recompute_blocks

ROPE = json.loads((Path(__file__).parents[1] / "golden" / "dinov3.json").read_text())["rope"]
SMALL = {"embed_dim": 32, "depth": 3, "num_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224 scaled": {"init_values": 0.5, "reg_tokens": 2, "qk_norm": True},
    "vit_small_patch16_dinov3_qkvb": {"num_reg_tokens": 1, "init_values": 0.5},
    "vit_small_patch16_dinov3": {"num_reg_tokens": 0, "init_values": 0.5},
    "vit_small_plus_patch16_dinov3": {"num_reg_tokens": 4},
    "vit_small_patch16_dinov3 rope": {"attn_type": "rope", "num_reg_tokens": 0},
    "eva02_tiny_patch14_224": {},
    "vit_small_patch16_rope_mixed_224": {},
}


def backbone_of(name: str) -> ViTBackbone:
    torch.manual_seed(0)
    backbone = create_backbone(name.split()[0], image_size=16, patch_size=4, options=SMALL | MODELS[name])
    assert isinstance(backbone, ViTBackbone)
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    backbone.pack_blocks()
    return backbone


def crops_of(batch: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, 3, size, size, generator=generator) for count, size in ((batch, 16), (2 * batch, 8))]


@pytest.mark.parametrize("name", MODELS)
def test_streams__are_those_of_one_pass_per_size(name: str) -> None:
    backbone, crops = backbone_of(name), crops_of()
    packed = backbone.streams([Crops(images) for images in crops])
    for images, stream in zip(crops, packed, strict=True):
        alone = backbone.features(images)
        found = backbone.read_out(stream, alone.grid)
        torch.testing.assert_close(found.tokens, alone.tokens, rtol=1e-5, atol=1e-5)
        assert found.cls is not None and alone.cls is not None
        torch.testing.assert_close(found.cls, alone.cls, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224 scaled", "vit_small_patch16_dinov3_qkvb"])
def test_streams__a_branch_that_is_left_out_is_scaled_in_the_others(name: str) -> None:
    """Against the whole branch, zeroed for who is left out: what sub-batches save is time only."""
    backbone, crops = backbone_of(name), crops_of(4)
    attention, mlp = torch.tensor([2, 0]), torch.tensor([1, 2, 3])
    few = [[BlockDraw(None, attention, mlp), BlockDraw()]] + [[BlockDraw(), BlockDraw()]] * 2
    found = backbone.streams([Crops(images) for images in crops], few)

    def dropped(branch: Tensor, chosen: Tensor) -> Tensor:
        scale = torch.zeros(4, 1, 1).index_fill(0, chosen, 4 / len(chosen))
        return branch * scale

    tokens, _, rotary = backbone._embed(crops[0], None)
    for depth, block in enumerate(backbone.vit.blocks):
        table, shape = timm_internals.rotary_at(backbone.vit, rotary, depth), tokens.shape
        branch = timm_internals.attention_branch(block, tokens.flatten(0, 1), [shape], [table]).view(shape)
        tokens = tokens + (branch if depth else dropped(branch, attention))
        branch = timm_internals.mlp_branch(block, tokens.flatten(0, 1)).view(shape)
        tokens = tokens + (branch if depth else dropped(branch, mlp))
    torch.testing.assert_close(found[0], tokens, rtol=1e-5, atol=1e-5)
    alone = backbone.features(crops[1])
    torch.testing.assert_close(backbone.read_out(found[1], (2, 2)).tokens, alone.tokens, rtol=1e-5, atol=1e-5)


def test_streams__a_mask_token_takes_the_place_of_the_patch_and_not_of_its_position() -> None:
    backbone, (images, _) = backbone_of("vit_tiny_patch16_224"), crops_of()
    is_masked, token = torch.zeros(3, 16, dtype=torch.bool), torch.randn(1, 32)
    is_masked[0, 5] = is_masked[2, 0] = True
    tokens, _, _ = backbone._embed(images, None, is_masked, token)
    plain, _, _ = backbone._embed(images, None)
    torch.testing.assert_close(tokens[0, 1 + 5], token[0] + backbone.vit.pos_embed[0, 1 + 5])
    torch.testing.assert_close(tokens[1], plain[1])


def test_streams__blocks_that_are_recomputed_give_the_same_gradient() -> None:
    backbone = backbone_of("vit_small_patch16_dinov3_qkvb")
    crops = [Crops(images) for images in crops_of()]
    draws = [[BlockDraw((torch.rand(2), torch.rand(2)), torch.tensor([1]), None), BlockDraw()]] * 3

    def gradient() -> Tensor:
        backbone.zero_grad()
        sum(stream.square().mean() for stream in backbone.streams(crops, draws)).backward()  # type: ignore[union-attr]
        found: Tensor = backbone.vit.blocks[0].attn.qkv.weight.grad.clone()
        return found

    before = gradient()
    recompute_blocks(list(backbone.vit.blocks))
    assert torch.equal(gradient(), before)


def test_pack_blocks__a_copy_has_blocks_of_its_own() -> None:
    backbone, (images, _) = backbone_of("vit_small_patch16_dinov3"), crops_of()
    twin = copy.deepcopy(backbone)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin.streams([Crops(images)])[0].any()
    assert backbone.streams([Crops(images)])[0].any()


def test_pack_blocks__refuses_blocks_that_it_does_not_know() -> None:
    torch.manual_seed(0)
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, options=SMALL | {"block_fn": ParallelThingsBlock}
    )
    assert isinstance(backbone, ViTBackbone)
    with pytest.raises(BackboneError, match=r"ParallelThingsBlock .* plain pre-norm ViT"):
        backbone.pack_blocks()


def test_moved_rotation__golden_and_timm() -> None:
    backbone = backbone_of("vit_small_patch16_dinov3_qkvb")
    vit, still, whole = backbone.vit, torch.zeros(2), torch.ones(2)
    assert torch.equal(timm_internals.moved_rotation(vit, (2, 3), still, whole), vit.rope.get_embed(shape=[2, 3]))
    sin, cos = timm_internals.moved_rotation(vit, (2, 3), still, whole).chunk(2, dim=-1)
    torch.testing.assert_close(sin, torch.tensor(ROPE["separate_fp32"]["sin"]), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cos, torch.tensor(ROPE["separate_fp32"]["cos"]), rtol=1e-5, atol=1e-6)
    moved = timm_internals.moved_rotation(vit, (2, 3), torch.tensor([0.1, 0.0]), torch.tensor([2.0, 1.0]))
    row = torch.tensor((-0.5 + 0.1) * 2.0)  # the upper row's center is -0.5
    torch.testing.assert_close(moved[0, 0], torch.sin(2 * torch.pi * row), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moved[:, 2:4], vit.rope.get_embed(shape=[2, 3])[:, 2:4])  # columns stay
    vit.rope.normalize_coords = "max"
    torch.testing.assert_close(
        timm_internals.moved_rotation(vit, (2, 3), still, whole)[:, :8],
        torch.tensor(ROPE["max_fp32"]["sin"]),
        rtol=1e-5,
        atol=1e-6,
    )
