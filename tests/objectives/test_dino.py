from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.images.positions import resample_positions
from backbones.io import load_backbone, save_backbone
from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.dino.config import DINOConfig
from objectives.dino.objective import DINO
from objectives.errors import ObjectiveError
from objectives.parts import cross_view, teacher_schedules
from objectives.parts.centering import Center
from objectives.parts.prototypes import DINOHead

VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2}
SMALL = {"num_prototypes": 128, "head_hidden_dim": 48, "head_bottleneck_dim": 24, "num_local": 2, "local_size": 8}
LATE = Progress(step=900, total_steps=1000)


def small(seed: int = 0, options: dict[str, Any] = VIT, image: int = 16, patch: int = 4, **config: Any) -> DINO:
    torch.manual_seed(seed)
    in_chans = config.pop("in_chans", 3)
    pixels = {} if in_chans == 3 else {"pixel_mean": [0.4] * in_chans, "pixel_std": [0.2] * in_chans}
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=image, patch_size=patch, in_chans=in_chans, options=options, **pixels
    )
    return DINO(backbone, DINOConfig(**SMALL | config))


def images(num: int = 4, num_local: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator).to(dtype)

    return {
        "global_1": pixels(num, 3, 16, 16),
        "global_2": pixels(num, 3, 16, 16),
        "local": pixels(num_local, num, 3, 8, 8),
        "seed": torch.arange(num),
    }


def double(objective: DINO) -> DINO:
    objective.teacher.modules.double()
    return objective.double()


def read(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]


# Formulas, each against a plain loop


def plain_loss(objective: DINO, batch: dict[str, Tensor], temperature: float) -> Tensor:
    """Equations 1 to 4 of the paper, pair by pair, each crop on its own."""
    crops = [objective.backbone.preprocess(x) for x in (batch["global_1"], batch["global_2"], *batch["local"])]
    losses = []
    for i in range(2):
        taught = objective.teacher.head(objective.teacher.backbone.features(crops[i]).cls).detach()
        target = torch.softmax((taught - objective.center.value) / temperature, dim=-1)
        for v in range(len(crops)):
            if v != i:
                student = objective.head(objective.backbone.features(crops[v]).cls)
                log_p = torch.log_softmax(student / objective.config.student_temp, dim=-1)
                losses.append(-(target * log_p).sum(-1).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("num_local", [0, 1, 2])
def test_forward__loss_and_gradients_are_those_of_the_paper(num_local):
    objective = double(small(num_local=num_local, teacher_temp=0.06))
    other = double(small(seed=1))
    objective.teacher.modules.load_state_dict(other.teacher.modules.state_dict())
    objective.center.value.normal_(std=0.1)
    batch = images(num_local=max(num_local, 1))
    if num_local == 0:
        del batch["local"]
    expected = plain_loss(objective, batch | {"local": batch.get("local", torch.empty(0, 4, 3, 8, 8))}, 0.06)
    gradients = torch.autograd.grad(expected, list(objective.parameters()))
    output = objective(batch, LATE)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for parameter, gradient in zip(objective.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-13)


def test_cross_view_loss__gradient_in_float64():
    torch.manual_seed(0)
    targets = torch.randn(2, 3, 5, dtype=torch.float64).softmax(-1)
    scores = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda s: cross_view.cross_view_loss(targets, s), scores)


def test_cross_view_loss__is_least_at_the_targets_entropy():
    logits = torch.randn(1, 3, 7, dtype=torch.float64)
    targets = logits.softmax(-1)
    loss = cross_view.cross_view_loss(targets.repeat(2, 1, 1), logits.repeat(4, 1, 1))
    assert loss.item() == pytest.approx(-(targets * targets.log()).sum(-1).mean().item(), rel=1e-12)


def test_head__gives_cosines_that_do_not_depend_on_the_prototypes_length():
    torch.manual_seed(0)
    head = DINOHead(16, 9, hidden_dim=12, bottleneck_dim=8)
    tokens = torch.randn(5, 3, 16)
    logits = head(tokens)
    assert logits.shape == (5, 3, 9) and logits.abs().max() <= 1 + 1e-6
    bottleneck = head.mlp(tokens)[2, 1]
    expected = torch.cosine_similarity(bottleneck, head.prototypes[4], dim=0)
    torch.testing.assert_close(logits[2, 1, 4], expected)
    with torch.no_grad():
        head.prototypes.mul_(torch.rand(9, 1) + 0.5)
    torch.testing.assert_close(head(tokens), logits)
    reference = nn.utils.parametrizations.weight_norm(nn.Linear(8, 9, bias=False))
    with torch.no_grad():
        reference.parametrizations.weight.original0.fill_(1)
        reference.parametrizations.weight.original1.copy_(head.prototypes)
    torch.testing.assert_close(reference(nn.functional.normalize(head.mlp(tokens), dim=-1)), logits)


