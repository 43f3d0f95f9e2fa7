from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from timm.layers import LayerNorm
from torch import nn
from torch.nn import functional

from backbones.errors import BackboneError
from backbones.features import Features
from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.mae import objective as mae_module
from objectives.mae.config import MAEConfig
from objectives.mae.objective import MAE, patchify, unpatchify
from objectives.masking import random_mask

START = Progress(step=0, total_steps=1)
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
LIGHT = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def small_mae(name="vit_tiny_patch16_224", image_size=16, patch_size=4, in_chans=3, options=TINY, seed=0, **config):
    torch.manual_seed(seed)
    pixels = {} if in_chans == 3 else {"pixel_mean": [0.4] * in_chans, "pixel_std": [0.2] * in_chans}
    backbone = create_backbone(
        name, image_size=image_size, patch_size=patch_size, in_chans=in_chans, options=options, **pixels
    )
    light = {} if config.get("masking") == "token" else LIGHT
    return MAE(backbone, MAEConfig(**light | config))


def small_batch(mae: MAE, num: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (num, mae.backbone.in_chans, mae.backbone.image_size, mae.backbone.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return {"image": images, "seed": torch.arange(num)}


def gradient_norm(mae: MAE) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in mae.parameters()))


# Golden values


def test_recipe__inputs_and_weights_are_the_golden_ones(golden_recipe):
    check = golden_recipe.values["recipe_check"]
    rebuilt = {
        "u_mae_noise_first4": golden_recipe.uniform("mae.noise", 4),
        "fill_mae_cls_token_amp_half_first4": golden_recipe.fill("mae.cls_token", (1, 1, 64), 0.5),
        "weight_mae_patch_embed_proj_weight_64x3x4x4_first4": golden_recipe.weight(
            "mae.", "patch_embed.proj.weight", (64, 3, 4, 4)
        ),
        "weight_mae_norm_weight_64_first4": golden_recipe.weight("mae.", "norm.weight", (64,)),
        "weight_mae_norm_bias_64_first4": golden_recipe.weight("mae.", "norm.bias", (64,)),
        "image_2_3_32_32_tag0_at_n0c0i0_j0to3": golden_recipe.image(2, 3, 32, 32, 0.0),
    }
    for key, values in rebuilt.items():
        assert np.asarray(values, dtype=np.float64).ravel()[:4].tolist() == pytest.approx(check[key], rel=1e-7), key
    for key, tag in (("image_2_3_32_32_tag0_l2", 0.0), ("image_2_3_32_32_tag0p3_l2", 0.3)):
        assert golden_recipe.image(2, 3, 32, 32, tag).double().norm().item() == pytest.approx(check[key], rel=1e-9)


@pytest.mark.parametrize("norm_pix", ["on", "off"])
def test_golden__float64_loss_and_each_gradient(golden_mae, official_names, norm_pix):
    golden = golden_mae.values["mae"][f"norm_pix={norm_pix}"]
    mae = golden_mae.build(norm_pix_loss=norm_pix == "on")
    loss = mae(golden_mae.batch(), START).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["f64"]["loss"], rel=1e-9)
    norms = {official_names(name): p.grad.norm().item() for name, p in mae.named_parameters()}
    assert norms == pytest.approx(golden["grad_norm_per_param"], rel=1e-8)
    assert gradient_norm(mae) == pytest.approx(golden["f64"]["grad_norm"], rel=1e-8)


@pytest.mark.parametrize("norm_pix", ["on", "off"])
def test_golden__float32_loss_and_gradient(golden_mae, norm_pix):
    golden = golden_mae.values["mae"][f"norm_pix={norm_pix}"]["f32"]
    mae = golden_mae.build(torch.float32, norm_pix_loss=norm_pix == "on")
    loss = mae(golden_mae.batch(torch.float32), START).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss"], rel=2e-6)
    assert gradient_norm(mae) == pytest.approx(golden["grad_norm"], rel=1e-5)


