"""DINOv3 against numbers of the authors' code (tests/golden/dinov3.json), and what the numbers do not show."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from backbones.registry import create_backbone
from objectives import contract
from objectives.base import Progress
from objectives.dinov3.config import DINOv3Config
from objectives.dinov3.gram import gram_loss, is_refreshed
from objectives.dinov3.objective import DINOv3
from objectives.errors import ObjectiveError
from objectives.parts import cross_view, teacher_schedules
from objectives.parts.block_masks import BlockMasks
from objectives.parts.centering import Center
from objectives.parts.koleo import koleo
from objectives.parts.prototypes import DINOHead
from objectives.parts.sinkhorn import sinkhorn_knopp
from objectives.parts.token_grid import on_grid
from objectives.schedules import Schedule
from objectives.teacher import Teacher
from pretrain.training.blocks import recompute_blocks
from pretrain.training.handover import take_over

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dinov3.json").read_text())
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_reg_tokens": 1, "init_values": 0.1}
SMALL: dict[str, Any] = {
    "num_prototypes": 48, "head_hidden_dim": 24, "head_bottleneck_dim": 8, "patch_num_prototypes": 40,
    "patch_head_hidden_dim": 20, "patch_head_bottleneck_dim": 8, "num_local": 2, "local_size": 8,
}  # fmt: skip
LATE = Progress(step=900, total_steps=1000)


def wave(shape: Sequence[int], a: float, c: float, scale: float, off: float = 0.0) -> Tensor:
    """The golden values' inputs; the quadratic phase makes matrices full rank."""
    i = np.arange(math.prod(shape), dtype=np.float64)
    return torch.from_numpy((off + scale * np.sin(a * i + c * i * i)).astype(np.float32)).reshape(tuple(shape))


def close(found: Tensor | float, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        torch.as_tensor(found).detach().double(), torch.tensor(wanted, dtype=torch.float64), rtol=rtol, atol=atol
    )


def small(seed: int = 0, options: dict[str, Any] = VIT, image: int = 16, **config: Any) -> DINOv3:
    torch.manual_seed(seed)
    backbone = create_backbone("vit_small_patch16_dinov3_qkvb", image_size=image, patch_size=4, options=options)
    return DINOv3(backbone, DINOv3Config(**SMALL | config))


def images(num: int = 4, num_local: int = 2, seed: int = 0, **more: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "global_1": torch.rand(num, 3, 16, 16, generator=generator),
        "global_2": torch.rand(num, 3, 16, 16, generator=generator),
        "local": torch.rand(num_local, num, 3, 8, 8, generator=generator),
        "seed": torch.arange(num),
        **more,
    }


# Losses against the golden values


@pytest.mark.parametrize("temperature", [0.07, 0.04])
def test_dino_loss__golden(temperature: float) -> None:
    golden = GOLDEN["dino_loss"][f"temp_{temperature}"]
    teacher = wave([6, 32], 0.7, 0.013, 1)
    whole = wave([2, 3, 32], 1.1, 0.0171, 2).requires_grad_()
    local = wave([8, 3, 32], 0.37, 0.0093, 2).requires_grad_()
    targets = sinkhorn_knopp(teacher, temperature)
    close(targets[0], golden["probs_row0"])
    close(targets[5], golden["probs_row5"])
    close(targets.square().sum(), golden["sum_squares"])

    targets = targets.unflatten(0, (2, 3))
    loss = cross_view.cross_view_loss(targets, whole / 0.1)
    close(loss, golden["global_ignore_diagonal"]["loss"])
    (gradient,) = torch.autograd.grad(loss, whole)
    close(gradient.norm(), golden["global_ignore_diagonal"]["grad_norm"], rtol=1e-4)
    close(gradient.flatten()[:4], golden["global_ignore_diagonal"]["grad_first4"])
    loss = cross_view.soft_cross_entropy(targets.mean(0), local / 0.1).mean()
    close(loss, golden["local"]["loss"])
    (gradient,) = torch.autograd.grad(loss, local)
    close(gradient.norm(), golden["local"]["grad_norm"], rtol=1e-4)
    views = torch.cat([whole, local]) / 0.1
    close(cross_view.cross_view_loss(targets, views), golden["v3_combined_weighting"])


@pytest.mark.parametrize("num_iterations", [1, 3, 10])
def test_sinkhorn__golden_after_some_iterations(num_iterations: int) -> None:
    golden = GOLDEN["dino_loss"][f"sk_iters_{num_iterations}"]
    targets = sinkhorn_knopp(wave([6, 32], 0.7, 0.013, 1), 0.07, num_iterations)
    close(targets[0, :4], golden["row0_first4"])
    close(targets.sum(0).std(), golden["col_sum_std"], rtol=1e-4)