def test_initialisation__is_the_papers():
    objective = small(options={"embed_dim": 192, "depth": 2, "num_heads": 3, "reg_tokens": 4}, head_bottleneck_dim=64)
    vit = objective.backbone.vit
    for name, spread in (
        ("cls_token", vit.cls_token),
        ("reg_token", vit.reg_token),
        ("pos_embed", vit.pos_embed),
        ("qkv", vit.blocks[0].attn.qkv.weight),
        ("head", objective.head.mlp[0].weight),
    ):
        assert spread.std().item() == pytest.approx(0.02, rel=0.2), name
    assert objective.head.prototypes.abs().max() <= 1 / 8
    assert objective.head.prototypes.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.05)
    for mine, its in zip(objective.backbone.parameters(), objective.teacher.backbone.parameters(), strict=True):
        assert torch.equal(mine, its)


# Schedules


def test_schedules__momentum_is_the_golden_one():
    path = Path(__file__).parent.parent / "golden" / "selfpatch.json"
    golden = json.loads(path.read_text(encoding="utf-8"))["schedules"]
    config = DINOConfig(teacher_momentum=0.996)
    momenta = [teacher_schedules.teacher_momentum(config, Progress(step, 30_000)) for step in golden["iterations"]]
    assert momenta == pytest.approx(golden["momentum"], rel=1e-11)


def test_schedules__temperature_and_freezing():
    config = DINOConfig(teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup=0.3, freeze_prototypes=0.01)
    temperatures = [teacher_schedules.teacher_temperature(config, Progress(step, 100)) for step in (0, 15, 30, 99)]
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
    assert [teacher_schedules.freezes_prototypes(config, Progress(step, 200)) for step in (0, 1, 2)] == [
        True,
        True,
        False,
    ]
    assert teacher_schedules.teacher_temperature(DINOConfig(teacher_temp=0.05), Progress(0, 10)) == 0.05


def test_forward__frozen_prototypes_get_no_gradient_and_everything_else_does():
    objective = small(freeze_prototypes=0.5)
    objective(images(dtype=torch.float32), Progress(4, 10)).loss.backward()
    assert [name for name, p in objective.named_parameters() if p.grad is None] == ["head.prototypes"]
    objective(images(dtype=torch.float32), Progress(5, 10)).loss.backward()
    assert all(p.grad.abs().max() > 0 for p in objective.parameters())


# State


def test_center__is_a_running_mean_over_the_steps_rows():
    center = Center(3, momentum=0.9).double()
    first, second = torch.rand(4, 3).double(), torch.rand(2, 5, 3).double()
    center.observe(torch.full((7, 3), torch.nan), step=0)  # a step that was thrown away
    center.observe(first, step=1)
    center.observe(second, step=1)
    assert (center.value == 0).all()
    center.update()
    mean = torch.cat([first, second.flatten(0, 1)]).mean(0)
    torch.testing.assert_close(center.value, 0.1 * mean)
    center.observe(first, step=2)
    center.update()
    torch.testing.assert_close(center.value, 0.09 * mean + 0.1 * first.mean(0))


def test_after_step__moves_center_by_the_globals_and_teacher_by_the_student():
    objective = double(small(teacher_momentum=0.9, center_momentum=0.9))
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    batch = images()
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1)
        crops = torch.cat([batch["global_1"], batch["global_2"]])
        taught = objective.teacher.head(objective.teacher.backbone.features(objective.backbone.preprocess(crops)).cls)
    objective(batch, Progress(5, 10))
    objective.after_step(Progress(5, 10), read)
    torch.testing.assert_close(objective.center.value, 0.1 * taught.mean(0))
    for name, value in objective.teacher.state_dict().items():
        student = dict(objective.named_parameters())[name]
        torch.testing.assert_close(value, 0.95 * before[name] + 0.05 * student)


def test_forward__changes_no_state():
    objective = small()
    before = {name: value.clone() for name, value in {**objective.state_dict(), **objective.extra_state()}.items()}
    objective(images(dtype=torch.float32), Progress(0, 10)).loss.backward()
    for name, value in {**objective.state_dict(), **objective.extra_state()}.items():
        assert torch.equal(value, before[name]), name


def test_state__comes_back_bit_by_bit():
    objective, other = small(seed=0), small(seed=1)
    batch = images(dtype=torch.float32)
    objective(batch, Progress(0, 10))
    objective.after_step(Progress(0, 10), read)
    other.load_state_dict(objective.state_dict())
    other.load_extra_state(objective.extra_state())
    assert torch.equal(objective(batch, LATE).loss, other(batch, LATE).loss)
    assert objective.center.value.abs().max() > 0