def test_golden__masks_and_target(golden_mae):
    golden = golden_mae.values["mae"]
    batch = golden_mae.batch()
    mask = random_mask(batch["noise"], golden["mask_ratio"])
    assert mask.keep_idx.tolist() == golden["ids_keep"]
    assert ["".join(str(int(bit)) for bit in row) for row in mask.is_masked] == golden["mask"]
    patch = patchify(batch["image"], 4)[0, 0, :6].tolist()
    assert patch == pytest.approx(golden["target_patch0_image0_first6"], rel=1e-7)


def test_golden__latent_and_predictions(golden_mae):
    golden = golden_mae.values["mae"]["norm_pix=on"]
    mae = golden_mae.build()
    seen = {}
    mae.backbone.vit.norm.register_forward_hook(lambda *call: seen.update(latent=call[2]))
    mae.decoder.blocks[-1].register_forward_hook(lambda *call: seen.update(decoded=call[2]))
    batch = golden_mae.batch()
    with torch.no_grad():
        mae(batch, START)
        # The golden prediction covers all patches in image order; ours runs [class, visible, masked] in random order.
        order = batch["noise"].argsort(dim=1)
        decoded = torch.empty_like(seen["decoded"][:, 1:])
        decoded.scatter_(1, order.unsqueeze(-1).expand_as(decoded), seen["decoded"][:, 1:])
        prediction = mae.decoder.predict(mae.decoder.norm(decoded))
    for values, expected in ((seen["latent"], golden["latent"]), (prediction, golden["pred"])):
        assert values.mean().item() == pytest.approx(expected["mean"], rel=1e-8)
        assert values.norm().item() == pytest.approx(expected["l2"], rel=1e-9)
        assert values.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=1e-9)


def test_golden__decay_groups(golden_mae, official_names):
    mae = golden_mae.build()
    names = {id(parameter): official_names(name) for name, parameter in mae.named_parameters()}
    decay, no_decay = mae.param_groups(weight_decay=0.05)
    assert {names[id(p)] for p in decay["params"]} == set(golden_mae.values["mae"]["trajectory"]["decay_group"])
    assert len(decay["params"]) + len(no_decay["params"]) == len(names)


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_golden__six_steps_of_adamw(golden_mae, official_names, precision):
    golden = golden_mae.values["mae"]["trajectory"][precision]
    dtype, loss_rel, norm_rel = (torch.float64, 1e-9, 1e-8) if precision == "f64" else (torch.float32, 2e-6, 1e-5)
    mae = golden_mae.build(dtype)
    optimizer = torch.optim.AdamW(mae.param_groups(weight_decay=0.05), lr=0.0, betas=(0.9, 0.95))
    losses, norms = [], []
    for step, lr in enumerate(golden["lr"]):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        optimizer.zero_grad()
        loss = mae(golden_mae.batch(dtype, tag=0.1 * (step % 2)), START).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(gradient_norm(mae))
        optimizer.step()
    assert losses == pytest.approx(golden["loss"], rel=loss_rel)
    assert norms == pytest.approx(golden["grad_norm"], rel=norm_rel)
    if precision == "f64":
        final = {official_names(name): parameter.norm().item() for name, parameter in mae.named_parameters()}
        fixed = {"pos_embed", "decoder_pos_embed"}
        assert final == pytest.approx({k: v for k, v in golden["final_param_l2"].items() if k not in fixed}, rel=1e-8)


def test_golden__published_vit_b(golden_mae):
    golden = golden_mae.values["real_size"]
    mae = golden_mae.filled("vit_base_patch16_224", 224, 16, {}, MAEConfig())
    assert sum(p.numel() for p in mae.parameters()) == golden["n_trainable"]
    positions = 197 * 768 + 197 * 512  # the authors count their fixed tables, class row included
    assert sum(p.numel() for p in mae.parameters()) + positions == golden["n_params"]
    noise = torch.from_numpy(golden_mae.recipe.uniform("mae.noise.real", 392)).view(2, 196)
    batch = {"image": golden_mae.recipe.image(2, 3, 224, 224, 0.0), "noise": noise}
    for mae.config.norm_pix_loss, key in ((True, "f32"), (False, "f32_norm_pix_off")):
        with torch.no_grad():
            assert mae(batch, START).loss.item() == pytest.approx(golden[key], rel=2e-6)


