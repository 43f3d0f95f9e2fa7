from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.errors import ObjectiveError
from objectives.gmml.config import GMMLConfig
from objectives.gmml.objective import GMML
from objectives.parts.batch_norm import BatchNorm
from objectives.sit import objective as sit_module
from objectives.sit.config import SiTConfig
from objectives.sit.objective import Projector, SiT, contrast

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "sit.json").read_text(encoding="utf-8"))
START, LATE = Progress(step=0, total_steps=100), Progress(step=200, total_steps=1000)
TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2}
LIGHT = {"projector_hidden_dim": 48, "projector_dim": 16}


def small_sit(name="vit_tiny_patch16_224", in_chans=3, options=TINY, **config):
    torch.manual_seed(0)
    pixels = {} if in_chans == 3 else {"pixel_mean": [0.4] * in_chans, "pixel_std": [0.2] * in_chans}
    backbone = create_backbone(name, image_size=16, patch_size=4, in_chans=in_chans, options=options, **pixels)
    return SiT(backbone, SiTConfig(**LIGHT | {"photometric": in_chans == 3} | config))


def small_batch(sit: SiT, num: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (num, sit.backbone.in_chans, sit.backbone.image_size, sit.backbone.image_size)
    views = [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator) for _ in range(2)]
    return {"view_1": views[0], "view_2": views[1], "seed": torch.arange(num)}


def floats(metrics):
    return {name: value.item() for name, value in metrics.items()}


# Golden values


def official_name(name: str) -> str:
    for ours, theirs in (
        ("backbone.vit.", "backbone."),
        ("projector.", "head."),
        ("head.mlp.", "head_recons.mlp."),
        ("head.paint.", "head_recons.convTrans."),
    ):
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


@pytest.fixture
def golden_sit(golden_recipe):
    """Builds the golden model: ViT 64 x 2, patch 4, 32 px, projector 64-96-96-32; images pass unnormalised."""

    def fill(named_parameters, prefix):
        with torch.no_grad():
            for key, parameter in named_parameters:
                parameter.copy_(golden_recipe.weight(prefix, official_name(key), tuple(parameter.shape)))

    def filled(name, image_size, patch_size, options, dtype, **config):
        backbone = create_backbone(
            name, image_size=image_size, patch_size=patch_size, options=options, pixel_mean=[0] * 3, pixel_std=[1] * 3
        )
        sit = SiT(backbone, SiTConfig(**config))
        fill(sit.named_parameters(), "sit.student.")
        fill(sit.teacher.modules.named_parameters(), "sit.teacher.")
        sit.teacher.modules.to(dtype)
        return sit.to(dtype)

    def build(dtype=torch.float64, **config):
        head = {"projector_hidden_dim": 96, "projector_dim": 32}
        vit = {"embed_dim": 64, "depth": 2, "num_heads": 4}
        return filled("vit_tiny_patch16_224", 32, 4, vit, dtype, **head | config)

    build.filled = filled
    return build


@pytest.fixture
def golden_batch(golden_recipe):
    blocks = [
        [[4 * ((i + view) % 3), 4 * ((2 * i + view) % 5), 12 + i, 10 + 2 * view]] for view in (0, 1) for i in range(4)
    ]

    def make(dtype=torch.float64, shift=0.0):
        views = [golden_recipe.image(4, 3, 32, 32, tag + shift).to(dtype) for tag in (0.3, 1.1)]
        return {
            "view_1": views[0],
            "view_2": views[1],
            "seed": torch.zeros(4, dtype=torch.int64),
            "blocks": torch.tensor(blocks),
            "is_alien": torch.zeros(8, dtype=torch.bool),
        }

    return make


def gradient_norm(module: nn.Module) -> float:
    return math.sqrt(sum(p.grad.double().square().sum().item() for p in module.parameters()))