def _loss_gradient_and_center() -> list[list[Any]]:
    """Of each rank, which takes its share of four images."""
    rank, world = dist.get_rank(), dist.get_world_size()
    objective, batch = double(small()), images(num=4)
    share = slice(rank * 4 // world, (rank + 1) * 4 // world)
    mine = {name: x[:, share] if name == "local" else x[share] for name, x in batch.items()}
    loss = objective(mine, Progress(0, 10)).loss
    loss.backward()
    objective.after_step(Progress(0, 10), read)
    found = [loss.tolist(), objective.backbone.vit.pos_embed.grad.tolist(), objective.center.value.tolist()]
    ranks: list[Any] = [None] * world
    dist.all_gather_object(ranks, found)
    return ranks


@pytest.mark.long
def test_ranks__two_give_the_loss_gradient_and_center_of_one_with_the_whole_batch(run_on_ranks):
    found = run_on_ranks(2, _loss_gradient_and_center)
    ranks = [[torch.tensor(numbers, dtype=torch.float64) for numbers in rank] for rank in found]
    objective = double(small())
    loss = objective(images(num=4), Progress(0, 10)).loss
    loss.backward()
    objective.after_step(Progress(0, 10), read)
    for number, whole in enumerate((loss.detach(), objective.backbone.vit.pos_embed.grad)):
        torch.testing.assert_close((ranks[0][number] + ranks[1][number]) / 2, whole, rtol=1e-10, atol=1e-14)
    for rank in ranks:
        torch.testing.assert_close(rank[2], objective.center.value, rtol=1e-12, atol=1e-15)


# Views, encoders, export


def test_views__are_the_papers_crops():
    objective = small(image=224, patch=16, local_size=None, num_local=8)
    one, two, local = objective.views()
    assert (one["name"], one["size"], one["scale"], "count" in one) == ("global_1", 224, (0.4, 1.0), False)
    assert (local["name"], local["size"], local["count"], local["scale"]) == ("local", 96, 8, (0.05, 0.4))
    assert one["photometric"] | {"blur_p": 0.1, "solarize_p": 0.2} == two["photometric"]
    assert [view["photometric"]["blur_p"] for view in (one, two, local)] == [1.0, 0.1, 0.5]
    assert (one["photometric"]["jitter_p"], one["photometric"]["hue"], one["photometric"]["gray_p"]) == (0.8, 0.1, 0.2)


def test_views__are_ones_that_the_pipeline_knows():
    from data_pipelines.views.specs import views_from

    assert [(view.name, view.times) for view in views_from(small(num_local=1).views())] == [
        ("global_1", None),
        ("global_2", None),
        ("local", 1),
    ]
    assert all("photometric" not in view for view in small(photometric=False).views())
    assert {view["photometric"]["blur_p"] for view in small(blur=False).views()} == {0.0}


@pytest.mark.parametrize(("image", "patch", "local"), [(32, 4, 12), (48, 8, 24), (480, 16, 208), (16, 8, 8)])
def test_views__local_size_follows_the_image_in_whole_patches(image, patch, local):
    assert small(image=image, patch=patch, local_size=None).views()[-1]["size"] == local


def test_forward__takes_an_encoder_without_class_token():
    objective = small(options=VIT | {"class_token": False, "final_norm": False})
    objective(images(dtype=torch.float32), LATE).loss.backward()
    assert all(p.grad is not None for p in objective.parameters())
    assert set(objective.pictures(images(dtype=torch.float32))) == {
        "global 1",
        "global 2",
        "local",
        "features",
        "similarity",
    }


def test_forward__takes_other_channels_without_colours():
    with pytest.raises(ObjectiveError, match=r"objective\.photometric=false"):
        small(in_chans=5)
    objective = small(in_chans=5, photometric=False, num_local=0)
    batch = {name: torch.rand(2, 5, 16, 16) for name in ("global_1", "global_2")}
    assert objective(batch, LATE).loss.isfinite()
    assert objective.pictures(batch)["global 1"].shape == (2, 3, 16, 16)


def test_exported__is_the_teachers_encoder_with_its_class_token_and_resampling(tmp_path):
    objective = small()
    with torch.no_grad():
        for parameter in objective.teacher.backbone.parameters():
            parameter.add_(0.01)
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, objective.exported.timm_state_dict(), objective.exported.spec)
    x = objective.backbone.preprocess(torch.rand(2, 3, 24, 24))
    loaded, mine = load_backbone(path).features(x), objective.teacher.backbone.features(x)
    assert mine.cls is not None and mine.cls.shape == (2, 64)
    torch.testing.assert_close(loaded.cls, mine.cls)