def _layer_norms(eps):
    def change(mae, patch):
        for module in mae.modules():
            if isinstance(module, LayerNorm):
                module.eps = eps

    return change


def _tanh_gelu(mae, patch):
    for block in [*mae.backbone.vit.blocks, *mae.decoder.blocks]:
        block.mlp.act = nn.GELU(approximate="tanh")


def _no_final_norm(mae, patch):
    mae.backbone.vit.norm = nn.Identity()


def _no_decoder_positions(mae, patch):
    mae.decoder.positions = torch.zeros_like(mae.decoder.positions)


def _swapped_axes(mae, patch):
    for table in (mae.backbone.vit.pos_embed, mae.decoder.positions):
        half = table.shape[-1] // 2
        table.copy_(table.clone().roll(half, -1))


def _no_class_token_in_decoder(mae, patch):
    decode = mae.decoder.forward
    patch.setattr(
        mae.decoder, "forward", lambda v, keep, drop: decode(Features(v.patches, None, None, v.grid), keep, drop)
    )


def _channel_first(mae, patch):
    patch.setattr(mae_module, "patchify", lambda x, p: functional.unfold(x, kernel_size=p, stride=p).transpose(1, 2))


def _biased_variance(mae, patch):
    var_mean = torch.var_mean
    patch.setattr(torch, "var_mean", lambda x, **kw: var_mean(x, unbiased=False, **kw))


WRONG = {
    "LayerNorm eps 1e-5 everywhere": _layer_norms(1e-5),
    "GELU tanh approximation": _tanh_gelu,
    "no final encoder norm": _no_final_norm,
    "no decoder pos embed": _no_decoder_positions,
    "row/column halves of sin-cos swapped": _swapped_axes,
    "cls token removed before decoder": _no_class_token_in_decoder,
    "channel-first patch flattening": _channel_first,
    "biased variance (divide by n)": _biased_variance,
}


@pytest.mark.parametrize("name", WRONG)
def test_golden__wrong_variants_give_their_fingerprints(golden_mae, monkeypatch, name):
    """Each mistake made on purpose lands on its own recorded value: the golden loss would notice it."""
    mae = golden_mae.build()
    WRONG[name](mae, monkeypatch)
    with torch.no_grad():
        loss = mae(golden_mae.batch(), START).loss.item()
    fingerprints = golden_mae.values["wrong_variants"]
    assert loss == pytest.approx(fingerprints[name]["norm_pix_on"], rel=1e-8)
    assert loss != pytest.approx(fingerprints["correct"]["norm_pix_on"], rel=1e-7)


