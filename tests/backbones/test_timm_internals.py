"""Touches every name of timm that is not its public interface, so that an upgrade fails here and says which is gone."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import Attention
from torch import nn

from backbones.images import timm_internals as internals

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 0}
MODELS = {
    "class token": ("vit_tiny_patch16_224", {"reg_tokens": 2}),
    "rotary": ("vit_small_patch16_dinov3", {}),
    "rotary per block": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def vit(request) -> nn.Module:
    name, options = request.param
    torch.manual_seed(0)
    return timm.create_model(name, dynamic_img_size=True, global_pool="", **TINY, **options).eval()


def test_vit__has_every_attribute_that_is_read(vit):
    lacking = [name for name in internals.VIT_ATTRIBUTES if not hasattr(vit, name)]
    assert lacking == []
    assert all(hasattr(vit.patch_embed, name) for name in ("img_size", "patch_size", "proj"))
    assert all(callable(getattr(vit, name)) for name in ("_pos_embed", "forward_features"))
    if hasattr(vit, "rope"):
        assert callable(vit.rope.get_embed) and isinstance(vit.rope_mixed, bool)
    assert internals.is_plain_vit(vit)
    sizes = internals.vit_sizes(vit)
    assert (sizes.image, sizes.patch, sizes.width, sizes.in_chans, sizes.num_blocks) == ((16, 16), (4, 4), 32, 3, 2)


def test_model_arguments__are_those_that_the_factory_was_given(vit):
    given = internals.model_arguments(vit)
    assert TINY.items() <= given.items() and given["dynamic_img_size"] is True


def test_vit__its_parts_make_its_forward_features(vit):
    x = torch.randn(2, 3, 16, 16)
    tokens, grid = internals.embedded_patches(vit, x)
    assert grid == (4, 4)
    prefix, positions = internals.prefix(vit), vit.pos_embed
    parts = [tokens] if prefix is None else [prefix.expand(2, -1, -1), tokens]
    tokens = torch.cat(parts, dim=1)
    if positions is not None:
        skipped = 0 if internals.vit_sizes(vit).positions_on_prefix else internals.vit_sizes(vit).num_prefix
        tokens = tokens + nn.functional.pad(positions, (0, 0, skipped, 0))
    tokens = internals.enter_blocks(vit, tokens)
    rotary = internals.rotations(vit, tokens, grid, None)
    *_, last = internals.block_outputs(vit, tokens, rotary)
    torch.testing.assert_close(internals.final_norm(vit, last), vit.forward_features(x))
    kept = internals.rotations(vit, tokens, grid, torch.tensor([[0, 5], [2, 1]]))
    assert (kept is None) == (rotary is None)


def test_attention__has_every_name_that_is_read():
    attention = Attention(8, num_heads=2, qkv_bias=True)
    assert all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "scale", "num_heads"))
    vit = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, global_pool="", **TINY).eval()
    assert isinstance(vit.blocks[-1].attn, Attention)
    attended = internals.class_attention(vit, torch.randn(2, 17, 32), None)
    torch.testing.assert_close(attended.sum(-1), torch.ones(2, 2))


def test_registered_names__are_those_of_timms_own_list():
    (place,) = find_spec("timm").submodule_search_locations
    assert internals.registered_names(Path(place) / "models") == set(timm.list_models())
