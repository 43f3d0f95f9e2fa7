from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from backbones import load_backbone, save_backbone
from backbones.errors import BackboneError
from backbones.features import take_tokens
from backbones.registry import config_class, create_backbone, from_config, from_spec, names_of_kind
from backbones.voxels.base import Cover, VoxelEncoder, alpha_of_density
from backbones.voxels.patches import from_patches, padded_to, to_patches
from backbones.voxels.positions import sincos_positions_3d
from backbones.voxels.swin import VoxelSwin, _Merging, _WindowAttention
from backbones.voxels.vit import VoxelVit

VIT = {"size": [16, 24, 8], "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
SWIN = {"size": [16, 32, 16], "embed_dim": 12, "depths": [2, 1, 2], "num_heads": [1, 2, 4]}
BOTH = pytest.mark.parametrize(("name", "settings"), [("voxel_vit", VIT), ("voxel_swin", SWIN)])


def encoder(name: str = "voxel_vit", **settings: object) -> VoxelEncoder:
    torch.manual_seed(0)
    return create_backbone(name, kind="voxels", **(VIT if name == "voxel_vit" else SWIN) | settings).eval()


def volumes(*size: int, channels: int = 1, num: int = 2) -> torch.Tensor:
    return torch.rand(num, channels, *size, generator=torch.Generator().manual_seed(1))


# --- what both are ---------------------------------------------------------------------------------------------------


@BOTH
def test_voxels__spec_and_weights_come_back(name: str, settings: dict, tmp_path: Path) -> None:
    backbone = encoder(name)
    again = from_spec(json.loads(json.dumps(backbone.spec)))
    assert again.spec == backbone.spec and again.kind == "voxels"
    save_backbone(tmp_path / "backbone.safetensors", backbone.weights(), backbone.spec)
    loaded = load_backbone(tmp_path)
    x = volumes(*settings["size"], channels=backbone.in_chans)
    assert torch.equal(loaded.tokens(x).tokens, backbone.tokens(x).tokens)


def test_voxels__are_known_by_name_and_their_settings_by_a_dataclass() -> None:
    assert {"voxel_swin", "voxel_vit"} <= set(names_of_kind("voxels"))
    config = config_class("voxels", "voxel_vit")(**VIT)
    assert isinstance(from_config(config), VoxelVit)
    with pytest.raises(BackboneError, match="did you mean 'voxel_vit'"):
        create_backbone("voxel_vitt", kind="voxels")


@BOTH
def test_voxels__tokens_are_row_major_on_their_grid(name: str, settings: dict) -> None:
    backbone = encoder(name)
    features = backbone.tokens(volumes(*settings["size"], channels=backbone.in_chans))
    assert features.grid == backbone.grid == tuple(side // backbone.token_size for side in settings["size"])
    assert features.tokens.shape == (2, backbone.num_patches, backbone.embed_dim)
    assert features.cls is None and not backbone.has_cls and features.pooled.shape == (2, backbone.embed_dim)


@BOTH
def test_voxels__bytes_are_floats_by_255_and_both_are_standardized(name: str, settings: dict) -> None:
    channels = encoder(name).in_chans
    mean, std = [0.1 * (number + 1) for number in range(channels)], [0.5] * channels
    backbone = encoder(name, voxel_mean=mean, voxel_std=std)
    levels = torch.randint(0, 256, (2, channels, *settings["size"]), dtype=torch.uint8)
    wanted = (levels.float() / 255 - torch.tensor(mean).view(-1, 1, 1, 1)) / 0.5
    torch.testing.assert_close(backbone.normalized(levels), wanted)
    torch.testing.assert_close(backbone.normalized(levels.double() / 255), wanted.double(), rtol=0, atol=1e-6)
    assert backbone.normalized(levels.half()).dtype == torch.float32


@BOTH
def test_voxels__a_window_comes_before_mean_and_deviation_and_padding_is_empty(name: str, settings: dict) -> None:
    channels = encoder(name).in_chans
    backbone = encoder(name, voxel_window=[-100.0, 300.0], voxel_mean=[0.5] * channels, voxel_std=[0.25] * channels)
    units = volumes(*settings["size"], channels=channels) * 800 - 300
    size = torch.tensor([settings["size"], [5, 6, 7]])
    wanted = ((units + 100) / 400).clamp(0, 1)
    wanted[1, :, 5:], wanted[1, :, :, 6:], wanted[1, :, :, :, 7:] = 0, 0, 0
    torch.testing.assert_close(backbone.normalized(units, size), (wanted - 0.5) / 0.25)
    plain = encoder(name, voxel_mean=[0.5] * channels, voxel_std=[0.25] * channels)
    shown = backbone.tokens({"volume": units, "size": size}).tokens
    torch.testing.assert_close(shown, plain.tokens({"volume": wanted, "size": size}).tokens)
    levels = (units.clamp(0, 255)).to(torch.uint8)
    torch.testing.assert_close(backbone.scaled(levels), (levels.float() + 100) / 400)


@BOTH
def test_voxels__volumes_of_other_sizes_are_padded_at_the_high_end(name: str, settings: dict) -> None:
    backbone = encoder(name)
    x = volumes(15, 40, 9, channels=backbone.in_chans)
    features, edge = backbone.features(x), backbone.token_size
    sides = [-(-side // edge) * edge for side in x.shape[2:]]
    assert features.grid == tuple(side // edge for side in sides)
    assert torch.equal(features.tokens, backbone.features(padded_to(x, sides)).tokens)


@BOTH
def test_voxels__layers_are_counted_from_the_stem_to_the_last_block(name: str, settings: dict) -> None:
    backbone = encoder(name)
    ids = backbone.layer_ids()
    assert ids.keys() == dict(backbone.named_parameters()).keys()
    assert set(ids.values()) == set(range((2 if name == "voxel_vit" else 5) + 1))
    assert ids["patch_embed.weight"] == 0


REFUSED = {
    "another size": ("voxel_vit", {"size": [16, 20, 8]}, r"size \[16, 20, 8\] .* multiple of 8 .* \[16, 16, 8\] or"),
    "two sides": ("voxel_vit", {"size": [16, 16]}, "must be three numbers"),
    "heads": ("voxel_vit", {"num_heads": 5}, "embed_dim 48 is no multiple of num_heads 5"),
    "width": ("voxel_vit", {"embed_dim": 51}, "even and at least 6, not 51"),
    "mean": ("voxel_vit", {"voxel_mean": [0.5, 0.5]}, "voxel_mean .* must hold 1 numbers"),
    "deviation": ("voxel_vit", {"voxel_std": [0.0]}, "voxel_std .* 1 positive numbers"),
    "density": ("voxel_vit", {"density": "log_density"}, "only the fourth of 4 channels is converted"),
    "mergings": ("voxel_swin", {"size": [24, 32, 32]}, r"multiple of 16 voxels, .* \[16, 32, 32\] or \[32, 32, 32\]"),
    "stages": ("voxel_swin", {"num_heads": [1, 2]}, r"depths \[2, 1, 2\] need as many num_heads, not \[1, 2\]"),
    "heads of a stage": ("voxel_swin", {"num_heads": [1, 5, 4]}, r"widths? of its stage: \[12, 24, 48\]"),
    "window": ("voxel_swin", {"window": 3}, "window 3 is odd"),
    "window of values": ("voxel_vit", {"voxel_window": [1.0]}, r"voxel_window \[1.0\] must be \[low, high\]"),
    "empty window": ("voxel_vit", {"voxel_window": [2.0, 2.0]}, "with low < high, or .* for none"),
}


@pytest.mark.parametrize(("name", "settings", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_voxels__rejections_are_one_clear_line(name: str, settings: dict, message: str) -> None:
    with pytest.raises(BackboneError, match=message) as caught:
        encoder(name, **settings)
    assert "\n" not in str(caught.value) and name in str(caught.value).replace("sin-cos positions", name)


def test_voxels__batches_of_another_shape_are_refused() -> None:
    for wrong in (volumes(16, 24, 8, channels=2), torch.rand(1, 16, 24, 8)):
        with pytest.raises(BackboneError, match=r"set backbone\.in_chans to the channels of the data"):
            encoder().tokens(wrong)


def test_density__only_the_fourth_channel_becomes_alpha_once() -> None:
    grids = volumes(16, 32, 16, channels=4) * 4
    backbone = encoder("voxel_swin", density="relu_density", density_step=0.5)
    scaled = backbone.scaled(grids)
    assert torch.equal(scaled[:, :3], grids[:, :3])
    torch.testing.assert_close(scaled[:, 3], 1 - torch.exp(-grids[:, 3] * 0.5))
    torch.testing.assert_close(encoder("voxel_swin").scaled(grids), grids)
    assert alpha_of_density(torch.tensor([-1.0, 0.0]), "relu_density").tolist() == [0.0, 0.0]


# --- positions and patches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [6, 24, 64, 128, 130])
def test_positions__are_those_of_a_loop_for_any_even_width(dim: int) -> None:
    table = sincos_positions_3d(dim, (2, 3, 4)).view(2, 3, 4, dim)
    counts = [dim // 6 + (number < dim // 2 % 3) for number in range(3)]
    assert 2 * sum(counts) == dim
    for place in np.ndindex(2, 3, 4):
        wanted: list[float] = []
        for axis, count in zip((1, 0, 2), counts, strict=True):
            angles = place[axis] * 10000.0 ** (-np.arange(count) / count)
            wanted += [*np.sin(angles), *np.cos(angles)]
        assert table[place].tolist() == pytest.approx(wanted, abs=1e-6)


def test_positions__of_a_smaller_grid_begin_those_of_a_larger_one() -> None:
    large = sincos_positions_3d(24, (4, 5, 6)).view(4, 5, 6, 24)
    assert torch.equal(large[:2, :3, :4], sincos_positions_3d(24, (2, 3, 4)).view(2, 3, 4, 24))


def test_patches__are_cubes_in_row_major_order() -> None:
    x = volumes(4, 6, 8, channels=3)
    patches = to_patches(x, 2)
    assert patches.shape == (2, 2 * 3 * 4, 3 * 8)
    assert torch.equal(patches[1, 1 * 12 + 2 * 4 + 3], x[1, :, 2:4, 4:6, 6:8].flatten())
    assert torch.equal(from_patches(patches, (2, 3, 4), 2), x)


def test_padding__adds_zeros_behind() -> None:
    x = volumes(3, 4, 5)
    padded = padded_to(x, [4, 4, 8])
    assert padded.shape == (2, 1, 4, 4, 8) and torch.equal(padded[:, :, :3, :, :5], x)
    assert padded.count_nonzero() == x.count_nonzero() and padded_to(x, [3, 4, 5]) is x


# --- the plain ViT ---------------------------------------------------------------------------------------------------


def test_vit__all_tokens_in_another_order_are_the_same_tokens() -> None:
    backbone = encoder()
    x = volumes(16, 24, 8)
    order = torch.stack([torch.randperm(6), torch.randperm(6)])
    kept = backbone.features(x, order)
    torch.testing.assert_close(kept.tokens, take_tokens(backbone.features(x).tokens, order))
    assert kept.grid == (2, 3, 1)


def test_vit__what_is_left_out_changes_nothing() -> None:
    backbone = encoder()
    x = volumes(16, 24, 8)
    keep_idx = torch.tensor([[0, 4], [3, 1]])
    before = backbone.features(x, keep_idx).tokens
    patches = to_patches(x, 8)
    is_kept = torch.zeros(2, 6, dtype=torch.bool).scatter(1, keep_idx, True)
    changed = from_patches(torch.where(is_kept[..., None], patches, 9.0), (2, 3, 1), 8)
    assert torch.equal(backbone.features(changed, keep_idx).tokens, before)


def test_vit__embeds_patches_as_a_convolution_does() -> None:
    backbone = encoder()
    x = volumes(16, 24, 8)
    weight = backbone.patch_embed.weight.view(48, 1, 8, 8, 8)
    convolved = torch.nn.functional.conv3d(x, weight, backbone.patch_embed.bias, stride=8).flatten(2).mT
    torch.testing.assert_close(backbone.patch_embed(to_patches(x, 8)), convolved, rtol=1e-4, atol=1e-5)


# --- the Swin transformer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("size", [(4, 4, 4), (6, 9, 7), (8, 5, 4)])
def test_swin__attention_is_torchvisions_wherever_a_window_fits(size: tuple[int, int, int], shift: int) -> None:
    torch.manual_seed(0)
    ours = _WindowAttention(12, [4] * 3, [shift] * 3, 3)
    theirs = ShiftedWindowAttention3d(12, [4] * 3, [shift] * 3, 3)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    x = torch.rand(2, *size, 12)
    assert torch.equal(ours(x), theirs(x))


def test_swin__attention_of_fewer_tokens_sees_zeros_beside_them() -> None:
    torch.manual_seed(0)
    attention = _WindowAttention(12, [4] * 3, [2] * 3, 3)
    x = torch.rand(2, 2, 1, 4, 12)
    padded = torch.zeros(2, 4, 4, 4, 12)
    padded[:, :2, :1] = x
    torch.testing.assert_close(attention(x), attention(padded)[:, :2, :1])


def test_swin__merging_joins_cubes_with_the_first_axis_fastest() -> None:
    merging = _Merging(3)
    x = torch.rand(1, 4, 2, 2, 3)
    cube = x[0, 2:4]
    order = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]
    joined = torch.cat([cube[place] for place in order])
    torch.testing.assert_close(merging(x)[0, 1, 0, 0], merging.reduction(merging.norm(joined)))


def test_swin__stages_halve_the_resolution_and_are_the_levels() -> None:
    backbone = encoder("voxel_swin")
    assert isinstance(backbone, VoxelSwin)
    x = volumes(16, 32, 16, channels=4)
    stages = backbone.stages(x)
    assert [tuple(stage.shape[1:]) for stage in stages] == [(4, 8, 4, 12), (2, 4, 2, 24), (1, 2, 1, 48)]
    levels = backbone.features(x).levels
    assert all(torch.equal(stage.flatten(1, 3), level) for stage, level in zip(stages, levels, strict=True))
    with pytest.raises(BackboneError, match="cannot leave tokens out"):
        backbone.features(x, torch.zeros(2, 1, dtype=torch.int64))


def test_swin__a_covered_token_says_nothing_of_what_it_covers() -> None:
    backbone = encoder("voxel_swin")
    x, token = volumes(16, 32, 16, channels=4), torch.randn(12)
    is_masked = torch.zeros(2, 4, 8, 4, dtype=torch.bool)
    is_masked[:, 1, 2, 3] = True
    changed = x.clone()
    changed[:, :, 4:8, 8:12, 12:16] = 7.0
    covered = [backbone.stages(values, Cover(is_masked, token)) for values in (x, changed)]
    assert all(torch.equal(one, other) for one, other in zip(*covered, strict=True))
    assert not torch.equal(covered[0][0], backbone.stages(x)[0])


def test_swin__stochastic_depth_skips_branches_by_given_numbers() -> None:
    backbone = encoder("voxel_swin", drop_path=0.5)
    assert isinstance(backbone, VoxelSwin)
    x = volumes(16, 32, 16, channels=4)
    all_run = torch.zeros(2, 5, 2)  # noise below any share that stays
    one_skips = all_run.clone()
    one_skips[0, 4] = 0.75  # both branches of the last block, whose samples stay with probability 0.5
    run, skipped = backbone.stages(x, branch_noise=all_run), backbone.stages(x, branch_noise=one_skips)
    assert torch.equal(run[1], skipped[1]) and torch.equal(run[2][1], skipped[2][1])
    assert not torch.equal(run[2][0], skipped[2][0])
    block = backbone.layers[2].blocks[1]
    torch.testing.assert_close(block(x_in := torch.rand(1, 1, 2, 1, 48), torch.zeros(2, 1)), x_in)
    noise = torch.rand(4000, 5, 2)
    scales = backbone._branch_scales(noise)
    assert scales.shape == (5, 2, 4000) and (scales[0] == 1).all()
    torch.testing.assert_close(scales.mean((1, 2)), torch.ones(5), rtol=0, atol=0.05)
    assert (scales[4] == 0).float().mean() == pytest.approx(0.5, abs=0.03)


def test_swin__weights_are_the_authors() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("voxel_swin", kind="voxels", size=[32] * 3, embed_dim=48, depths=[2], num_heads=[3])
    linear = backbone.layers[0].blocks[0].mlp[0]
    assert linear.weight.std().item() == pytest.approx(0.02, rel=0.05) and not linear.bias.any()
    assert backbone.layers[0].blocks[0].attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