# Loss


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss__equals_a_slow_loop(norm_pix):
    mae = small_mae(norm_pix_loss=norm_pix).double()
    batch = small_batch(mae, num=3)
    result = mae._reconstruct(mae.backbone.preprocess(batch["image"].double() / 255), batch)
    total, count = 0.0, 0
    images = mae.backbone.preprocess(batch["image"].double() / 255).numpy()
    for sample in range(3):
        for slot, patch in enumerate(result.mask.drop_idx[sample].tolist()):
            row, column = divmod(patch, 4)
            pixels = images[sample, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
            target = [pixels[c, i, j] for i in range(4) for j in range(4) for c in range(3)]
            if norm_pix:
                mean = sum(target) / 48
                variance = sum((value - mean) ** 2 for value in target) / 47
                target = [(value - mean) / math.sqrt(variance + 1e-6) for value in target]
            predicted = result.prediction[sample, slot].tolist()
            total += sum((a - b) ** 2 for a, b in zip(predicted, target, strict=True)) / 48
            count += 1
    batch["image"] = batch["image"].double() / 255
    assert mae(batch, START).loss.item() == pytest.approx(total / count, rel=1e-10)


def test_loss__mean_over_micro_batches_is_the_mean_over_the_batch():
    mae = small_mae().double()
    batch = small_batch(mae, num=6)
    batch["image"] = batch["image"].double() / 255
    halves = [mae({k: v[part] for k, v in batch.items()}, START).loss for part in (slice(0, 3), slice(3, 6))]
    assert mae(batch, START).loss.item() == pytest.approx((halves[0] + halves[1]).item() / 2, rel=1e-12)


def test_loss__flat_images_are_finite():
    mae = small_mae()
    batch = small_batch(mae)
    batch["image"] = torch.zeros_like(batch["image"])
    output = mae(batch, START)
    output.loss.backward()
    assert output.loss.isfinite()
    assert all(p.grad.isfinite().all() for p in mae.parameters())


def test_forward__the_seed_decides_the_mask():
    mae = small_mae()
    batch = small_batch(mae)
    loss = mae(batch, START).loss
    torch.manual_seed(99)
    assert torch.equal(mae(batch, START).loss, loss)
    assert not torch.equal(mae(batch | {"seed": batch["seed"] + 4}, START).loss, loss)


def test_forward__metrics_are_detached_scalars():
    mae = small_mae()
    output = mae(small_batch(mae), START)
    assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    assert torch.equal(output.metrics["loss"], output.loss.detach())


@pytest.mark.parametrize("norm_pix", [True, False])
def test_metrics__zero_prediction_explains_nothing(norm_pix):
    mae = small_mae(norm_pix_loss=norm_pix)
    nn.init.zeros_(mae.decoder.predict.weight)
    batch = small_batch(mae)
    output = mae(batch, START)
    assert output.metrics["explained"].item() == pytest.approx(0, abs=1e-6)
    if norm_pix:
        assert output.loss.item() == pytest.approx(47 / 48, rel=1e-4)  # (n - 1) / n by the unbiased variance
    else:  # every hidden pixel is predicted to be the mean colour
        result = mae._reconstruct(mae.backbone.preprocess(batch["image"]), batch)
        mean = torch.tensor([0.485, 0.456, 0.406]).repeat(16)
        pixels = result.target.double() * torch.tensor([0.229, 0.224, 0.225]).repeat(16) + mean
        psnr = -10 * (pixels - mean).square().mean().log10()
        assert output.metrics["masked_psnr_db"].item() == pytest.approx(psnr.item(), rel=1e-5)


# What runs


def test_forward__encoder_sees_visible_tokens_and_head_masked_ones():
    mae = small_mae(image_size=32, mask_ratio=0.75)  # 64 patches: 16 visible, 48 masked
    seen: dict[str, list[tuple[int, ...]]] = {"encoder": [], "decoder": [], "norm": [], "head": []}
    watched = [("encoder", block) for block in mae.backbone.vit.blocks] + [("decoder", b) for b in mae.decoder.blocks]
    for name, module in [*watched, ("norm", mae.decoder.norm), ("head", mae.decoder.predict)]:
        module.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(tuple(args[0].shape)))
    mae(small_batch(mae), START)
    assert seen == {
        "encoder": [(4, 1 + 16, 32)] * 2,
        "decoder": [(4, 1 + 64, 16)],
        "norm": [(4, 48, 16)],
        "head": [(4, 48, 16)],
    }


def test_forward__hidden_pixels_reach_the_target_only():
    mae = small_mae()
    batch = small_batch(mae)
    x = mae.backbone.preprocess(batch["image"])
    result = mae._reconstruct(x, batch)
    hidden = unpatchify(result.mask.is_masked.unsqueeze(-1).expand(-1, -1, 48).float(), (4, 4), 4)
    again = mae._reconstruct(x + 5 * hidden * torch.rand_like(x), batch)
    torch.testing.assert_close(again.prediction, result.prediction, rtol=0, atol=0)
    assert not torch.allclose(again.target, result.target)