def test_sinkhorn__logits_that_overflow_without_logarithms() -> None:
    golden = GOLDEN["sinkhorn_log_domain"]["overflow_case"]
    targets = sinkhorn_knopp(wave([6, 32], 0.7, 0.013, 8), 0.04)
    close(targets.sum(1), golden["row_sums"])
    assert int(targets[0].argmax()) == golden["row0_argmax"]
    close(targets[0].max(), golden["row0_max"], rtol=1e-4)


def test_center__golden_sequence() -> None:
    golden = GOLDEN["dino_loss"]["softmax_centering_temp_0.07"]
    teacher, center = wave([6, 32], 0.7, 0.013, 1), Center(32, 0.9)
    for call, observed in ((1, teacher), (2, 0.5 * teacher), (3, None)):
        close(center.targets(teacher, 0.07)[0, :4], golden[f"call{call}_row0_first4"])
        if observed is not None:
            center.observe(observed, step=call)
            center.update()
    close(center.value[:4], golden["center_after_call3_first4"])


def test_ibot_loss__golden() -> None:
    golden = GOLDEN["ibot_loss"]
    student = wave([13, 24], 0.91, 0.0073, 2).requires_grad_()
    targets = sinkhorn_knopp(wave([13, 24], 0.53, 0.0117, 1), 0.07)
    close(targets[0], golden["teacher_row0"])
    close(targets[12], golden["teacher_row12"])
    loss = cross_view.masked_patch_loss(targets, student / 0.1, torch.tensor(golden["masks_weight"]), num_crops=4)
    close(loss, golden["loss"])
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient.norm(), golden["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), [
    ("distributed_world1_topk1", {}),
    ("distributed_world1_topk1", {"group_size": 6}),
    ("distributed_world1_topk2", {"num_neighbors": 2}),
])  # fmt: skip
def test_koleo__golden(name: str, options: dict[str, int]) -> None:
    golden = GOLDEN["koleo_loss"]
    features = wave([6, 16], 0.61, 0.0191, 1).requires_grad_()
    found = koleo(features, **options)
    close(found.loss, golden[name]["loss"])
    (gradient,) = torch.autograd.grad(found.loss, features)
    close(gradient.norm(), golden[name]["grad_norm"], rtol=1e-4)
    assert found.duplicates == 0


def test_koleo__the_same_picture_twice_or_thrice_does_not_count() -> None:
    features = wave([6, 16], 0.61, 0.0191, 1)
    features[3] = features[5] = features[1]
    features.requires_grad_()
    found = koleo(features)
    (gradient,) = torch.autograd.grad(found.loss, features)
    assert found.duplicates == 0.5  # the authors' code has a gradient of a million here
    assert gradient.isfinite().all() and gradient.norm() < 1


def test_koleo__one_image_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"koleo_weight: 1 images have .*micro_batch_size"):
        koleo(torch.ones(1, 8))
    with pytest.raises(ObjectiveError, match=r"koleo_group=4: .* multiple of the 3 images"):
        koleo(torch.ones(3, 8), group_size=4)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("level", ["image", "batch"])
@pytest.mark.parametrize(("ours", "theirs"), [
    ("keep", "none"), ("remove", "remove_neg"), ("remove_teacher", "remove_only_teacher_neg"),
])  # fmt: skip
def test_gram_loss__golden(normalize: bool, level: str, ours: str, theirs: str) -> None:
    golden = GOLDEN["gram_loss"][f"norm={normalize},img_level={level == 'image'},neg={theirs}"]
    student, teacher = wave([2, 9, 8], 0.83, 0.0157, 1).requires_grad_(), wave([2, 9, 8], 0.47, 0.0211, 1)
    loss = gram_loss(student, teacher, normalize=normalize, level=level, negatives=ours)
    close(loss, golden["loss"])
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient.norm(), golden["grad_norm"], rtol=1e-4)


@pytest.mark.parametrize("method", ["bicubic", "bilinear"])
@pytest.mark.parametrize("antialias", [True, False])
def test_gram_loss__golden_with_an_anchor_of_higher_resolution(method: str, antialias: bool) -> None:
    golden = GOLDEN["gram_loss"][f"hires_{method}_antialias={antialias}"]
    student = wave([2, 9, 8], 0.83, 0.0157, 1).requires_grad_()
    resized = on_grid(wave([2, 36, 8], 0.29, 0.0137, 1), (6, 6), (3, 3), method, antialias)
    close(resized[0, 0, :4], golden["downsampled_token0_first4"])
    close(resized.square().sum(), golden["downsampled_sum_squares"])
    loss = gram_loss(student, resized)
    close(loss, golden["loss"])
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient.norm(), golden["grad_norm"], rtol=1e-4)


# Head and moving average against the golden values


def golden_head(last_layer: str) -> DINOHead:
    head = DINOHead(12, 20, hidden_dim=16, bottleneck_dim=8, last_layer=last_layer)
    ours = dict(head.named_parameters())
    with torch.no_grad():
        for p, name, shape in GOLDEN["dino_head"]["parameters"]:
            scale = 0.05 if name.endswith("bias") else 0.3
            ours[name.replace("last_layer.weight", "prototypes")].copy_(
                wave(shape, 0.31 + 0.1 * p, 0.0119 + 0.001 * p, scale)
            )
    return head