def test_positions__of_dino_sample_with_a_step_of_old_over_new_plus_a_tenth():
    torch.manual_seed(0)
    line = torch.randn(14, dtype=torch.float64)
    rows = line.view(14, 1).expand(14, 14)
    table = torch.cat([torch.full((1, 1, 1), 7.0).double(), rows.reshape(1, -1, 1)], dim=1)
    resampled = resample_positions(table, (14, 14), (6, 6), 1, "dino")
    assert resampled.shape == (1, 37, 1) and resampled[0, 0] == 7

    def weight(x: float) -> float:  # cubic convolution with a = -3/4
        x = abs(x)
        return 1.25 * x**3 - 2.25 * x**2 + 1 if x < 1 else -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    for row in range(1, 5):
        place = (row + 0.5) * 14 / 6.1 - 0.5
        expected = sum(weight(place - k) * line[k].item() for k in range(14))
        assert resampled[0, 1:, 0].view(6, 6)[row].tolist() == pytest.approx([expected] * 6, rel=1e-9)
    assert resample_positions(table, (14, 14), (14, 14), 1, "dino") is table


@pytest.mark.parametrize("local_size", [6, 18])
def test_dino__rejects_crops_that_are_no_whole_patches(local_size):
    with pytest.raises(ObjectiveError, match=f"objective.local_size {local_size}") as caught:
        small(local_size=local_size)
    assert "\n" not in str(caught.value)


# Precision and health


def test_bf16__loss_stays_in_float32_and_near():
    objective, batch = small(), images(dtype=torch.float32)
    expected = objective(batch, LATE).loss.item()
    for parameter in objective.parameters():
        parameter.data = parameter.data.bfloat16()
    output = objective(batch, LATE)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected, rel=0.02)
    objective.after_step(LATE, lambda parameters: [p.detach().float() for p in parameters])
    assert objective.center.value.dtype == torch.float32


def test_metrics__say_what_they_say():
    objective = double(small())
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    crops = objective.backbone.preprocess(torch.cat([images()["global_1"], images()["global_2"]]))
    targets = torch.softmax(objective.teacher.head(objective.teacher.backbone.features(crops).cls) / 0.04, -1)
    expected = -(targets * targets.log()).sum(-1).mean().item()
    assert metrics["teacher_entropy"] == pytest.approx(expected, rel=1e-6)
    assert metrics["kl"] == pytest.approx(metrics["loss"] - expected, rel=1e-5)
    assert metrics["prototypes"] == pytest.approx(len(set(targets.argmax(-1).tolist())) / 8, rel=1e-6)
    assert objective.diagnose(metrics, LATE) is None


HEALTHY = {"loss": 3.0, "teacher_entropy": 2.0, "prototypes": 0.5, "effective_rank": 20.0}


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({}, None),
        ({"loss": math.log(128), "teacher_entropy": math.log(128)}, "outputs are uniform"),
        ({"loss": math.log(128), "teacher_entropy": 2.0}, None),
        ({"loss": 0.01, "teacher_entropy": 0.005, "prototypes": 0.01}, "fallen on a few prototypes"),
        ({"loss": 0.01, "teacher_entropy": 0.005, "prototypes": 0.5}, None),
        ({"effective_rank": 1.01}, "all images have the same feature"),
    ],
)
def test_diagnose__tells_both_collapses_from_health_once_the_run_is_no_longer_young(changes, finding):
    objective = small()
    found = objective.diagnose(HEALTHY | changes, LATE)
    assert found is None if finding is None else found is not None and finding in found and "\n" not in found
    assert objective.diagnose(HEALTHY | changes, Progress(50, 1000)) is None


# Pictures


def test_pictures__have_one_size_and_leave_training_as_it_was():
    objective = small(options=VIT | {"drop_path_rate": 0.5}).train()
    state = torch.get_rng_state()
    pictures = objective.pictures(images(num=10, dtype=torch.float32))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pictures) == {"global 1", "global 2", "local", "features", "similarity", "attention"}
    assert all(p.shape == (8, 3, 16, 16) and p.min() >= 0 and p.max() <= 1 for p in pictures.values())
    assert objective.training and not objective.teacher.backbone.vit.blocks[-1].attn._forward_pre_hooks


def test_attention__of_the_class_token_is_what_the_last_block_computes():
    backbone = small(options=VIT | {"reg_tokens": 2}).backbone
    x = backbone.preprocess(torch.rand(2, 3, 16, 16))
    attention = backbone.vit.blocks[-1].attn
    attention.fused_attn = False
    seen: list[Tensor] = []
    attention.attn_drop.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    torch.testing.assert_close(backbone.attention(x), seen[0][:, :, 0, 3:])