def test_forward__gradient_reaches_every_parameter():
    for options in (TINY, TINY | {"reg_tokens": 2}, TINY | {"class_token": False}):
        mae = small_mae(options=options)
        mae(small_batch(mae), START).loss.backward()
        assert [n for n, p in mae.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 1}),
        ("vit_small_patch14_reg4_dinov2", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
)
def test_mae__trains_on_other_plain_vits(name, options):
    mae = small_mae(name, options=TINY | options)
    batch = small_batch(mae, num=16)
    batch["image"] = (batch["image"].float().mean((2, 3), keepdim=True) + torch.arange(16.0) * 8).expand(-1, -1, 16, -1)
    batch["image"] = (batch["image"] / 255).clamp(0, 1)
    optimizer = torch.optim.AdamW(mae.param_groups(0.05), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = mae(batch, START).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(("channels", "patch_size"), [(1, 4), (2, 1), (5, 3), (4, 7)])
def test_mae__channels_and_patch_sizes(channels, patch_size):
    mae = small_mae(in_chans=channels, image_size=patch_size * 4, patch_size=patch_size)
    batch = small_batch(mae)
    assert mae(batch, START).loss.isfinite()
    assert all(picture.shape[1] == 3 for picture in mae.pictures(batch).values())


# Precision


def test_bf16__parameters_cast_as_an_engine_does(golden_mae):
    expected = golden_mae.values["mae"]["norm_pix=on"]["f64"]["loss"]
    mae = golden_mae.build(torch.float32)
    for parameter in mae.parameters():
        parameter.data = parameter.data.bfloat16()
    output = mae(golden_mae.batch(torch.float32), START)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected, rel=3e-3)
    assert all(p.grad.isfinite().all() for p in mae.parameters())


def test_bf16__targets_come_from_float32_pixels():
    mae = small_mae()
    batch = small_batch(mae)
    batch["image"] = 128 + batch["image"] // 64  # a contrast of 3 grey levels that bf16 pixels would destroy
    expected = mae._reconstruct(mae.backbone.preprocess(batch["image"]), batch).target
    for parameter in mae.parameters():
        parameter.data = parameter.data.bfloat16()
    result = mae._reconstruct(mae.backbone.preprocess(batch["image"]), batch)
    torch.testing.assert_close(result.target, expected, rtol=0, atol=0)
    assert result.prediction.dtype == torch.float32


def test_bf16__autocast_keeps_the_loss_in_float32(golden_mae):
    mae = golden_mae.build(torch.float32)
    expected = golden_mae.values["mae"]["norm_pix=on"]["f64"]["loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = mae(golden_mae.batch(torch.float32), START).loss
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=3e-3)


# Initialisation, views, pictures, errors


def test_initialisation__follows_the_paper():
    mae = small_mae(options={"embed_dim": 192, "depth": 2, "num_heads": 3, "reg_tokens": 2}, decoder_dim=128)
    for name, module in mae.named_modules():
        if isinstance(module, nn.Linear):
            bound = math.sqrt(6 / sum(module.weight.shape))  # qkv counts as one matrix
            assert module.weight.abs().max() <= bound
            assert module.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
            assert module.bias.abs().max() == 0
        elif isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all() and (module.bias == 0).all()
            assert module.eps == 1e-6
    projection = mae.backbone.vit.patch_embed.proj
    bound = math.sqrt(6 / (192 + 48))
    assert projection.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert projection.weight.abs().max() <= bound
    assert projection.bias.abs().max() > 0
    for token in (mae.backbone.vit.cls_token, mae.backbone.vit.reg_token, mae.decoder.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.25)


def test_initialisation__loss_of_a_fresh_model_is_near_the_papers():
    """The authors' code starts near 1.85 with normalised pixels; twice that would mean a wrong scale somewhere."""
    mae = small_mae(image_size=32, options={"embed_dim": 192, "depth": 4, "num_heads": 3}, decoder_dim=128)
    assert 1.2 < mae(small_batch(mae), START).loss.item() < 2.6