def test_head__golden_with_a_linear_last_layer() -> None:
    golden, head = GOLDEN["dino_head"], golden_head("linear")
    tokens = wave([5, 12], 0.77, 0.0143, 1).requires_grad_()
    logits = head(tokens)
    for row in (0, 4):
        close(logits[row], golden[f"y_row{row}"])
    close(logits.square().sum(), golden["y_sum_squares"])
    (logits * wave([5, 20], 0.41, 0.0101, 1)).sum().backward()
    close(tokens.grad.norm(), golden["input_grad_norm"], rtol=1e-4)  # type: ignore[union-attr]
    norms = {name: parameter.grad.norm() for name, parameter in head.named_parameters()}  # type: ignore[union-attr]
    for name, norm in golden["param_grad_norms"].items():
        close(norms[name.replace("last_layer.weight", "prototypes")], norm, rtol=1e-4)


def test_head__golden_with_weight_norm() -> None:
    golden = GOLDEN["dino_head"]["v2_weight_norm_g1"]
    logits = golden_head("weight_norm")(wave([5, 12], 0.77, 0.0143, 1))
    close(logits[0], golden["y_row0"])
    close(logits.square().sum(), golden["y_sum_squares"])


@pytest.mark.parametrize("momentum", [0.99, 0.994, 0.999])
def test_teacher__golden_of_a_student_in_bf16(momentum: float) -> None:
    """It stays float32 and goes from 1 to 1.05 in 2000 steps; in bf16 it would not move at all."""
    student = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(student.weight)
    teacher = Teacher(layer=student)
    for _ in range(2000):
        teacher.update(momentum, lambda _: [torch.tensor([[1.05]])])
    moved = GOLDEN["ema_in_bf16"]["teacher 1.00 -> student 1.05, 2000 steps"][f"m={momentum}"]
    close(teacher.layer.weight[0, 0], moved["fp32"])  # type: ignore[index]


# A whole step against the golden values