def test_golden__float64_losses_and_each_gradient(golden_sit, golden_batch):
    golden = GOLDEN["sit"]
    sit = golden_sit()
    output = sit(golden_batch(), START)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(golden["f64"]["loss"], rel=1e-9)
    assert output.metrics["contrastive"].item() == pytest.approx(golden["f64"]["contrastive"], rel=1e-9)
    assert output.metrics["reconstruction"].item() == pytest.approx(golden["f64"]["recon"], rel=1e-9)
    norms = {official_name(name): p.grad.norm().item() for name, p in sit.named_parameters()}
    # Biases in front of a batch norm change nothing: their gradients are rounding errors.
    tiny = {name for name, norm in golden["grad_norm_per_param"].items() if norm < 1e-9}
    assert {name: norms[name] for name in norms.keys() - tiny} == pytest.approx(
        {name: norm for name, norm in golden["grad_norm_per_param"].items() if name not in tiny}, rel=1e-8
    )
    assert tiny == {"head.mlp.0.bias", "head.mlp.3.bias", "head.mlp.6.bias"}
    assert all(norms[name] < 1e-12 for name in tiny)
    assert gradient_norm(sit) == pytest.approx(golden["f64"]["grad_norm"], rel=1e-8)


def test_golden__float32_losses_and_gradient(golden_sit, golden_batch):
    golden = GOLDEN["sit"]["f32"]
    sit = golden_sit(torch.float32)
    output = sit(golden_batch(torch.float32), START)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(golden["loss"], rel=5e-6)
    assert gradient_norm(sit) == pytest.approx(golden["grad_norm"], rel=1e-5)


def test_golden__projections_reconstruction_and_statistics(golden_sit, golden_batch):
    golden = GOLDEN["sit"]
    sit, batch, seen = golden_sit(), golden_batch(), {}
    sit.projector.register_forward_hook(lambda _, args, out: seen.update(student_cls=out))
    sit.teacher.projector.register_forward_hook(lambda _, args, out: seen.update(teacher_cls=out))
    sit.head.register_forward_hook(lambda _, args, out: seen.update(recon=out))
    before_norm = []
    sit.projector.mlp[1].register_forward_hook(lambda _, args, out: before_norm.append(args[0]))
    with torch.no_grad():
        sit(batch, START)
    for key, values in seen.items():
        assert values.mean().item() == pytest.approx(golden[key]["mean"], rel=1e-8, abs=1e-14), key
        assert values.norm().item() == pytest.approx(golden[key]["l2"], rel=1e-9), key
        assert values.flatten()[:4].tolist() == pytest.approx(golden[key]["first"], rel=1e-8), key
    # We keep no running statistics; those that the authors' first batch norm would have after one step:
    variance, mean = torch.var_mean(before_norm[0], dim=0)
    for values, key in ((0.1 * mean, "student_bn1_running_mean"), (0.9 + 0.1 * variance, "student_bn1_running_var")):
        assert values[:4].tolist() == pytest.approx(golden[key]["first"], rel=1e-8)
        assert values.norm().item() == pytest.approx(golden[key]["l2"], rel=1e-8)
    target = torch.cat([batch["view_1"], batch["view_2"]])
    counts = sit.corruption.of_batch(batch, target).is_masked.sum((1, 2, 3))
    assert counts.tolist() == golden["masked_pixels_per_image"]


@pytest.mark.parametrize("precision", ["f64", "f32"])
def test_golden__six_steps_with_a_teacher(golden_sit, golden_batch, monkeypatch, precision):
    golden = GOLDEN["sit"]["trajectory"]
    dtype, tolerance = (torch.float64, 1e-9) if precision == "f64" else (torch.float32, 2e-5)
    sit = golden_sit(dtype)
    sit.teacher.copy_student()
    optimizer = torch.optim.AdamW(sit.param_groups(weight_decay=1.0), lr=0.0)
    losses = {"loss": [], "c_loss": [], "r_loss": []}
    for step, (lr, weight_decay) in enumerate(zip(golden["lr"], golden["wd"], strict=True)):
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["weight_decay"] = weight_decay if group["group_name"] == "decay" else 0.0
        optimizer.zero_grad()
        output = sit(golden_batch(dtype, shift=0.05 * (step % 3)), START)
        output.loss.backward()
        for key, value in (("loss", output.loss), ("c_loss", output.metrics["contrastive"]),
                           ("r_loss", output.metrics["reconstruction"])):  # fmt: skip
            losses[key].append(value.item())
        for parameter in sit.parameters():  # the authors clip each tensor by itself
            parameter.grad *= min(1.0, golden["clip"] / (parameter.grad.norm().item() + 1e-6))
        optimizer.step()
        sit.config.teacher_momentum = 0.9
        sit.after_step(Progress(step, 6), lambda parameters: [p.detach() for p in parameters])
    for key, values in losses.items():
        assert values == pytest.approx(golden[precision][key], rel=tolerance), key
    if precision == "f64":
        # Adam turns the rounding errors that are the gradients of these biases into steps of full length.
        free = {"head.mlp.0.bias", "head.mlp.3.bias", "head.mlp.6.bias"}
        for named, key in (
            (sit.named_parameters(), "final_student_l2"),
            (sit.teacher.modules.named_parameters(), "final_teacher_l2"),
        ):
            final = {official_name(name): parameter.norm().item() for name, parameter in named}
            expected = {name: norm for name, norm in golden[key].items() if name in final and name not in free}
            assert {name: norm for name, norm in final.items() if name not in free} == pytest.approx(expected, rel=1e-8)


