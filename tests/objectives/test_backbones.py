"""Objectives on every family of backbones: one training step each, and what cannot run says why in one line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from backbones.encoder import Encoder
from backbones.errors import BackboneError
from backbones.features import Features
from backbones.registry import create_backbone
from objectives import registry
from objectives.base import Objective, Progress
from objectives.errors import ObjectiveError
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE, patchify
from objectives.requirements import require, require_sizes

START = Progress(step=0, total_steps=1)
LIGHT = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL_SWIN = {"depths": [1, 1, 2, 1], "embed_dim": 24}

PLAIN: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"image_size": 32, "patch_size": 8, "options": TINY},
    "vit_small_patch14_reg4_dinov2": {"image_size": 28, "patch_size": 7, "options": TINY},
    "vit_small_patch16_dinov3": {"image_size": 32, "patch_size": 8, "options": TINY},
    "vit_small_patch16_rope_mixed_224": {"image_size": 32, "patch_size": 8, "options": TINY},
}
OTHERS: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {"image_size": 64, "patch_size": 16, "options": SMALL_SWIN},
    "convit_tiny": {"image_size": 32, "patch_size": 8, "options": {"depth": 4, "local_up_to_layer": 3}},
    "crossvit_tiny_240": {"image_size": 120},
    "volo_d1_224": {"image_size": 32, "patch_size": 8},
    "vitamin_small_224": {"image_size": 64},
    "hiera_tiny_224": {"image_size": 64, "options": {"embed_dim": 24, "stages": [1, 1, 2, 1]}},
    "fastvit_t8": {"image_size": 64},
}
NO_CLASS_TOKEN = {"swin_tiny_patch4_window7_224", "vitamin_small_224", "hiera_tiny_224", "fastvit_t8"}
FIXED_SIZE = {"convit_tiny", "crossvit_tiny_240", "volo_d1_224", "hiera_tiny_224"}


def build(name: str, **config: Any) -> MAE:
    torch.manual_seed(0)
    light = {} if config.get("masking") == "token" else LIGHT
    return MAE(create_backbone(name, **(PLAIN | OTHERS)[name]), MAEConfig(**light | config))


def batch_of(mae: MAE, num: int = 4) -> dict[str, torch.Tensor]:
    backbone, generator = mae.backbone, torch.Generator().manual_seed(1)
    size = (num, backbone.in_chans, backbone.image_size, backbone.image_size)
    coarse = torch.rand(*size[:2], 4, 4, generator=generator)
    images = torch.nn.functional.interpolate(coarse, size=size[2:], mode="bilinear")
    return {"image": (images * 255).to(torch.uint8), "seed": torch.arange(num)}


@pytest.mark.parametrize(
    ("name", "masking"),
    [*((name, masking) for name in PLAIN for masking in ("auto", "token")), *((name, "auto") for name in OTHERS)],
)
def test_mae__one_step_on_every_family(name, masking):
    mae = build(name, masking=masking)
    assert mae.drops is (name in PLAIN and masking == "auto")
    optimizer = torch.optim.AdamW(mae.param_groups(0.05, layer_decay=0.9), lr=1e-3)
    output = mae(batch_of(mae), START)
    output.loss.backward()
    assert output.loss.isfinite()
    trained = {name: p for name, p in mae.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert all(p.grad is None for p in mae.parameters() if not p.requires_grad)
    before = {name: p.clone() for name, p in trained.items()}
    optimizer.step()
    assert not any(torch.equal(before[name], p) for name, p in trained.items())
    assert mae(batch_of(mae), START).loss.isfinite()
    assert all(p.isfinite().all() for p in mae.parameters())
    assert sorted(mae.pictures(batch_of(mae))) == ["masked", "original", "reconstruction"]


# What does not run, and how the line begins that says so; with global crops alone, DINO and SelfPatch take images of
# the backbone's own size only. Everything else runs.
REFUSED = {
    **{("gmml", name): "averages the tokens of several blocks" for name in OTHERS},
    **{("dino", name): f"'dino' needs images of .* px: backbone '{name}'" for name in FIXED_SIZE},
    **{("selfpatch", name): f"'selfpatch' needs images of .* px: backbone '{name}'" for name in FIXED_SIZE},
    **{("selfpatch", name): "fewer than 3 x 3 patches" for name in ("hiera_tiny_224", "fastvit_t8")},
}
HEADS = {"num_prototypes": 32, "head_hidden_dim": 32, "head_bottleneck_dim": 16, "num_local": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "gmml": {},
    "sit": {"projector_hidden_dim": 32, "projector_dim": 16},
    "dino": HEADS,
    "selfpatch": HEADS | {"num_patch_prototypes": 32},
}
SLOW = set(OTHERS) - {"hiera_tiny_224"}  # seconds each, many times those of a small ViT
# Weights that make the class token, which SelfPatch and GMML do not look at.
FOR_CLASSES = {"volo_d1_224": "post_network|cls_token", "crossvit_tiny_240": "projs|fusion|revert|cls_token"}


def objective_on(objective: str, name: str, **config: Any) -> Objective:
    torch.manual_seed(0)
    backbone = create_backbone(name, **(PLAIN | OTHERS)[name])
    settings = SETTINGS[objective] | config
    if objective == "selfpatch":
        settings = {"local_size": 3 * backbone.patch_size} | settings
    return registry.load(objective)(backbone, registry.config_class(objective)(**settings))


def crops_for(objective: Objective, num: int = 4) -> dict[str, torch.Tensor]:
    generator, batch = torch.Generator().manual_seed(1), {"seed": torch.arange(num)}
    for view in objective.views():
        count, size = view.get("count"), view["size"]
        coarse = torch.rand(num * (count or 1), 3, 4, 4, generator=generator)
        images = (torch.nn.functional.interpolate(coarse, size=(size, size), mode="bilinear") * 255).to(torch.uint8)
        batch[view["name"]] = images if count is None else images.unflatten(0, (count, num))
    return batch


def _on_families() -> list[Any]:
    return [
        pytest.param(objective, name, marks=[pytest.mark.long] if name in SLOW else [])
        for objective in SETTINGS
        for name in PLAIN | OTHERS
    ]


@pytest.mark.parametrize(("objective", "name"), _on_families())
def test_objectives__one_step_on_every_family_or_a_reason(objective: str, name: str) -> None:
    refusal = REFUSED.get((objective, name))
    if refusal:
        with pytest.raises(ObjectiveError, match=refusal) as caught:
            objective_on(objective, name)
        assert "\n" not in str(caught.value)
        if objective == "gmml":
            trained = objective_on(objective, name, read_depths=[1.0])
        elif name in FIXED_SIZE - {"hiera_tiny_224"} or objective == "dino":
            trained = objective_on(objective, name, num_local=0)
        else:
            return
    else:
        trained = objective_on(objective, name)
    late = Progress(step=900, total_steps=1000)
    optimizer = torch.optim.AdamW(trained.param_groups(0.05, layer_decay=0.9), lr=1e-4)
    batch = crops_for(trained)
    output = trained(batch, late)
    output.loss.backward()
    without = {n for n, p in trained.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    unseen = FOR_CLASSES.get(name, "") if objective in ("selfpatch", "gmml") else ""
    assert {n for n in without if not (unseen and re.search(unseen, n))} == set()
    optimizer.step()
    trained.after_step(late, lambda parameters: [p.detach() for p in parameters])
    assert output.loss.isfinite() and trained(batch, late).loss.isfinite()


def test_mae__settings_of_a_decoder_are_not_ignored_in_silence():
    backbone = create_backbone("vit_tiny_patch16_224", **PLAIN["vit_tiny_patch16_224"])
    with pytest.raises(ObjectiveError, match=r"^objective.decoder_depth=2: masking=token has no decoder, so that this"):
        MAE(backbone, MAEConfig(masking="token", decoder_depth=2))
    swin = create_backbone("swin_tiny_patch4_window7_224", **OTHERS["swin_tiny_patch4_window7_224"])
    with pytest.warns(UserWarning, match=r"^objective.decoder_dim=64: masking=token has no decoder"):
        MAE(swin, MAEConfig(decoder_dim=64))


@pytest.mark.parametrize("name", OTHERS)
def test_mae__dropping_is_refused_where_it_cannot_be(name):
    with pytest.raises(ObjectiveError, match=f"'mae with masking=drop' needs .*{name}") as caught:
        build(name, masking="drop")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", PLAIN | OTHERS)
def test_require__says_what_is_missing(name):
    backbone = create_backbone(name, **(PLAIN | OTHERS)[name])
    cannot = {
        "can_drop_patches": name in OTHERS,
        "has_plain_blocks": name in OTHERS,
        "has_cls": name in NO_CLASS_TOKEN,
    }
    for capability, is_missing in cannot.items():
        if not is_missing:
            require(backbone, "test", capability)
            continue
        with pytest.raises(ObjectiveError, match=f"'test' needs .*'{name}'") as caught:
            require(backbone, "test", capability)
        assert "\n" not in str(caught.value)
    other = 2 * backbone.image_size
    require_sizes(backbone, "test", backbone.image_size)
    if name not in FIXED_SIZE:
        require_sizes(backbone, "test", other)
        return
    with pytest.raises(ObjectiveError, match=f"'test' needs images of {other} px: .*{name}"):
        require_sizes(backbone, "test", other)


def test_param_groups__a_model_whose_layers_timm_does_not_count_trains_without_layer_decay():
    mae = MAE(create_backbone("poolformer_s12", image_size=64), MAEConfig())
    assert sum(len(group["params"]) for group in mae.param_groups(0.05)) == len(list(mae.parameters()))
    with pytest.raises(BackboneError, match=r"which layers backbone 'poolformer_s12' has; set optimizer.layer_decay=1"):
        mae.param_groups(0.05, layer_decay=0.9)


def test_mae__token_form_learns():
    mae = build("vit_tiny_patch16_224", masking="token", norm_pix_loss=False)
    optimizer = torch.optim.AdamW(mae.param_groups(0.05), lr=3e-3)
    batch, losses = batch_of(mae, num=16), []
    batch["image"] = batch["image"].float().mean((2, 3), keepdim=True).to(torch.uint8).expand(-1, -1, 32, 32)
    for _ in range(40):
        optimizer.zero_grad()
        output = mae(batch, START)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.6 * losses[0]


def test_mae__token_form_hides_pixels_and_grades_hidden_ones_only():
    mae = build("vit_tiny_patch16_224", masking="token").eval()
    batch = batch_of(mae)
    x = mae.backbone.preprocess(batch["image"])
    result = mae._reconstruct(x, batch)
    hidden = result.mask.is_masked.unflatten(1, mae.grid).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
    again = mae._reconstruct(torch.where(hidden, torch.rand_like(x), x), batch)
    torch.testing.assert_close(again.prediction, result.prediction, rtol=0, atol=0)
    assert not torch.allclose(again.target, result.target)
    seen: list[torch.Tensor] = []
    mae.backbone.vit.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    mae(batch, START)
    assert torch.equal(torch.where(hidden, 0, seen[0]), torch.where(hidden, 0, x))
    covered = patchify(seen[0], 8)[result.mask.is_masked]
    assert torch.equal(covered, patchify(mae.decoder.mask_token[None], 8)[0].expand_as(covered))


def test_mae__token_form_puts_predicted_pixels_in_place():
    """A head that copies one feature per pixel: what comes back at a token is what the features held there."""
    mae = build("vit_tiny_patch16_224", masking="token")
    torch.nn.init.zeros_(mae.decoder.embed_cls.weight)
    torch.nn.init.zeros_(mae.decoder.predict.weight)
    offsets = torch.arange(3 * 64.0)
    with torch.no_grad():
        mae.decoder.predict.bias.copy_(offsets)
        mae.decoder.predict.weight[:, 0] = 1
    patches = torch.zeros(1, 16, 32)
    patches[0, :, 0] = 1000 * torch.arange(16.0)
    image = mae.decoder(Features(patches, torch.zeros(1, 32), None, (4, 4)))
    for channel, row, column in ((0, 0, 0), (2, 9, 30), (1, 31, 0), (0, 17, 12)):
        token = row // 8 * 4 + column // 8
        assert image[0, channel, row, column] == 1000 * token + channel * 64 + row % 8 * 8 + column % 8


@pytest.mark.parametrize(("given", "expected"), [(None, 16), (8, 8), (32, 32)])
def test_mae__size_of_what_is_covered(given, expected):
    mae = build("fastvit_t8", mask_size=given, mask_ratio=0.5)  # tokens of 32 px in images of 64 px
    assert (mae.patch_size, mae.grid) == (expected, (64 // expected,) * 2)
    assert mae._reconstruct(mae.backbone.preprocess(batch_of(mae)["image"]), batch_of(mae)).target.shape == (
        4, mae.num_patches // 2, 3 * expected**2,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("fastvit_t8", {"mask_size": 24}, "mask_size 24 does not divide the image size 64"),
        ("fastvit_t8", {"mask_size": 64}, "leaves nothing to see or to predict of 1 patches"),
        ("vit_tiny_patch16_224", {"mask_size": 8}, "mask_size 8 is for masking=token"),
    ],
)
def test_mae__wrong_masks_are_one_clear_line(name, config, message):
    with pytest.raises(ObjectiveError, match=message) as caught:
        build(name, **config)
    assert "\n" not in str(caught.value)


def test_mae__one_number_per_patch_cannot_be_normalised():
    pixels = {"pixel_mean": [0.5], "pixel_std": [0.5]}
    backbone = create_backbone("vit_tiny_patch16_224", image_size=4, patch_size=1, in_chans=1, options=TINY, **pixels)
    with pytest.raises(ObjectiveError, match="norm_pix_loss needs more than one number"):
        MAE(backbone, MAEConfig(**LIGHT))
    assert MAE(backbone, MAEConfig(**LIGHT, norm_pix_loss=False)).patch_size == 1


@pytest.mark.parametrize("patch", [2, 3, 5, 7, 14, 16, 24, 32])
def test_mae__patches_of_any_size(patch):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=4 * patch, patch_size=patch, options=TINY)
    mae = MAE(backbone, MAEConfig(**LIGHT))
    optimizer = torch.optim.AdamW(mae.param_groups(0.05), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        output = mae(batch_of(mae), START)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < losses[0]


def test_mae__patches_of_one_pixel():
    """1024 tokens of a 32-pixel image: every pixel is a token."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=1, options=TINY)
    mae = MAE(backbone, MAEConfig(**LIGHT))
    assert backbone.num_patches == 1024
    optimizer = torch.optim.AdamW(mae.param_groups(0.05), lr=1e-3)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        output = mae(batch_of(mae, num=2), START)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[1] < losses[0]
    assert all(p.grad.isfinite().all() for p in mae.parameters())


class Series(Encoder):
    """The least that an encoder of another kind has."""

    kind = "series"

    def __init__(self) -> None:
        super().__init__()
        self.spec, self.embed_dim = {"kind": "series", "name": "mean"}, 1
        self.weight = torch.nn.Parameter(torch.ones(1))

    def tokens(self, batch: torch.Tensor) -> Features:
        return Features(batch.mT * self.weight, None, None, None)


@pytest.mark.parametrize("name", ["dino", "gmml", "mae", "selfpatch", "sit"])
def test_objectives__of_images_refuse_a_backbone_of_another_kind(name: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        registry.load(name)(Series(), registry.config_class(name)())
    expected = f"objective '{name}' needs images; backbone 'mean' is of kind 'series': use backbone.kind=image"
    assert str(caught.value) == expected
