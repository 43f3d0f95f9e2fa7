from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.gmml import objective as gmml_module
from objectives.gmml.config import GMMLConfig
from objectives.gmml.objective import GMML
from objectives.parts.masked_l1 import masked_l1

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "gmml.json").read_text(encoding="utf-8"))
START, LATE = Progress(step=0, total_steps=100), Progress(step=200, total_steps=1000)
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def small_gmml(name="vit_tiny_patch16_224", image_size=16, patch_size=4, in_chans=3, options=TINY, **config):
    torch.manual_seed(0)
    pixels = {} if in_chans == 3 else {"pixel_mean": [0.4] * in_chans, "pixel_std": [0.2] * in_chans}
    backbone = create_backbone(
        name, image_size=image_size, patch_size=patch_size, in_chans=in_chans, options=options, **pixels
    )
    return GMML(backbone, GMMLConfig(**{"photometric": in_chans == 3} | config))


def small_batch(gmml: GMML, num: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (2, num, gmml.backbone.in_chans, gmml.backbone.image_size, gmml.backbone.image_size)
    images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
    return {"image": images, "seed": torch.arange(num)}


# Golden values


def official_name(name: str) -> str:
    for ours, theirs in (
        ("backbone.vit.", "backbone."),
        ("head.mlp.", "head_recons.mlp."),
        ("head.paint.", "head_recons.convTrans."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


@pytest.fixture
def golden_gmml(golden_recipe):
    """Builds the golden model: ViT 64 x 4, patch 4, 32 px; images pass unnormalised."""

    def build(dtype=torch.float64, **config):
        return filled("vit_tiny_patch16_224", 32, 4, {"embed_dim": 64, "depth": 4, "num_heads": 4}, dtype, **config)

    def filled(name, image_size, patch_size, options, dtype, **config):
        backbone = create_backbone(
            name, image_size=image_size, patch_size=patch_size, options=options, pixel_mean=[0] * 3, pixel_std=[1] * 3
        )
        gmml = GMML(backbone, GMMLConfig(**{"read_depths": [0.25, 0.5, 1.0]} | config))
        with torch.no_grad():
            for key, parameter in gmml.named_parameters():
                parameter.copy_(golden_recipe.weight("gmml.", official_name(key), tuple(parameter.shape)))
        return gmml.to(dtype)

    build.filled = filled
    return build


@pytest.fixture
def golden_batch(golden_recipe):
    blocks = GOLDEN["gmml"]["blocks_rchw_by_view_by_image"]
    padded = [(image + [[0, 0, 0, 0]] * 4)[:4] for view in blocks for image in view]
    fills = [golden_recipe.fill(f"gmml.noise.view{view}", (2, 3, 32, 32), 1.7) for view in (0, 1)]

    def make(dtype=torch.float64, shift=0.0):
        images = [golden_recipe.image(2, 3, 32, 32, tag + shift) for tag in (0.3, 1.1)]
        return {
            "image": torch.stack(images).to(dtype),
            "seed": torch.zeros(2, dtype=torch.int64),
            "blocks": torch.tensor(padded),
            "fill": torch.cat(fills),
            "is_alien": torch.zeros(4, dtype=torch.bool),
        }

    return make


def gradient_norm(module: nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in module.parameters()))


def test_golden__float64_loss_and_each_gradient(golden_gmml, golden_batch):
    golden = GOLDEN["gmml"]
    gmml = golden_gmml()
    loss = gmml(golden_batch(), START).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["f64"]["loss_masked"], rel=1e-9)
    norms = {official_name(name): p.grad.norm().item() for name, p in gmml.named_parameters()}
    assert norms == pytest.approx(golden["grad_norm_per_param"], rel=1e-8)
    assert gradient_norm(gmml) == pytest.approx(golden["f64"]["grad_norm_masked"], rel=1e-8)


def test_golden__float32_loss_and_gradient(golden_gmml, golden_batch):
    golden = GOLDEN["gmml"]["f32"]
    gmml = golden_gmml(torch.float32)
    loss = gmml(golden_batch(torch.float32), START).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden["loss_masked"], rel=2e-6)
    assert gradient_norm(gmml) == pytest.approx(golden["grad_norm_masked"], rel=1e-5)