def test_golden__momentum_schedule():
    golden, sit, seen = GOLDEN["schedule"], small_sit(), []
    sit.teacher.update = lambda momentum, read: seen.append(momentum)
    for step in golden["iterations"]:
        sit.after_step(Progress(step, 30000), None)
    assert seen == pytest.approx(golden["momentum"], rel=1e-11)


def test_golden__published_vit_s(golden_sit, golden_recipe):
    golden = GOLDEN["real_size"]
    sit = golden_sit.filled("vit_small_patch16_224", 224, 16, {}, torch.float32)
    assert sum(p.numel() for p in sit.parameters()) == golden["n_params"]
    blocks = [[[16 * ((i + 2 * j) % 11), 13 * ((3 * j + i) % 12), 48, 64] for j in range(6)] for i in range(8)]
    batch = {
        "view_1": golden_recipe.image(4, 3, 224, 224, 0.3),
        "view_2": golden_recipe.image(4, 3, 224, 224, 1.1),
        "seed": torch.zeros(4, dtype=torch.int64),
        "blocks": torch.tensor(blocks),
        "is_alien": torch.zeros(8, dtype=torch.bool),
    }
    with torch.no_grad():
        metrics = floats(sit(batch, START).metrics)
    assert metrics["contrastive"] == pytest.approx(golden["f32"]["contrastive"], rel=5e-6)
    assert metrics["reconstruction"] == pytest.approx(golden["f32"]["recon"], rel=2e-6)