def test_state__positions_of_the_encoder_travel_and_those_of_the_decoder_are_derived():
    mae, other = small_mae(seed=0), small_mae(seed=1)
    assert "backbone.vit.pos_embed" in mae.state_dict()
    assert "decoder.positions" not in mae.state_dict()
    other.load_state_dict(mae.state_dict())
    batch = small_batch(mae)
    assert torch.equal(other(batch, START).loss, mae(batch, START).loss)


def test_views__one_crop_at_the_backbones_size():
    assert small_mae(crop_scale=[0.3, 0.9], hflip=0.0).views() == [
        {"name": "image", "size": 16, "scale": (0.3, 0.9), "hflip": 0.0}
    ]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_pictures__perfect_prediction_restores_the_original(monkeypatch, norm_pix):
    mae = small_mae(norm_pix_loss=norm_pix)
    batch = small_batch(mae, num=10)
    x = mae.backbone.preprocess(batch["image"][:8])
    target = mae._reconstruct(x, {k: v[:8] for k, v in batch.items()}).target
    monkeypatch.setattr(mae.decoder, "forward", lambda *_: target)
    pictures = mae.pictures(batch)
    original = batch["image"][:8] / 255
    torch.testing.assert_close(pictures["original"], original, atol=1e-6, rtol=0)
    torch.testing.assert_close(pictures["reconstruction"], original, atol=1e-4, rtol=0)
    is_grey = (pictures["masked"] - 0.5).abs().amax(1) < 1e-6  # (8, 16, 16)
    assert is_grey.float().mean().item() == pytest.approx(0.75, abs=0.01)
    torch.testing.assert_close(torch.where(is_grey[:, None], original, pictures["masked"]), original, atol=1e-6, rtol=0)


def test_pictures__leave_training_as_it_was():
    mae = small_mae(options=TINY | {"drop_path_rate": 0.5}).train()
    state = torch.get_rng_state()
    pictures = mae.pictures(small_batch(mae))
    assert torch.equal(torch.get_rng_state(), state)
    assert mae.training and mae.backbone.vit.blocks[0].training
    assert all(p.min() >= 0 and p.max() <= 1 and p.shape == (4, 3, 16, 16) for p in pictures.values())


@pytest.mark.parametrize("masking", ["drop", "token"])
def test_diagnose__nothing_learned_and_collapsed_features(masking):
    mae = small_mae(masking=masking)
    late = Progress(step=200, total_steps=1000)
    fresh = {name: value.item() for name, value in mae(small_batch(mae), late).metrics.items()}
    assert "no better than by their mean colour" in mae.diagnose(fresh, late)
    assert mae.diagnose(fresh, START) is None
    assert mae.diagnose(fresh | {"explained": 0.3}, late) is None
    torch.nn.init.zeros_(mae.backbone.vit.norm.weight)
    torch.nn.init.ones_(mae.backbone.vit.norm.bias)
    alike = {name: value.item() for name, value in mae(small_batch(mae), late).metrics.items()}
    assert "features have collapsed" in mae.diagnose(alike | {"explained": 0.3}, late)


def test_patchify__is_undone_by_unpatchify():
    images = torch.rand(2, 5, 6, 9)
    patches = patchify(images, 3)
    assert patches.shape == (2, 6, 45)
    assert patches[1, 4, (2 * 3 + 1) * 5 + 3] == images[1, 3, 3 + 2, 3 + 1]  # pixel (2, 1), channel 3 of patch (1, 1)
    assert torch.equal(unpatchify(patches, (2, 3), 3), images)


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"mask_ratio": 0.99}, ObjectiveError, "objective.mask_ratio 0.99 leaves nothing"),
        ({"decoder_dim": 18, "decoder_heads": 4}, BackboneError, "decoder_dim 18 is not a multiple of decoder_heads 4"),
        ({"decoder_dim": 18, "decoder_heads": 2}, BackboneError, "multiple of 4, not 18"),
    ],
)
def test_mae__rejections_are_one_clear_line(config, error, message):
    with pytest.raises(error, match=message):
        small_mae(**config)