def test_golden__loss_of_all_pixels(golden_gmml, golden_batch):
    loss = golden_gmml(masked_only=False)(golden_batch(), START).loss
    assert loss.item() == pytest.approx(GOLDEN["gmml"]["f64"]["loss_all_pixels"], rel=1e-9)


def test_golden__tokens_reconstruction_and_each_image(golden_gmml, golden_batch):
    golden = GOLDEN["gmml"]
    gmml, batch, seen = golden_gmml(), golden_batch(), {}
    gmml.head.register_forward_hook(lambda _, args, out: seen.update(tokens_into_head=args[0], recon=out))
    with torch.no_grad():
        gmml(batch, START)
    for key, values in seen.items():
        assert values.mean().item() == pytest.approx(golden[key]["mean"], rel=1e-8), key
        assert values.norm().item() == pytest.approx(golden[key]["l2"], rel=1e-9), key
        assert values.flatten()[:4].tolist() == pytest.approx(golden[key]["first"], rel=1e-9), key
    target = batch["image"].flatten(0, 1)
    is_masked = gmml.corruption.of_batch(batch, target).is_masked
    (key,) = (key for key in golden if key.startswith("per_image_masked_l1"))
    for number, (loss, count) in enumerate(golden[key]):
        one = slice(number, number + 1)
        assert is_masked[number].sum().item() == count
        assert masked_l1(seen["recon"][one], target[one], is_masked[one]).item() == pytest.approx(loss, rel=1e-9)