def _same_view_pairs(sit, patch):
    patch.setattr(sit_module, "contrast", lambda q, k, t: contrast(q, k.roll(len(k) // 2, 0), t))


def _scaled(factor):
    def change(sit, patch):
        def scaled(queries, keys, temperature):
            loss, metrics = contrast(queries, keys, temperature)
            return loss, metrics | {"contrastive": loss.detach() * factor}

        patch.setattr(sit_module, "contrast", scaled)

    return change


def _one_softmax(sit, patch):
    def wrong(queries, keys, temperature):
        unit, others = functional.normalize(queries, dim=-1), functional.normalize(keys, dim=-1)
        right = torch.arange(len(unit)).roll(len(unit) // 2)
        halves = functional.cross_entropy(unit @ others.T / temperature, right, reduction="none").chunk(2)
        loss = 2 * temperature * (halves[0].mean() + halves[1].mean())
        return loss, {"contrastive": loss}

    patch.setattr(sit_module, "contrast", wrong)


def _views_apart(sit, patch):
    for projector in (sit.projector, sit.teacher.projector):
        forward = projector.forward
        patch.setattr(projector, "forward", lambda x, f=forward: torch.cat([f(half) for half in x.chunk(2)]))


def _corrupted_teacher(sit, patch):
    features, batch_corruption = sit.teacher.backbone.features, []
    of_batch = type(sit.corruption).of_batch
    patch.setattr(
        type(sit.corruption),
        "of_batch",
        lambda own, batch, images: batch_corruption.append(of_batch(own, batch, images)) or batch_corruption[-1],
    )
    patch.setattr(sit.teacher.backbone, "features", lambda x: features(batch_corruption[-1].apply(x)))


def _not_normalised(sit, patch):
    patch.setattr(functional, "normalize", lambda x, dim: x)


WRONG = {
    "without the 2*temp factor": _scaled(1 / 0.4),
    "mean of both directions instead of sum": _scaled(0.5),
    "same-view pairs (q1-k1, q2-k2)": _same_view_pairs,
    "2B keys in one softmax": _one_softmax,
    "views forwarded separately (BatchNorm over B instead of 2B)": _views_apart,
    "teacher fed corrupted images": _corrupted_teacher,
    "no normalisation": _not_normalised,
}


@pytest.mark.parametrize("name", WRONG)
def test_golden__wrong_variants_give_their_fingerprints(golden_sit, golden_batch, monkeypatch, name):
    """Each mistake made on purpose lands on its own recorded value: the golden loss would notice it."""
    sit = golden_sit()
    WRONG[name](sit, monkeypatch)
    with torch.no_grad():
        value = sit(golden_batch(), START).metrics["contrastive"].item()
    assert value == pytest.approx(GOLDEN["wrong_variants"][name]["c"], rel=1e-8)
    assert value != pytest.approx(GOLDEN["wrong_variants"]["correct"]["c"], rel=1e-9)


# Contrast


def test_contrast__equals_a_slow_loop():
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    unit_q, unit_k = (x / x.norm(dim=1, keepdim=True) for x in (queries, keys))
    total = 0.0
    for first, second in ((range(3), range(3, 6)), (range(3, 6), range(3))):
        for position, row in enumerate(first):
            logits = [unit_q[row].dot(unit_k[column]).item() / 0.2 for column in second]
            total += (math.log(sum(map(math.exp, logits))) - logits[position]) / 3
    loss, metrics = contrast(queries, keys, 0.2)
    assert loss.item() == pytest.approx(0.4 * total, rel=1e-12)
    cosines = unit_q @ unit_k.T
    right = [cosines[i, (i + 3) % 6].item() for i in range(6)]
    wrong = [cosines[i, j].item() for i in range(6) for j in range(6) if (i < 3) != (j < 3) and (i - j) % 3]
    assert metrics["positive_cosine"].item() == pytest.approx(sum(right) / 6)
    assert metrics["negative_cosine"].item() == pytest.approx(sum(wrong) / 12)


def test_contrast__gradient_in_float64():
    generator = torch.Generator().manual_seed(3)
    queries, keys = torch.randn(2, 6, 5, dtype=torch.float64, generator=generator)
    assert torch.autograd.gradcheck(lambda q: contrast(q, keys, 0.2)[0], queries.requires_grad_())


def test_contrast__guessing_explains_nothing():
    same = torch.ones(16, 4)
    loss, metrics = contrast(same, same, 0.2)
    assert loss.item() == pytest.approx(0.8 * math.log(8), rel=1e-6)
    assert metrics["contrast_explained"].item() == pytest.approx(0, abs=1e-6)
    assert metrics["projection_std"].item() == 0


def test_contrast__one_image_is_finite():
    loss, metrics = contrast(torch.randn(2, 4), torch.randn(2, 4), 0.2)
    assert loss.item() == 0
    assert all(value.isfinite() for value in metrics.values())


def test_contrast__order_of_images_does_not_matter():
    queries, keys = torch.randn(2, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.tensor([2, 0, 3, 1])
    both = torch.cat([order, order + 4])
    assert contrast(queries[both], keys[both], 0.2)[0].item() == pytest.approx(contrast(queries, keys, 0.2)[0].item())


# Batch norm


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm__equals_torch(affine):
    x = 3 + 2 * torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ours, theirs = BatchNorm(5, affine).double(), nn.BatchNorm1d(5, affine=affine).double()
    if affine:
        nn.init.normal_(ours.weight)
        nn.init.normal_(ours.bias)
        theirs.load_state_dict(ours.state_dict(), strict=False)
    gradients = []
    for norm in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = norm(leaf)
        (out * torch.arange(60.0).view(12, 5)).sum().backward()
        gradients.append((out, leaf.grad))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-10)


def test_batch_norm__bf16_weights_and_statistics_in_float32():
    norm = BatchNorm(4).bfloat16()
    x = (30 + torch.randn(64, 4)).bfloat16()  # statistics in bf16 would lose the deviation
    out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, functional.batch_norm(x.float(), None, None, training=True).bfloat16())
    assert BatchNorm(4, affine=False)(x).dtype == torch.float32


# Ranks


def _train(rank, world, path, results):
    """One rank of two, or the only one: the same global batch, injected partners within a rank's share."""
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world)
    torch.set_num_threads(1)
    outcome = {}
    for name in ("sit", "gmml"):
        torch.manual_seed(0)
        backbone = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options=TINY)
        if name == "sit":
            objective = SiT(backbone, SiTConfig(**LIGHT, alien_p=0.0)).double()
            objective.teacher.modules.double()
        else:
            objective = GMML(backbone, GMMLConfig(alien_p=0.0)).double()
        generator = torch.Generator().manual_seed(1)
        views = torch.rand(2, 8, 3, 16, 16, dtype=torch.float64, generator=generator)
        own = slice(rank * 8 // world, (rank + 1) * 8 // world)
        views, seed = views[:, own], torch.arange(8)[own]
        batch = {"view_1": views[0], "view_2": views[1], "image": views, "seed": seed}
        output = objective(batch, START)
        output.loss.backward()
        loss, gradients = output.loss.detach(), [parameter.grad for parameter in objective.parameters()]
        if world > 1:
            for tensor in [loss, *gradients]:
                dist.all_reduce(tensor)
                tensor /= world
        outcome[name] = (loss, gradients)
    if rank == 0:
        torch.save(outcome, results)
    if world > 1:
        dist.destroy_process_group()


def test_ranks__two_give_the_loss_and_gradient_of_one(tmp_path):
    """In float64 to 1e-12: contrast, batch norms and masked means are those of the global batch."""
    _train(0, 1, None, tmp_path / "one.pt")
    torch.multiprocessing.spawn(_train, (2, tmp_path / "meet", tmp_path / "two.pt"), nprocs=2)
    one, two = torch.load(tmp_path / "one.pt"), torch.load(tmp_path / "two.pt")
    for name in ("sit", "gmml"):
        assert two[name][0].item() == pytest.approx(one[name][0].item(), rel=1e-12)
        for ours, expected in zip(two[name][1], one[name][1], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-13)


# State, gradients, precision


def test_forward__changes_no_state_and_needs_no_generator():
    sit = small_sit()
    before = {name: tensor.clone() for name, tensor in (sit.state_dict() | sit.extra_state()).items()}
    state = torch.get_rng_state()
    first = sit(small_batch(sit), START).loss
    assert torch.equal(sit(small_batch(sit), START).loss, first)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in (sit.state_dict() | sit.extra_state()).items())


def test_forward__gradient_reaches_every_parameter_and_not_the_teacher():
    for options in (TINY, TINY | {"reg_tokens": 2}, TINY | {"class_token": False}):
        sit = small_sit(options=options)
        sit(small_batch(sit), START).loss.backward()
        # A bias in front of a batch norm gets rounding errors only, which may be 0.
        free = {f"projector.mlp.{number}.bias" for number in (0, 3, 6)}
        without = {n for n, p in sit.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        assert without <= free
        assert all(p.grad is not None for p in sit.parameters())
        assert all(p.grad is None for p in sit.teacher.modules.parameters())


def test_after_step__moves_the_teacher_and_round_trips():
    sit = small_sit()
    initial = {name: tensor.clone() for name, tensor in sit.teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in sit.parameters():
            parameter += 1
    sit.after_step(Progress(0, 10), lambda parameters: [p.detach() for p in parameters])
    name = "backbone.vit.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(sit.teacher.state_dict()[name], initial[name] + 0.004)
    saved = copy.deepcopy(sit.extra_state())
    other = small_sit()
    other.load_extra_state(saved)
    assert all(torch.equal(tensor, saved[key]) for key, tensor in other.extra_state().items())
    assert sit.exported is sit.teacher.backbone


def test_sit__loss_falls():
    sit = small_sit()
    batch = small_batch(sit, 8)
    optimizer = torch.optim.AdamW(sit.param_groups(0.05), lr=2e-3)
    losses = []
    for step in range(15):
        optimizer.zero_grad()
        output = sit(batch, Progress(step, 15))
        output.loss.backward()
        optimizer.step()
        sit.after_step(Progress(step, 15), lambda parameters: [p.detach() for p in parameters])
        losses.append((output.metrics["contrastive"].item(), output.metrics["reconstruction"].item()))
    assert losses[-1][0] < 0.5 * losses[0][0]
    assert losses[-1][1] < losses[0][1]


def test_bf16__parameters_cast_as_an_engine_does(golden_sit, golden_batch):
    sit = golden_sit(torch.float32)
    for parameter in sit.parameters():
        parameter.data = parameter.data.bfloat16()
    output = sit(golden_batch(torch.float32), START)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.metrics["reconstruction"].item() == pytest.approx(GOLDEN["sit"]["f64"]["recon"], rel=3e-3)
    assert output.metrics["contrastive"].item() == pytest.approx(
        GOLDEN["sit"]["f64"]["contrastive"], rel=0.1
    )  # batch norms over 8 rows amplify
    assert all(p.grad.isfinite().all() for p in sit.parameters())


# Views, pictures, findings, errors


def test_views__are_what_the_data_takes():
    from data_pipelines.views.specs import views_from

    first, second = views_from(small_sit().views())
    assert (first.name, second.name, first.scale, first.count) == ("view_1", "view_2", (0.2, 1.0), None)
    assert (first.photometric.blur_p, first.photometric.solarize_p) == (1.0, 0.0)
    assert (second.photometric.blur_p, second.photometric.solarize_p) == (0.1, 0.2)
    assert second.photometric.jitter_p == 0.8
    sharp, _ = views_from(small_sit(blur=False).views())
    assert (sharp.photometric.blur_p, sharp.photometric.gray_p) == (0.0, 0.2)


def test_pictures__of_the_first_view():
    sit = small_sit()
    batch = small_batch(sit, 10)
    shown = sit.pictures(batch)
    assert list(shown) == ["clean", "corrupted", "reconstruction"]
    assert all(
        picture.shape == (8, 3, 16, 16) and 0 <= picture.min() <= picture.max() <= 1 for picture in shown.values()
    )
    torch.testing.assert_close(shown["clean"], batch["view_1"][:8].float() / 255)
    assert sit.training


def test_diagnose__healthy_run_has_no_finding():
    sit = small_sit()
    metrics = floats(sit(small_batch(sit, 8), START).metrics)
    assert sit.diagnose(metrics | {"explained": 0.3, "contrast_explained": 0.5}, LATE) is None
    assert sit.diagnose(metrics | {"explained": 0.0, "contrast_explained": 0.0}, START) is None


def test_diagnose__images_are_not_told_apart():
    sit = small_sit()
    nn.init.zeros_(sit.teacher.projector.mlp[6].weight)  # all keys alike
    metrics = floats(sit(small_batch(sit, 8), START).metrics)
    assert metrics["contrast_explained"] == pytest.approx(0, abs=1e-5)
    assert "not told apart" in sit.diagnose(metrics | {"explained": 0.3}, LATE)


def test_diagnose__collapsed_projections():
    sit = small_sit()
    sit.projector = nn.Sequential(nn.Linear(32, 16, bias=True))
    nn.init.zeros_(sit.projector[0].weight)
    metrics = floats(sit(small_batch(sit, 8), START).metrics)
    assert "projections have collapsed" in sit.diagnose(metrics | {"contrast_explained": 0.5}, LATE)


def test_projector__no_buffers():
    assert list(Projector(8, 8, 4).buffers()) == []


def test_sit__colours_need_rgb():
    with pytest.raises(ObjectiveError, match=r"takes 5 channels; set objective\.photometric=false"):
        small_sit(in_chans=5, photometric=True)
    sit = small_sit(in_chans=5)
    assert sit(small_batch(sit), START).loss.isfinite()