def masks_of(is_masked: Tensor) -> BlockMasks:
    idx, others = is_masked.flatten().nonzero()[:, 0], (~is_masked).flatten().nonzero()[:, 0]
    return BlockMasks(is_masked, idx, others, 1 / is_masked.sum(1)[idx // is_masked.shape[1]])


class FixedMasks(DINOv3):
    """DINOv3 with the masks of the golden step."""

    def _masks(self, seeds: Tensor, images: Tensor) -> BlockMasks:
        is_masked = torch.zeros(4, 16, dtype=torch.bool)
        is_masked[0, [0, 1, 2, 5]] = is_masked[3, 8:] = True
        return masks_of(is_masked)


def golden_step() -> tuple[FixedMasks, dict[str, Tensor]]:
    backbone = create_backbone(
        "vit_small_patch16_dinov3_qkvb",
        image_size=16,
        patch_size=4,
        options=VIT | {"embed_dim": 32},
        pixel_mean=[0.0] * 3,
        pixel_std=[1.0] * 3,
    )
    config = DINOv3Config(**SMALL | {"drop_path": 0.0, "gram_weight": 1.0, "gram_size": 32, "teacher_temp_start": 0.07})
    objective = FixedMasks(backbone, config)

    def fill(own: dict[str, Tensor], offset: int) -> None:
        for p, name, shape, off, scale in GOLDEN["end_to_end_step"]["parameter_table"]:
            value = wave(shape, 0.31 + 0.1 * (p + offset), 0.0119 + 0.001 * (p + offset), scale, off)
            name = name.replace("dino_head.", "head.").replace("ibot_head.", "patch_head.")
            name = name.replace("last_layer.weight", "prototypes")
            if name in own:
                own.pop(name).data.copy_(value)
        assert not own, f"not in the table: {own.keys()}"

    def named(backbone: Any, *more: tuple[str, nn.Module]) -> dict[str, Tensor]:
        found = dict(backbone.network.named_parameters())
        return found | {f"{name}.{key}": value for name, part in more for key, value in part.named_parameters()}

    heads = (("head", objective.head), ("patch_head", objective.patch_head))
    fill(named(backbone, *heads) | {"mask_token": objective.mask_token}, 0)
    teacher = objective.teacher
    fill(named(teacher.backbone, ("head", teacher.head), ("patch_head", teacher.patch_head)), 100)
    assert objective.anchor is not None
    fill(named(objective.anchor.backbone), 200)
    whole, local = wave([4, 3, 16, 16], 0.43, 0.00731, 1), wave([4, 3, 8, 8], 0.57, 0.00917, 1)
    anchored = wave([4, 3, 32, 32], 0.21, 0.00311, 1)
    batch = {
        "global_1": whole[:2], "global_2": whole[2:], "local": local.unflatten(0, (2, 2)), "gram_1": anchored[:2],
        "gram_2": anchored[2:], "seed": torch.arange(2),
    }  # fmt: skip
    return objective, batch


def test_step__golden() -> None:
    """The specification says that norms have an epsilon of 1e-6; the numbers are those of 1e-5, which timm's have."""
    golden = GOLDEN["end_to_end_step"]
    objective, batch = golden_step()
    output = objective(batch, LATE)
    terms = golden["terms"]
    close(output.metrics["dino_global"], terms["dino_global_crops_loss"])
    close(output.metrics["dino_local"], terms["dino_local_crops_loss"])
    close(output.metrics["ibot"], terms["ibot_loss"])
    close(output.metrics["koleo"], terms["koleo_loss"])
    close(output.metrics["gram"], terms["gram_loss"])
    close(output.metrics["gram_masked"], terms["stats_only/masked_gram_loss"])
    close(output.metrics["gram_unmasked"], terms["stats_only/unmasked_gram_loss"])
    close(output.loss, golden["total_loss"])

    output.loss.backward()
    squares: dict[str, float] = {}
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None, name
        part = objective.part_of(name)
        squares[part] = squares.get(part, 0.0) + float(parameter.grad.double().square().sum())
    wanted = golden["grad_norm"]
    close(squares["backbone"] ** 0.5, wanted["backbone"], rtol=1e-4)
    close(squares["head"] ** 0.5, wanted["dino_head"], rtol=1e-4)
    close(squares["patch_head"] ** 0.5, wanted["ibot_head"], rtol=1e-4)
    own = dict(objective.named_parameters())
    names = {
        "storage_tokens": "reg_token", "blocks.0.ls1.gamma": "blocks.0.gamma_1",
        "dino_head.last_layer.weight": "head.prototypes", "ibot_head.last_layer.weight": "patch_head.prototypes",
    }  # fmt: skip
    for name, norm in golden["param_grad_norms"].items():
        name = names.get(name, name)
        gradient = own[name if name in own else f"backbone.vit.{name}"].grad
        assert gradient is not None
        close(gradient.norm(), norm, rtol=1e-4)


def test_teacher__golden_after_a_step() -> None:
    """The moving average at m = 0.9, of parameters that have not moved."""
    objective, _ = golden_step()
    objective.config.teacher_momentum = objective.config.teacher_momentum_end = 0.9
    objective.after_step(LATE, contract.read_weights)
    close(
        objective.teacher.backbone.network.cls_token[0, 0, :4],
        GOLDEN["end_to_end_step"]["ema_after_m0.9_cls_token_first4"],
    )


def test_param_groups__golden_scales_of_a_vit_l() -> None:
    golden = GOLDEN["param_groups_vit_large_decay0.9_patch0.2"]
    torch.manual_seed(0)
    options = {"embed_dim": 16, "num_heads": 2, "num_reg_tokens": 1}  # 24 blocks, as deep as the real one
    backbone = create_backbone("vit_large_patch16_dinov3_qkvb", image_size=16, patch_size=4, options=options)
    objective = DINOv3(backbone, DINOv3Config(**SMALL | {"local_norm": True}))
    groups = objective.param_groups(0.04, layer_decay=0.9)
    found = {id(parameter): group for group in groups for parameter in group["params"]}
    names = {
        "storage_tokens": "reg_token",
        "local_cls_norm.weight": "local_norm.weight",
        "blocks.0.ls1.gamma": "blocks.0.gamma_1",
        "blocks.0.attn.qkv.bias": "blocks.0.attn.q_bias",
    }
    own = dict(objective.named_parameters()) | dict(backbone.network.named_parameters())
    of_backbone = [name for name in golden if ":" not in name and name not in ("columns", "fused_group_count")]
    assert len(of_backbone) == 13
    for name in of_backbone:
        rate, decay, _ = golden[name]
        group = found[id(own[names.get(name, name)])]
        close(group["lr_scale"], rate)
        assert group["wd_scale"] == decay
    assert {group["frozen_share"] for group in groups} == {0.0, objective.config.freeze_prototypes}
    assert found[id(objective.head.prototypes)]["frozen_share"] > 0


# Schedules against the golden values

SCHEDULES = GOLDEN["schedules"]
IN1K, SEVEN_B = 125_000, 1_000_000


def values(name: str) -> dict[int, float]:
    (found,) = (block for key, block in SCHEDULES.items() if key.startswith(name))
    return {int(step): value for step, value in found.items() if step.isdigit()}


@pytest.mark.parametrize(("name", "schedule"), [
    ("vitl_im1k_lr", Schedule(1e-3 * 4 * 2**0.5, 1e-6, IN1K, 12_500, "inclusive")),
    ("vitl_im1k_wd", Schedule(0.04, 0.4, IN1K)),
    ("vit7b_pretrain_lr", Schedule(4e-4, 4e-4, SEVEN_B, 100_000)),
    ("trunc_extra_0.25", Schedule(1.0, 0.0, 1000, 100, "inclusive", stretch=0.25)),
    ("toy start0 peak1 end0.1", Schedule(1.0, 0.1, 50, 10, decay_steps=40)),
    ("toy cosine_iterations20", Schedule(1.0, 0.1, 50, 10, decay_steps=20)),
    ("vit7b_highres_lr", Schedule(7.071067811865475e-05, 7.071067811865475e-05, 30_000, 10_000, "cosine")),
])  # fmt: skip
def test_schedules__golden_rates(name: str, schedule: Schedule) -> None:
    assert {step: schedule.at(step) for step in values(name)} == pytest.approx(values(name), rel=1e-11, abs=1e-18)


def test_schedules__golden_temperatures_and_momentum() -> None:
    def temperatures(total: int, **config: Any) -> dict[int, float]:
        settings = DINOv3Config(**config)
        return {
            step: teacher_schedules.teacher_temperature(
                settings, Progress(step, total), inclusive=settings.teacher_temp_inclusive
            )
            for step in wanted
        }

    wanted = values("vitl_im1k_teacher_temp")
    assert temperatures(IN1K) == pytest.approx(wanted, rel=1e-12)
    wanted = values("vit7b_teacher_temp")
    found = temperatures(SEVEN_B, teacher_temp_warmup=0.1, teacher_temp_inclusive=False)
    assert found == pytest.approx(wanted, rel=1e-12)
    wanted, objective = values("vitl_im1k_momentum"), small()
    found = {step: objective._momentum(Progress(step, IN1K)) for step in wanted}
    assert found == pytest.approx(wanted, rel=1e-12)


def test_schedules__golden_weights_of_the_gram_stage() -> None:
    """The authors' stage goes on counting at a million steps, where ours begins at 0."""
    objective = small(ramp_steps=1000, gram_weight_start=0.0, gram_weight=2.0, local_weight_start=1.0, local_weight=0.5)
    config = objective.config
    for name, start, end in (
        ("vit7b_gram_weight", config.gram_weight_start, config.gram_weight),
        ("vit7b_gram_stage_local_dino_weight", config.local_weight_start, config.local_weight),
    ):
        wanted = {step - 1_000_000: value for step, value in values(name).items() if step >= 1_000_000}
        found = {step: objective._ramped(start, end, Progress(step, 200_000)) for step in wanted}
        assert found == pytest.approx(wanted, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize(("every", "first", "most", "refreshed"), [
    (10_000, 1_010_000, 3, [1_010_000, 1_020_000, 1_030_000]),
    (10, 25, 2, [30, 40]),
    (5, 0, 3, [5, 10, 15]),
    (None, 0, 3, []),
])  # fmt: skip
def test_gram__the_anchor_is_refreshed_at_the_documented_steps(
    every: int | None, first: int, most: int, refreshed: list[int]
) -> None:
    steps = {0, 1, *range(5, 100, 5), *range(1_000_000, 1_060_000, 5_000)}
    assert [step for step in sorted(steps) if is_refreshed(step, every, first, most)] == refreshed


# iBOT, a configuration


class IBOTMasks(DINOv3):
    """DINOv3 with the masks of iBOT's golden step: (view, image, row, column, height, width)."""

    def _masks(self, seeds: Tensor, images: Tensor) -> BlockMasks:
        maps = torch.zeros(2, 2, 8, 8, dtype=torch.bool)
        for view, image, row, column, height, width in (
            (0, 0, 1, 2, 3, 4), (0, 0, 5, 0, 2, 2), (1, 0, 0, 0, 2, 3), (1, 1, 3, 3, 4, 4)
        ):  # fmt: skip
            maps[view, image, row : row + height, column : column + width] = True
        return masks_of(maps.view(4, 64))


def test_ibot__golden(golden_recipe: Any) -> None:
    """Two calls with a move of the centers between them, and the gradient of the first."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "ibot.json").read_text())["ibot"]
    backbone = create_backbone(
        "vit_tiny_patch16_224", image_size=32, patch_size=4, options={"embed_dim": 64, "depth": 2, "num_heads": 4},
        pixel_mean=[0] * 3, pixel_std=[1] * 3,
    )  # fmt: skip
    config = DINOv3Config(
        num_prototypes=128, head_hidden_dim=96, head_bottleneck_dim=32, shared_head=True, patch_num_prototypes=128,
        last_layer="weight_norm_frozen", num_local=2, local_size=16, targets="softmax", patch_center="all",
        teacher_temp=0.04, teacher_temp_start=0.04, patch_teacher_temp=0.07, koleo_weight=0.0, drop_path=0.0,
    )  # fmt: skip
    objective = IBOTMasks(backbone, config)
    teacher = objective.teacher
    with torch.no_grad():
        for side, parts in (
            ("student", {"backbone": backbone.network, "head": objective.head}),
            ("teacher", {"backbone": teacher.backbone.network, "head": teacher.head}),
        ):
            for part, module in parts.items():
                for name, parameter in module.named_parameters():
                    name = name.replace("prototypes", "last_layer.weight_v")
                    parameter.copy_(golden_recipe.weight(f"ibot.{side}.{part}.", name, tuple(parameter.shape)))
        objective.mask_token.copy_(golden_recipe.weight("ibot.student.backbone.", "masked_embed", (1, 64)))
    objective.double()
    teacher.modules.double()
    batch = {
        name: golden_recipe.image(2, 3, 32, 32, tag).double() for name, tag in (("global_1", 0.3), ("global_2", 1.1))
    }
    batch["local"] = torch.stack([golden_recipe.image(2, 3, 16, 16, tag).double() for tag in (2.0, 2.6)])
    batch["seed"] = torch.arange(2)

    output = objective(batch, LATE)
    call = golden["call1"]
    close(output.metrics["cls_loss"], call["cls"], rtol=1e-9)
    close(output.metrics["ibot"], call["patch"], rtol=1e-9)
    close(output.loss, call["loss"], rtol=1e-9)
    output.loss.backward()
    squares = [parameter.grad.square().sum() for parameter in objective.parameters() if parameter.grad is not None]
    close(torch.stack(squares).sum().sqrt(), golden["grad_norm"], rtol=1e-8)
    assert objective.mask_token.grad is not None
    close(objective.mask_token.grad.norm(), golden["grad_norm_per_param"]["backbone.masked_embed"], rtol=1e-8)

    objective.center.update()
    objective.patch_center.update()
    after = golden["centre_after"]
    close(objective.center.value.norm(), after["cls_l2"], rtol=1e-9)
    close(objective.patch_center.value.norm(), after["patch_l2"], rtol=1e-9)
    output, call = objective(batch, LATE), golden["call2"]
    close(output.metrics["cls_loss"], call["cls"], rtol=1e-9)
    close(output.metrics["ibot"], call["patch"], rtol=1e-9)
    close(output.loss, call["loss"], rtol=1e-9)


# What holds for every configuration

CONFIGS: dict[str, dict[str, Any]] = {
    "pretrain": {},
    "gram": {"gram_weight": 2.0, "gram_weight_start": 0.0, "ramp_steps": 2, "gram_from": "teacher"},
    "gram_large": {"gram_weight": 1.0, "gram_from": "teacher", "gram_size": 32},
    "gram_live": {"gram_weight": 1.0, "gram_from": "live", "gram_normalize": False},
    "gram_masked": {"gram_weight": 1.0, "gram_from": "teacher", "gram_level": "batch", "gram_tokens": "masked"},
    "gram_unmasked": {"gram_weight": 1.0, "gram_from": "teacher", "gram_level": "batch", "gram_tokens": "unmasked"},
    "highres_7b": {"local_norm": True, "local_weight": 0.5, "rope_rescale": 2.0, "rope_jitter": 1.2, "rope_shift": 0.1},
    "dinov2": {"last_layer": "weight_norm", "drop_path": 0.4},
    "ibot": {
        "targets": "softmax", "shared_head": True, "patch_num_prototypes": 48, "patch_center": "all",
        "koleo_weight": 0.0, "last_layer": "weight_norm_frozen", "patch_teacher_temp": 0.05,
    },
    "ibot_short": {
        "targets": "softmax", "patch_targets": "sinkhorn", "shared_head": True, "patch_num_prototypes": 48,
    },
    "no_local": {"num_local": 0},
}  # fmt: skip


@pytest.mark.parametrize("check", contract.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_contract(name: str, check: Any) -> None:
    objective = small(**CONFIGS[name])
    batch = images()
    if "gram_size" in CONFIGS[name]:
        batch |= {"gram_1": torch.rand(4, 3, 32, 32), "gram_2": torch.rand(4, 3, 32, 32)}
    if CONFIGS[name].get("num_local") == 0:
        del batch["local"]
    assert {view["name"] for view in objective.views()} == batch.keys() - {"seed"}
    check(objective, batch)


@pytest.mark.parametrize(("targets", "patch_targets"), [("softmax", "sinkhorn"), ("sinkhorn", "softmax")])
def test_targets__of_class_tokens_and_of_patches_are_chosen_apart(targets: str, patch_targets: str) -> None:
    def losses(**config: Any) -> dict[str, Tensor]:
        return small(**config)(images(), LATE).metrics

    mixed, as_cls, as_patches = (
        losses(targets=targets, patch_targets=patch_targets),
        losses(targets=targets),
        losses(targets=patch_targets),
    )
    for name in ("dino_global", "dino_local"):
        close(mixed[name], as_cls[name].item())
        assert mixed[name] != as_patches[name]
    close(mixed["ibot"], as_patches["ibot"].item())
    assert mixed["ibot"] != as_cls["ibot"]


def test_weights__are_the_authors_in_the_place_of_timms_and_otherwise_those_that_were_asked_for() -> None:
    def drawn(init: str) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        arguments = {"image_size": 16, "patch_size": 4, "options": VIT, "init": init}
        alone = create_backbone("vit_small_patch16_dinov3_qkvb", **arguments)
        weight = alone.network.blocks[0].attn.qkv.weight.detach().clone()
        return weight, DINOv3(alone, DINOv3Config(**SMALL)).backbone.network.blocks[0].attn.qkv.weight

    before, after = drawn("mae")
    assert torch.equal(before, after) and after.std() > 0.05
    before, after = drawn("timm")
    assert not torch.equal(before, after) and 0.018 < after.std() < 0.022


# Sizes, stages and settings


def test_views__crops_of_the_anchor_are_those_of_the_student_without_distortion() -> None:
    views = {view["name"]: view for view in small(gram_weight=1.0, gram_from="teacher", gram_size=32).views()}
    assert views["gram_1"] == {"name": "gram_1", "size": 32, "same_crop_as": "global_1"}
    assert [views[name]["photometric"]["blur_p"] for name in ("global_1", "global_2", "local")] == [0.0, 0.9, 0.5]
    assert views["global_2"]["photometric"]["solarize_p"] == 0.2
    plain = small(blur=False).views()
    assert {view["photometric"]["blur_p"] for view in plain} == {0.0}


def test_mixed_views__the_same_at_other_sizes() -> None:
    mix = {"mix_share": [0.3, 0.2], "mix_global": [24, 32], "mix_local": [8, 16]}
    objective = small(gram_weight=1.0, gram_from="teacher", gram_size=32, mix_gram=[48, 64], **mix)
    (first, views), (second, larger) = objective.mixed_views()
    assert (first, second) == (0.3, 0.2)
    sizes = [{view["name"]: view["size"] for view in each} for each in (objective.views(), views, larger)]
    assert [tuple(each[name] for name in ("global_1", "global_2", "local", "gram_2")) for each in sizes] == [
        (16, 16, 8, 32), (24, 24, 8, 48), (32, 32, 16, 64),
    ]  # fmt: skip
    assert [view["photometric"] for view in views[:3]] == [view["photometric"] for view in objective.views()[:3]]


def test_forward__takes_crops_of_any_size() -> None:
    objective = small(gram_weight=1.0, gram_from="teacher", gram_size=32)
    batch = images()
    batch |= {f"global_{i}": torch.rand(4, 3, 24, 24) for i in (1, 2)}
    batch |= {f"gram_{i}": torch.rand(4, 3, 48, 48) for i in (1, 2)} | {"local": torch.rand(2, 4, 3, 16, 16)}
    assert objective(batch, LATE).loss.isfinite()


@pytest.mark.parametrize(("config", "line"), [
    ({"gram_tokens": "masked"}, "gram_tokens selects patches of the whole batch; set objective.gram_level=batch"),
    ({"gram_from": "live", "gram_size": 32, "gram_weight": 1.0}, "gram_from=live has none"),
    ({"gram_from": "live", "gram_every": 3, "gram_weight": 1.0}, "gram_from=live has none"),
    ({"num_local": 0, "local_norm": True}, "objective.num_local=0 has none"),
    ({"shared_head": True}, "set patch_num_prototypes as num_prototypes"),
    ({"mix_share": [0.5]}, "give each as many items"),
    ({"mix_share": [0.5, 0.6], "mix_global": [16, 24], "mix_local": [8, 8]}, "more than 1 in sum"),
    ({"mix_share": [0.5], "mix_global": [16], "mix_local": [8], "mix_gram": [32]}, "and gram_size"),
    ({"gram_size": 30, "gram_weight": 1.0}, "needs images of 30 px"),
])  # fmt: skip
def test_settings__that_exclude_each_other_are_refused(config: dict[str, Any], line: str) -> None:
    with pytest.raises(ObjectiveError, match=line):
        small(**config)


def test_settings__rotary_positions_are_moved_where_there_are_some() -> None:
    torch.manual_seed(0)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2}
    plain = create_backbone("vit_tiny_patch16_224", image_size=16, patch_size=4, options=options)
    DINOv3(plain, DINOv3Config(**SMALL))
    with pytest.raises(ObjectiveError, match=r"'vit_tiny_patch16_224' has none: .*dinov3"):
        DINOv3(plain, DINOv3Config(**SMALL | {"rope_rescale": 2.0}))
    dropping = create_backbone(
        "vit_tiny_patch16_224", image_size=16, patch_size=4, options=options | {"drop_path_rate": 0.1}
    )
    with pytest.raises(ObjectiveError, match="leave out drop_path_rate"):
        DINOv3(dropping, DINOv3Config(**SMALL))


def test_begin__an_anchor_of_step_0_is_the_teacher() -> None:
    objective = small(gram_weight=1.0, gram_from="teacher", mask_share=0.0, drop_path=0.0)
    with torch.no_grad():
        for parameter in objective.teacher.modules.parameters():
            parameter.mul_(1.5)
    assert objective.anchor is not None
    student = {name: value.clone() for name, value in objective.anchor.state_dict().items()}
    objective.begin(contract.read_weights)
    teacher = objective.teacher.backbone.state_dict()
    assert any(not torch.equal(value, student[name]) for name, value in objective.anchor.state_dict().items())
    assert all(torch.equal(value, teacher[name]) for name, value in objective.anchor.state_dict().items())
    assert objective(images(), LATE).metrics["gram_drift"] == 0


def test_gram__student_and_anchor_alike_without_masks_have_no_loss() -> None:
    objective = small(gram_weight=1.0, gram_from="teacher", mask_share=0.0, drop_path=0.0)
    batch = images()
    assert objective(batch, LATE).metrics["gram"] == pytest.approx(0.0, abs=1e-12)


def test_gram__the_anchor_moves_at_its_steps_and_never_otherwise() -> None:
    objective = small(gram_weight=1.0, gram_from="teacher", gram_step=2, gram_every=4, gram_most=1)
    assert objective.anchor is not None
    weights = []
    for step in range(9):
        with torch.no_grad():
            objective.backbone.vit.cls_token += 1
        objective.after_step(Progress(step, 9), contract.read_weights)
        weights.append(float(objective.anchor.backbone.network.cls_token.sum()))
        teacher = float(objective.teacher.backbone.network.cls_token.sum())  # type: ignore[operator, union-attr]
        assert (weights[-1] == teacher) == (step + 1 in (2, 4)), step
    assert len(set(weights)) == 3


def test_step__depends_on_the_seed_alone_where_blocks_are_recomputed() -> None:
    """Stochastic depth and moved positions come out the same the second time."""
    objective = small(drop_path=0.5, rope_rescale=2.0, rope_shift=0.1)
    batch = images()

    def gradient() -> Tensor:
        objective.zero_grad()
        objective(batch, LATE).loss.backward()
        found = objective.backbone.vit.blocks[0].attn.qkv.weight.grad
        return found.clone()  # type: ignore[no-any-return]

    before = gradient()
    recompute_blocks(objective.repeated_blocks())
    assert torch.equal(gradient(), before)
    assert not torch.equal(objective({**batch, "seed": batch["seed"] + 9}, LATE).loss, objective(batch, LATE).loss)


def test_diagnose__targets_that_stay_uniform_and_class_tokens_alike() -> None:
    objective = small()
    output = objective(images(), LATE)
    healthy = {name: float(value) for name, value in output.metrics.items()}
    stuck = healthy | {"cls_loss": math.log(48), "cls_teacher_entropy": math.log(48) - 1e-4}
    finding = objective.diagnose(stuck, LATE)
    assert finding is not None and "cls outputs are uniform" in finding
    assert objective.diagnose(stuck, Progress(5, 1000)) is None
    patches = healthy | {"patch_loss": math.log(40), "patch_teacher_entropy": math.log(40)}
    assert "patch outputs are uniform" in (objective.diagnose(patches | {"cls_loss": 1.0}, LATE) or "")


def test_teacher__and_anchor_drop_and_move_nothing_while_the_student_trains() -> None:
    """What they make of a batch is the same, whatever the student leaves out and however its positions are moved."""
    config = {"gram_weight": 1.0, "gram_from": "teacher"}
    found = []
    for moves in ({"drop_path": 0.0}, {"drop_path": 0.8, "rope_rescale": 2.0, "rope_shift": 0.3}):
        objective = small(**config, **moves)
        objective.train()
        assert objective.anchor is not None and not objective.anchor.module.training
        found.append(objective(images(), LATE).metrics)
    for name in ("cls_teacher_entropy", "patch_teacher_entropy", "gram_drift"):
        assert torch.equal(found[0][name], found[1][name])
    assert found[0]["gram"] != found[1]["gram"] and found[0]["cls_loss"] != found[1]["cls_loss"]


def test_stages__another_resolution_takes_every_weight_as_it_is() -> None:
    """Rotary positions have no weights: nothing is resampled, and nothing begins anew."""
    before, after = (
        small(seed, image=image, gram_weight=1.0, gram_from="teacher") for seed, image in ((1, 16), (2, 24))
    )
    weights = {**dict(before.named_parameters()), **before.extra_state()}
    taken = take_over(after, weights)
    assert not (taken.resampled or taken.fresh or taken.unused)
    found = {**dict(after.named_parameters()), **after.extra_state()}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    larger = {name: torch.rand(4, 3, 24, 24) for name in ("global_1", "global_2")}
    assert after(images() | larger, LATE).loss.isfinite()