def test_golden__zero_prediction_is_the_baseline(golden_gmml, golden_batch):
    gmml = golden_gmml()
    nn.init.zeros_(gmml.head.paint.weight)
    nn.init.zeros_(gmml.head.paint.bias)
    output = gmml(golden_batch(), START)
    assert output.loss.item() == pytest.approx(GOLDEN["wrong_variants"]["zero prediction"], rel=1e-9)
    assert output.metrics["explained"].item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_golden__six_steps(golden_gmml, golden_batch, precision):
    golden = GOLDEN["gmml"]["trajectory"]
    dtype, loss_rel, norm_rel = (torch.float64, 1e-9, 1e-8) if precision == "f64" else (torch.float32, 2e-6, 1e-5)
    gmml = golden_gmml(dtype)
    groups = gmml.param_groups(weight_decay=1.0)
    names = {id(parameter): official_name(name) for name, parameter in gmml.named_parameters()}
    assert {names[id(p)] for p in groups[1]["params"]} == set(golden["no_decay"])
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    losses, norms = [], []
    for step, (lr, weight_decay) in enumerate(zip(golden["lr"], golden["wd"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["group_name"] == "decay" else 0.0
        optimizer.zero_grad()
        loss = gmml(golden_batch(dtype, shift=0.05 * (step % 3)), START).loss
        loss.backward()
        losses.append(loss.item())
        norms.append(gradient_norm(gmml))
        for parameter in gmml.parameters():  # the authors clip each tensor by itself
            parameter.grad *= min(1.0, golden["clip"] / (parameter.grad.norm().item() + 1e-6))
        optimizer.step()
    assert losses == pytest.approx(golden[precision]["loss"], rel=loss_rel)
    assert norms == pytest.approx(golden[precision]["pre_clip_global_grad_norm"], rel=norm_rel)
    if precision == "f64":
        final = {official_name(name): parameter.norm().item() for name, parameter in gmml.named_parameters()}
        assert final == pytest.approx(golden["final_param_l2"], rel=1e-8)


def real_size_batch(golden_recipe, num):
    blocks = [[[16 * ((i + 2 * j) % 11), 13 * ((3 * j + i) % 12), 48, 64] for j in range(6)] for i in range(2 * num)]
    return {
        "image": torch.stack([golden_recipe.image(num, 3, 224, 224, tag) for tag in (0.3, 1.1)]),
        "seed": torch.zeros(num, dtype=torch.int64),
        "blocks": torch.tensor(blocks),
        "fill": torch.zeros(()),
        "is_alien": torch.zeros(2 * num, dtype=torch.bool),
    }


def test_golden__published_vit_s(golden_gmml, golden_recipe):
    golden = GOLDEN["real_size"]
    published = {"read_depths": GMMLConfig().read_depths}
    gmml = golden_gmml.filled("vit_small_patch16_224", 224, 16, {}, torch.float32, **published)
    assert gmml.blocks == [6, 8, 10, 12]
    assert sum(p.numel() for p in gmml.parameters()) == golden["n_params"]
    batch = real_size_batch(golden_recipe, 2)
    with torch.no_grad():
        assert gmml(batch, START).loss.item() == pytest.approx(golden["f32"], rel=2e-6)
    shares = gmml.corruption.of_batch(batch, batch["image"].flatten(0, 1)).is_masked.double().mean((1, 2, 3))
    assert shares.tolist() == pytest.approx(golden["masked_fraction_per_image"], rel=1e-9)


def _last_block_only(gmml, patch):
    gmml.blocks = []


def _sum_of_blocks(gmml, patch):
    gmml.backbone.vit.norm = nn.Sequential(_Times(3), gmml.backbone.vit.norm)


class _Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def _norm_per_block(gmml, patch):
    vit = gmml.backbone.vit
    read, norm = gmml.backbone.features, vit.norm

    def features(x, layers):
        found = read(x, layers=layers)
        return replace(found, levels=tuple(norm(stream) for stream in found.levels))

    patch.setattr(gmml.backbone, "features", features)
    vit.norm = nn.Identity()


def _all_images_weigh_the_same(gmml, patch):
    def mean_of_means(prediction, target, is_masked):
        error = (prediction - target).abs().mean(1, keepdim=True) * is_masked
        return (error.sum((1, 2, 3)) / is_masked.sum((1, 2, 3))).mean()

    patch.setattr(gmml_module, "masked_l1", mean_of_means)


def _squared(gmml, patch):
    patch.setattr(gmml_module, "masked_l1", lambda p, t, m: ((p - t).square() * m).sum() / m.sum() / 3)


def _over_all_pixels(gmml, patch):
    patch.setattr(gmml_module, "masked_l1", lambda p, t, m: ((p - t).abs() * m).mean())


def _transposed_patch(gmml, patch):
    weight = gmml.head.paint.weight
    weight.data = weight.data.mT.contiguous()


WRONG = {
    "last block only": _last_block_only,
    "sum of blocks, norm of sum": _sum_of_blocks,
    "norm each block then average": _norm_per_block,
    "mean over images of per-image masked mean": _all_images_weigh_the_same,
    "L2": _squared,
    "masked sum divided by all pixels": _over_all_pixels,
    "pixel rows/cols transposed inside patch": _transposed_patch,
}


@pytest.mark.parametrize("name", WRONG)
def test_golden__wrong_variants_give_their_fingerprints(golden_gmml, golden_batch, monkeypatch, name):
    """Each mistake made on purpose lands on its own recorded value: the golden loss would notice it."""
    gmml = golden_gmml()
    WRONG[name](gmml, monkeypatch)
    with torch.no_grad():
        loss = gmml(golden_batch(), START).loss.item()
    assert loss == pytest.approx(GOLDEN["wrong_variants"][name], rel=1e-8)
    assert loss != pytest.approx(GOLDEN["wrong_variants"]["correct"], rel=1e-9)


# Loss


def test_masked_l1__equals_a_slow_loop():
    generator = torch.Generator().manual_seed(2)
    prediction, target = torch.randn(2, 3, 2, 5, 5, dtype=torch.float64, generator=generator)
    is_masked = torch.rand(3, 1, 5, 5, generator=generator) < 0.4
    errors = [
        abs(prediction[n, c, i, j].item() - target[n, c, i, j].item())
        for n in range(3) for c in range(2) for i in range(5) for j in range(5) if is_masked[n, 0, i, j]
    ]  # fmt: skip
    assert masked_l1(prediction, target, is_masked).item() == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_masked_l1__gradient_in_float64():
    generator = torch.Generator().manual_seed(2)
    prediction, target = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64, generator=generator)
    is_masked = torch.rand(2, 1, 3, 3, generator=generator) < 0.5
    assert torch.autograd.gradcheck(lambda p: masked_l1(p, target, is_masked), prediction.requires_grad_())


def test_masked_l1__nothing_masked_is_zero():
    assert masked_l1(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2, dtype=bool)).item() == 0


def test_forward__the_seed_decides():
    gmml = small_gmml()
    batch = small_batch(gmml)
    loss = gmml(batch, START).loss
    torch.manual_seed(99)
    assert torch.equal(gmml(batch, START).loss, loss)
    assert not torch.equal(gmml(batch | {"seed": batch["seed"] + 4}, START).loss, loss)


def test_forward__hidden_pixels_reach_the_target_only():
    gmml = small_gmml(alien_p=0.0)
    batch, seen = small_batch(gmml), []
    gmml.head.register_forward_hook(lambda _, args, out: seen.append(out))
    target = gmml.backbone.preprocess(batch["image"].flatten(0, 1))
    is_masked = gmml.corruption.of_batch(batch, target).is_masked
    gmml(batch, START)
    changed = torch.where(is_masked.unflatten(0, (2, 4)), 255 - batch["image"], batch["image"])
    gmml(batch | {"image": changed}, START)
    assert torch.equal(seen[0], seen[1])


def test_forward__changes_no_state():
    gmml = small_gmml()
    before = {name: tensor.clone() for name, tensor in gmml.state_dict().items()}
    gmml(small_batch(gmml), START)
    assert all(torch.equal(tensor, before[name]) for name, tensor in gmml.state_dict().items())
    assert gmml.extra_state() == {}


def test_metrics__detached_scalars_that_add_up():
    gmml = small_gmml()
    output = gmml(small_batch(gmml, 8), START)
    metrics = {name: value.item() for name, value in output.metrics.items()}
    assert all(value.ndim == 0 and not value.requires_grad for value in output.metrics.values())
    assert metrics["loss"] == pytest.approx(metrics["masked_l1"], rel=1e-6)
    low, high = sorted((metrics["masked_l1_fill"], metrics["masked_l1_alien"]))
    assert low <= metrics["masked_l1"] <= high
    assert 0.3 < metrics["masked_share"] < 0.8
    assert 1 <= metrics["effective_rank"] <= 16


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_metrics__finite_without_one_of_the_kinds(probability):
    gmml = small_gmml(alien_p=probability)
    metrics = gmml(small_batch(gmml), START).metrics
    assert all(value.isfinite() for value in metrics.values())
    assert metrics["masked_l1_alien"].item() == pytest.approx(metrics["masked_l1_fill"].item(), rel=1e-5)


def test_forward__gradient_reaches_every_parameter():
    for options in (TINY, TINY | {"reg_tokens": 2}, TINY | {"class_token": False}):
        gmml = small_gmml(options=options)
        gmml(small_batch(gmml), START).loss.backward()
        assert [n for n, p in gmml.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


# Backbones, channels, precision


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {"class_token": False, "reg_tokens": 1}),
        ("vit_small_patch16_dinov3", {}),
        ("vit_small_patch16_rope_mixed_224", {}),
    ],
)
def test_gmml__trains_on_other_plain_vits(name, options):
    gmml = small_gmml(name, options=TINY | options)
    batch = small_batch(gmml, num=8)
    batch["image"] = (batch["image"] // 2).float().mean((3, 4), keepdim=True).expand(-1, -1, -1, 16, 16) / 255
    optimizer = torch.optim.AdamW(gmml.param_groups(0.05), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = gmml(batch, START).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(("channels", "patch_size"), [(1, 4), (2, 1), (5, 3)])
def test_gmml__channels_and_patch_sizes(channels, patch_size):
    gmml = small_gmml(in_chans=channels, image_size=max(8, patch_size * 4), patch_size=patch_size)
    batch = small_batch(gmml)
    assert gmml(batch, START).loss.isfinite()
    assert all(picture.shape[1] == 3 for picture in gmml.pictures(batch).values())


@pytest.mark.parametrize(("depth", "blocks"), [(12, [6, 8, 10, 12]), (6, [3, 4, 5, 6]), (2, [1, 2]), (1, [1])])
def test_gmml__read_depths_are_shares(depth, blocks):
    assert small_gmml(options=TINY | {"depth": depth}).blocks == blocks


def test_gmml__last_block_alone_is_the_backbone_s_output():
    gmml = small_gmml(read_depths=[1.0])
    x = torch.randn(2, 3, 16, 16)
    assert gmml.blocks == []
    assert torch.equal(gmml._encode(x).patches, gmml.backbone.features(x).patches)


def test_gmml__one_view():
    gmml = small_gmml(num_views=1)
    batch = small_batch(gmml)
    batch["image"] = batch["image"][:1]
    assert gmml(batch, START).loss.isfinite()
    assert len(gmml.pictures(batch)["clean"]) == 4
    assert gmml.views()[0]["count"] == 1


def test_bf16__parameters_cast_as_an_engine_does(golden_gmml, golden_batch):
    gmml = golden_gmml(torch.float32)
    for parameter in gmml.parameters():
        parameter.data = parameter.data.bfloat16()
    output = gmml(golden_batch(torch.float32), START)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(GOLDEN["gmml"]["f64"]["loss_masked"], rel=3e-3)
    assert all(p.grad.isfinite().all() for p in gmml.parameters())


# Views, pictures, findings, errors


def test_views__are_what_the_data_takes():
    from data_pipelines.views.specs import views_from

    (view,) = views_from(small_gmml().views())
    assert (view.name, view.count, view.size, view.scale) == ("image", 2, 16, (0.05, 1.0))
    assert (view.photometric.jitter_p, view.photometric.hue, view.photometric.blur_p) == (0.3, 0.01, 0.1)
    (plain,) = views_from(small_gmml(photometric=False).views())
    assert plain.photometric is None


def test_pictures__masked_pixels_are_predicted_and_others_kept():
    gmml = small_gmml()
    batch = small_batch(gmml, 10)
    shown = gmml.pictures(batch)
    assert list(shown) == ["clean", "corrupted", "reconstruction"]
    assert all(
        picture.shape == (8, 3, 16, 16) and 0 <= picture.min() <= picture.max() <= 1 for picture in shown.values()
    )
    torch.testing.assert_close(shown["clean"], batch["image"][0, :8].float() / 255)
    target = gmml.backbone.preprocess(batch["image"][0, :8])
    is_masked = gmml.corruption.of_batch({"seed": batch["seed"][:8]}, target).is_masked.expand(-1, 3, -1, -1)
    for caption in ("corrupted", "reconstruction"):
        assert torch.equal(shown[caption][~is_masked], shown["clean"][~is_masked])
        assert (shown[caption][is_masked] != shown["clean"][is_masked]).float().mean() > 0.8
    assert (shown["corrupted"] != shown["reconstruction"]).any()
    assert gmml.training


def test_pictures__draw_nothing_from_the_global_generator():
    gmml = small_gmml(options=TINY | {"drop_path_rate": 0.5})
    state = torch.get_rng_state()
    gmml.pictures(small_batch(gmml))
    assert torch.equal(torch.get_rng_state(), state)


def test_diagnose__healthy_and_young_runs_have_no_finding():
    gmml = small_gmml()
    metrics = {"explained": 0.3, "effective_rank": 8.0, "patch_cosine": 0.5}
    assert gmml.diagnose(metrics, LATE) is None
    for young in (START, Progress(99, 200), Progress(150, 2000)):
        assert gmml.diagnose(metrics | {"explained": 0.0}, young) is None
    assert gmml.diagnose(metrics | {"explained": 0.0}, Progress(100, 200)) is not None


def test_diagnose__grey_reconstruction():
    gmml = small_gmml()
    nn.init.zeros_(gmml.head.paint.weight)
    nn.init.zeros_(gmml.head.paint.bias)
    metrics = {name: value.item() for name, value in gmml(small_batch(gmml), START).metrics.items()}
    assert "no better than by their mean colour" in gmml.diagnose(metrics, LATE)


def test_diagnose__collapsed_features():
    gmml = small_gmml()
    nn.init.zeros_(gmml.backbone.vit.norm.weight)
    nn.init.ones_(gmml.backbone.vit.norm.bias)
    metrics = {name: value.item() for name, value in gmml(small_batch(gmml), START).metrics.items()}
    assert "features have collapsed" in gmml.diagnose(metrics | {"explained": 0.3}, LATE)


def test_gmml__colours_need_rgb():
    with pytest.raises(ObjectiveError, match=r"takes 5 channels; set objective\.photometric=false"):
        small_gmml(in_chans=5, photometric=True)


def test_initialisation__follows_the_authors():
    gmml = small_gmml(options={"embed_dim": 192, "depth": 2, "num_heads": 3})
    assert gmml.backbone.vit.cls_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert gmml.backbone.vit.pos_embed.std().item() == pytest.approx(0.02, rel=0.1)
    for layer in (gmml.head.mlp[0], gmml.backbone.vit.blocks[0].mlp.fc1):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not layer.bias.any()
