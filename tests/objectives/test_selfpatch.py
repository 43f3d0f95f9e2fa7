from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.features import Features
from backbones.io import load_backbone, save_backbone
from backbones.registry import create_backbone
from objectives.base import Progress
from objectives.dino.config import DINOConfig
from objectives.dino.objective import DINO
from objectives.errors import ObjectiveError
from objectives.selfpatch import objective as selfpatch_module
from objectives.selfpatch.aggregation import Aggregation, find_positives, neighbors_of
from objectives.selfpatch.config import SelfPatchConfig
from objectives.selfpatch.objective import SelfPatch

CPU = torch.device("cpu")
CASES = {"selfpatch_small": (32, 4, 16), "selfpatch_224": (224, 16, 96)}  # image, patch and local crop in pixels
NAMES = {
    "backbone.vit.": "backbone.",
    "aggregation.blocks": "ca_head.cls_blocks",
    "aggregation.": "ca_head.",
    "head.prototypes": "c_head.last_layer.weight_v",
    "head.": "c_head.",
    "patch_head.prototypes": "p_head.last_layer.weight_v",
    "patch_head.": "p_head.",
}
VIT = {"embed_dim": 64, "depth": 2, "num_heads": 4, "class_token": False, "final_norm": False}
SMALL = {"num_prototypes": 256, "num_patch_prototypes": 128, "head_hidden_dim": 96, "head_bottleneck_dim": 32}
LATE = Progress(step=900, total_steps=1000)


def official_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def read(parameters: list[nn.Parameter]) -> list[Tensor]:
    return [parameter.detach() for parameter in parameters]


class Golden:
    """The golden cases on our implementation; images pass unnormalised."""

    def __init__(self, recipe: Any) -> None:
        self.recipe = recipe
        path = Path(__file__).parent.parent / "golden" / "selfpatch.json"
        self.values = json.loads(path.read_text(encoding="utf-8"))

    def build(
        self, case: str, dtype: torch.dtype = torch.float64, *, teacher: str = "sp.teacher.", **config: Any
    ) -> SelfPatch:
        image, patch, local = CASES[case]
        settings = {**SMALL, "num_local": 2, "local_size": local, "aggregation_heads": 4, "freeze_prototypes": 0.0}
        objective = self.filled(
            "vit_tiny_patch16_224", image, patch, VIT, SelfPatchConfig(**settings | config), teacher
        ).to(dtype)
        objective.teacher.modules.to(dtype)
        return objective

    def filled(
        self, name: str, image: int, patch: int, options: dict[str, Any], config: SelfPatchConfig, teacher: str
    ) -> SelfPatch:
        backbone = create_backbone(
            name, image_size=image, patch_size=patch, options=options, pixel_mean=[0] * 3, pixel_std=[1] * 3
        )
        objective = SelfPatch(backbone, config)
        with torch.no_grad():
            for prefix, module in (("sp.student.", objective), (teacher, objective.teacher.modules)):
                for key, parameter in module.named_parameters():
                    parameter.copy_(self.recipe.weight(prefix, official_name(key), tuple(parameter.shape)))
        return objective

    def batch(self, case: str, dtype: torch.dtype = torch.float64, shift: float = 0.0) -> dict[str, Tensor]:
        size, _, local = CASES[case]
        tags = {"global_1": (size, 0.3), "global_2": (size, 1.1), "a": (local, 2.0), "b": (local, 2.6)}
        crops = {key: self.recipe.image(2, 3, side, side, tag + shift).to(dtype) for key, (side, tag) in tags.items()}
        return {"local": torch.stack([crops.pop("a"), crops.pop("b")]), **crops}


@pytest.fixture(scope="module")
def golden(golden_recipe):
    return Golden(golden_recipe)


def small(seed: int = 0, options: dict[str, Any] = VIT, **config: Any) -> SelfPatch:
    torch.manual_seed(seed)
    backbone = create_backbone("vit_tiny_patch16_224", image_size=32, patch_size=4, options=options)
    settings = {**SMALL, "num_local": 2, "local_size": 16, "aggregation_heads": 4}
    return SelfPatch(backbone, SelfPatchConfig(**settings | config))


def images(num: int = 4, num_local: int = 2, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    return {
        "global_1": pixels(num, 3, 32, 32),
        "global_2": pixels(num, 3, 32, 32),
        "local": pixels(num_local, num, 3, 16, 16),
        "seed": torch.arange(num),
    }


def as_float64(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x if name == "seed" else x.double() / 255 for name, x in batch.items()}


def matches(values: Tensor, expected: dict[str, Any]) -> None:
    assert values.mean().item() == pytest.approx(expected["mean"], rel=1e-8, abs=1e-12)
    assert values.norm().item() == pytest.approx(expected["l2"], rel=1e-9)
    assert values.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=1e-8)


# Golden values


@pytest.mark.parametrize("case", CASES)
def test_golden__float64_losses_gradients_and_centers_of_two_calls(golden, case):
    values = golden.values[case]
    objective = golden.build(case)
    for step, (call, after) in enumerate(
        (("call1_zero_centers", "after_call1"), ("call2_updated_centers", "after_call2"))
    ):
        objective.zero_grad()
        output = objective(golden.batch(case), Progress(step, 10))
        output.loss.backward()
        expected = values["f64"][call]
        assert output.loss.item() == pytest.approx(expected["loss"], rel=1e-9)
        assert output.metrics["cls_loss"].item() == pytest.approx(expected["cls_loss"], rel=1e-9)
        assert output.metrics["patch_loss"].item() == pytest.approx(expected["patch_loss"], rel=1e-9)
        norms = {official_name(name): p.grad.norm().item() for name, p in objective.named_parameters()}
        assert math.hypot(*norms.values()) == pytest.approx(expected["grad_norm"], rel=1e-8)
        if step == 0:
            assert norms == pytest.approx(values["grad_norm_per_param_call1"], rel=1e-8, abs=1e-14)
        objective.center.update()
        objective.patch_center.update()
        matches(objective.center.value, values["f64"][after]["center"])
        matches(objective.patch_center.value, values["f64"][after]["patch_center"])


@pytest.mark.parametrize("case", CASES)
def test_golden__float32_losses_and_gradients_of_two_calls(golden, case):
    objective = golden.build(case, torch.float32)
    for step, call in enumerate(("call1_zero_centers", "call2_updated_centers")):
        objective.zero_grad()
        output = objective(golden.batch(case, torch.float32), Progress(step, 10))
        output.loss.backward()
        expected = golden.values[case]["f32"][call]
        assert output.loss.item() == pytest.approx(expected["loss"], rel=2e-6)
        norm = math.hypot(*(p.grad.norm().item() for p in objective.parameters()))
        assert norm == pytest.approx(expected["grad_norm"], rel=1e-5)
        objective.center.update()
        objective.patch_center.update()


@pytest.mark.parametrize("case", CASES)
def test_golden__teachers_tokens_logits_positives_and_local_positions(golden, case):
    values = golden.values[case]["f64"]
    objective = golden.build(case)
    batch = golden.batch(case)
    with torch.no_grad():
        whole = objective._teach(torch.cat([batch["global_1"], batch["global_2"]]))
        local = objective._teach(batch["local"].flatten(0, 1))
    matches(whole.patches, values["teacher_tokens_global"])
    matches(local.patches, values["teacher_tokens_local"])
    for taught, kind in ((whole, "global"), (local, "local")):
        matches(taught.image_logits, values[f"teacher_cls_logits_{kind}"])
        matches(taught.patch_logits, values[f"teacher_patch_logits_{kind}"])
    chosen = whole.positives.idx[0, :4].tolist()
    expected = golden.values[case]["teacher_topk_patch_ids_global_row0_patches0to3"]
    assert [set(ids) for ids in chosen] == [set(ids) for [ids] in expected]
    teacher = objective.teacher.backbone
    side = CASES[case][2] // CASES[case][1]
    matches(teacher._positions((side, side))[1], values["teacher_pos_embed_local"])


@pytest.mark.parametrize("case", CASES)
def test_golden__neighbours_wrap_around(golden, case):
    image, patch, local = CASES[case]
    for side, kind in ((image // patch, "global"), (local // patch, "local")):
        patches = [0, 1, *([side - 1] if kind == "global" else []), side * side - 1]  # of which the file has the rows
        rows = golden.values[case][f"neighbour_table_first_{kind}"]
        assert neighbors_of((side, side), CPU).idx[patches].tolist() == rows


@pytest.mark.parametrize(("case", "epoch"), [("selfpatch_small", 3), ("selfpatch_224", 1)])
def test_golden__trajectory_of_two_epochs(golden, case, epoch):
    """Plain loop as the authors': AdamW, each gradient clipped alone, prototypes frozen in the first epoch."""
    steps = 2 * epoch
    values = golden.values[case]["trajectory"]
    objective = golden.build(case, teacher="sp.student.", freeze_prototypes=0.5)
    optimizer = torch.optim.AdamW(objective.param_groups(weight_decay=0.04))
    losses: dict[str, list[float]] = {"loss": [], "cls_loss": [], "patch_loss": []}
    for step in range(steps):
        temperature = values["teacher_temp_schedule"][step // epoch]
        momentum = values["momentum"][0]
        objective.config = replace(objective.config, teacher_temp=temperature, teacher_momentum=momentum)
        for group in optimizer.param_groups:
            group["lr"] = values["lr"][step]
            group["weight_decay"] = values["wd"][step] if group["weight_decay"] else 0.0
        optimizer.zero_grad()
        progress = Progress(step, steps)
        output = objective(golden.batch(case, shift=0.05 * (step % epoch)), progress)
        output.loss.backward()
        for name, seen in losses.items():
            seen.append(output.metrics[name].item())
        for parameter in objective.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(min(1.0, values["clip_per_param"] / (parameter.grad.norm().item() + 1e-6)))
        optimizer.step()
        objective.after_step(progress, read)
    for ours, theirs in (("loss", "loss"), ("cls_loss", "clsloss"), ("patch_loss", "patchloss")):
        assert losses[ours] == pytest.approx(values["f64"][theirs], rel=1e-9)
    assert optimizer.state[objective.head.prototypes]["step"] == values["adam_steps"]["c_head.last_layer.weight_v"]
    assert optimizer.state[objective.backbone.vit.pos_embed]["step"] == values["adam_steps"]["backbone.pos_embed"]
    matches(objective.center.value, values["final_center"])
    matches(objective.patch_center.value, values["final_patch_center"])
    for key, module in (("final_student_l2", objective), ("final_teacher_l2", objective.teacher.modules)):
        norms = {official_name(name): p.norm().item() for name, p in module.named_parameters()}
        # The gains of the weight-normalised layers are 1 and no parameters here.
        assert norms == pytest.approx({k: v for k, v in values[key].items() if "weight_g" not in k}, rel=1e-8)


def keep_globals_only(objective: SelfPatch) -> None:
    """Lets the centers see the first logits of a step only, which are those of the global crops."""
    for center in (objective.center, objective.patch_center):
        observe = center.observe
        center.observe = lambda logits, step, center=center, observe=observe: (  # type: ignore[method-assign]
            None if step == center._step else observe(logits, step)
        )


def fill_corners_with_patch_0(tokens: Tensor, grid: tuple[int, int], num_positives: int, *, wraps: bool) -> Any:
    """What the golden file's clipped variant does where a corner has only 3 neighbours."""
    positives = find_positives(tokens, grid, num_positives, wraps=False)
    return positives._replace(
        idx=positives.idx.where(positives.is_inside, 0), is_inside=torch.ones_like(positives.is_inside)
    )


WRONG: dict[str, Callable[[SelfPatch, pytest.MonkeyPatch], object]] = {
    "pos-embed resampled with timm resample_abs_pos_embed (antialias)": lambda o, _: [
        backbone.resample_positions_as("timm") for backbone in (o.backbone, o.teacher.backbone)
    ],
    "k=8 (no selection)": lambda o, _: setattr(o.config, "num_positives", 8),
    "patch weight 1.0": lambda o, _: setattr(o.config, "patch_loss_weight", 1.0),
    "centres from the 2 global views only": lambda o, _: keep_globals_only(o),
    "neighbours clipped at the border instead of wrapped": lambda o, patch: patch.setattr(
        selfpatch_module, "find_positives", fill_corners_with_patch_0
    ),
}


@pytest.mark.parametrize("variant", WRONG)
def test_golden__a_wrong_detail_gives_its_known_loss(golden, variant, monkeypatch):
    objective = golden.build("selfpatch_small")
    WRONG[variant](objective, monkeypatch)
    for step, call in enumerate(("loss_call1", "loss_call2")):
        loss = objective(golden.batch("selfpatch_small"), Progress(step, 10)).loss.item()
        assert loss == pytest.approx(golden.values["wrong_variants"][variant][call], rel=1e-9)
        objective.center.update()
        objective.patch_center.update()


def test_golden__dino_is_the_image_term(golden):
    """DINO around SelfPatch's encoder and aggregation has its image loss, and centers of the globals as DINO has."""
    objective = golden.build("selfpatch_small")
    settings = {key: SMALL[key] for key in SMALL if key != "num_patch_prototypes"}
    dino = DINO(objective.backbone, DINOConfig(**settings, num_local=2, local_size=16, freeze_prototypes=0.0)).double()
    dino.head = objective.head
    dino.teacher.modules = objective.teacher.modules

    def summed_up(modules: Any) -> Callable[[Tensor], Features]:
        encode = modules.backbone.features
        return lambda x: replace(encode(x), cls=modules.aggregation(encode(x).patches))

    teacher = objective.teacher
    dino.backbone.features, teacher.backbone.features = summed_up(objective), summed_up(teacher)
    wrong = golden.values["wrong_variants"]["centres from the 2 global views only"]
    selfpatch = golden.build("selfpatch_small")
    keep_globals_only(selfpatch)
    for step, call in enumerate(("call1_zero_centers", "call2_updated_centers")):
        loss = dino(golden.batch("selfpatch_small"), Progress(step, 10)).loss.item()
        metrics = selfpatch(golden.batch("selfpatch_small"), Progress(step, 10)).metrics
        assert loss == pytest.approx(metrics["cls_loss"].item(), rel=1e-12)
        assert loss + 0.1 * metrics["patch_loss"].item() == pytest.approx(wrong[f"loss_call{step + 1}"], rel=1e-9)
        if step == 0:
            assert loss == pytest.approx(golden.values["selfpatch_small"]["f64"][call]["cls_loss"], rel=1e-9)
        for center in (dino.center, selfpatch.center, selfpatch.patch_center):
            center.update()


@pytest.mark.slow
def test_golden__published_size(golden):
    values = golden.values["real_size"]
    options = {"class_token": False, "final_norm": False}
    objective = golden.filled("vit_small_patch16_224", 224, 16, options, SelfPatchConfig(), "sp.teacher.")
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in objective.named_children()}
    gains = {"c_head": 65536, "p_head": 4096}  # of the last layers: 1, and no parameters here
    for ours, theirs in (
        ("backbone", "backbone"),
        ("aggregation", "ca_head"),
        ("head", "c_head"),
        ("patch_head", "p_head"),
    ):
        assert counts[ours] == values["n_params"][theirs] - gains.get(theirs, 0)
    image = golden.recipe.image
    batch = {
        "global_1": image(1, 3, 224, 224, 0.3),
        "global_2": image(1, 3, 224, 224, 1.1),
        "local": torch.stack([image(1, 3, 96, 96, 2.0 + 0.6 * number) for number in range(8)]),
    }
    with torch.no_grad():
        output = objective(batch, Progress(0, 1))
    for ours, theirs in (("loss", "loss"), ("cls_loss", "cls"), ("patch_loss", "patch")):
        assert output.metrics[ours].item() == pytest.approx(values["f32"][theirs], rel=2e-6)


# Formulas, each against a plain loop


def test_loss__is_that_of_a_plain_loop():
    objective = small(freeze_prototypes=0.0, num_positives=3).double()
    objective.teacher.modules.double()
    torch.manual_seed(1)
    objective.teacher.modules.load_state_dict(
        {name: value + 0.1 * torch.randn_like(value) for name, value in objective.teacher.state_dict().items()}
    )
    objective.center.value.normal_(std=0.1)
    objective.patch_center.value.normal_(std=0.1)
    batch, config = as_float64(images()), objective.config
    teacher = objective.teacher
    views = [objective.backbone.preprocess(x) for x in (batch["global_1"], batch["global_2"], *batch["local"])]

    def cross_entropy(logits: Tensor, center: Tensor, predicted: Tensor) -> Tensor:
        target = torch.softmax((logits - center) / config.teacher_temp, -1)
        return -(target * torch.log_softmax(predicted / config.student_temp, -1)).sum(-1).mean()

    with torch.no_grad():
        z = [objective.backbone.features(x).patches for x in views]
        taught = [teacher.backbone.features(x).patches for x in views]
        student_image = [objective.head(objective.aggregation(tokens)) for tokens in z]
        teacher_image = [teacher.head(teacher.aggregation(tokens)) for tokens in taught]
        pairs = [(i, v) for i in range(2) for v in range(4) if v != i]
        cls = sum(cross_entropy(teacher_image[i], objective.center.value, student_image[v]) for i, v in pairs) / 6
        patch = 0.0
        for view in range(4):
            side = 8 if view < 2 else 4
            for image in range(4):
                unit = functional.normalize(taught[view][image], dim=-1)
                targets = []
                for n in range(side * side):
                    row, column = divmod(n, side)
                    near = [
                        (row + i) % side * side + (column + j) % side
                        for i in (-1, 0, 1)
                        for j in (-1, 0, 1)
                        if (i, j) != (0, 0)
                    ]
                    best = sorted(near, key=lambda m: -float(unit[n] @ unit[m]))[:3]
                    targets.append(teacher.aggregation(taught[view][image][best][None]))
                predicted = objective.patch_head(objective.aggregation.norm(z[view][image]))
                logits = teacher.patch_head(torch.cat(targets))
                patch += cross_entropy(logits, objective.patch_center.value, predicted) / 16
    output = objective(batch, LATE)
    assert output.metrics["cls_loss"].item() == pytest.approx(float(cls), rel=1e-10)
    assert output.metrics["patch_loss"].item() == pytest.approx(float(patch), rel=1e-10)
    assert output.loss.item() == pytest.approx(float(cls + 0.1 * patch), rel=1e-10)


@pytest.mark.parametrize("wraps", [True, False])
def test_positives__are_those_of_a_plain_loop(wraps):
    torch.manual_seed(0)
    rows, columns, tokens = 4, 5, torch.randn(2, 20, 8)
    positives = find_positives(tokens, (rows, columns), 4, wraps=wraps)
    unit = functional.normalize(tokens, dim=-1)
    for image in range(2):
        for n in range(rows * columns):
            row, column = divmod(n, columns)
            steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
            inside = [(row + i, column + j) for i, j in steps if 0 <= row + i < rows and 0 <= column + j < columns]
            near = [((row + i) % rows, (column + j) % columns) for i, j in steps] if wraps else inside
            ids = sorted((i * columns + j for i, j in near), key=lambda m: -float(unit[image, n] @ unit[image, m]))[:4]
            is_real = torch.ones(4, dtype=torch.bool) if wraps else positives.is_inside[image, n]
            assert positives.idx[image, n][is_real].tolist() == ids
            if wraps:
                is_inside = [divmod(m, columns) in inside for m in ids]
                assert positives.is_inside[image, n].tolist() == is_inside
            for m, cosine in zip(ids, positives.similarity[image, n][is_real].tolist(), strict=True):
                assert cosine == pytest.approx(float(unit[image, n] @ unit[image, m]), abs=1e-6)


def test_aggregation__invalid_tokens_and_their_order_do_not_count():
    torch.manual_seed(0)
    aggregation = Aggregation(16, 2, 2).double()
    nn.init.normal_(aggregation.cls_token)
    tokens = torch.randn(3, 5, 16, dtype=torch.float64)
    is_valid = torch.tensor([[True, True, True, False, False]] * 3)
    torch.testing.assert_close(aggregation(tokens, is_valid), aggregation(tokens[:, [2, 0, 1]]))
    assert not torch.allclose(aggregation(tokens), aggregation(tokens, is_valid))


def test_clip__corners_learn_from_three_neighbours():
    objective = small(borders="clip").eval()
    x = objective.backbone.preprocess(images()["global_1"])
    with torch.no_grad():
        taught = objective._teach(x)
        near = taught.patches[:, [1, 8, 9]]  # around patch 0 of 8 x 8
        expected = objective.teacher.patch_head(objective.teacher.aggregation(near))
    torch.testing.assert_close(taught.patch_logits[:, 0], expected, rtol=1e-4, atol=1e-5)
    metrics = objective(images(), LATE).metrics
    assert metrics["wrapped_positives"] == 0
    assert -1 <= metrics["positive_similarity"] <= 1


# State


def test_forward__changes_no_state_and_a_step_not_taken_leaves_no_trace():
    objective, other = small(), small()
    before = {name: value.clone() for name, value in {**objective.state_dict(), **objective.extra_state()}.items()}
    random = torch.get_rng_state()
    objective(images(seed=5), Progress(0, 10))  # its loss was not finite, say
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in {**objective.state_dict(), **objective.extra_state()}.items():
        assert torch.equal(value, before[name]), name
    for one in (objective, other):
        one(images(), Progress(1, 10))
        one.after_step(Progress(1, 10), read)
    for name, value in objective.extra_state().items():
        assert torch.equal(value, other.extra_state()[name]), name


def test_micro_batches__give_the_loss_gradient_and_centers_of_the_whole_batch():
    whole, parts = small().double(), small().double()
    for objective in (whole, parts):
        objective.teacher.modules.double()
    batch = as_float64(images())
    halves = [{n: x[:, h] if n == "local" else x[h] for n, x in batch.items()} for h in (slice(0, 2), slice(2, 4))]
    loss = whole(batch, LATE).loss
    loss.backward()
    losses = [parts(half, LATE).loss / 2 for half in halves]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(loss.item(), rel=1e-12)
    for (name, a), b in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12, msg=name)
    for objective in (whole, parts):
        objective.after_step(LATE, read)
    torch.testing.assert_close(whole.center.value, parts.center.value, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(whole.patch_center.value, parts.patch_center.value, rtol=1e-12, atol=1e-15)


def test_gradient__reaches_everything_but_frozen_prototypes():
    objective = small(freeze_prototypes=0.5)
    objective(images(), Progress(4, 10)).loss.backward()
    without = {name for name, p in objective.named_parameters() if p.grad is None}
    assert without == {"head.prototypes", "patch_head.prototypes"}
    objective(images(), Progress(5, 10)).loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in objective.parameters())
    assert not any(p.requires_grad for p in objective.teacher.modules.parameters())


def test_state__comes_back_bit_by_bit_and_the_next_step_is_the_same():
    objective, other = small(seed=0), small(seed=1)
    objective(images(), Progress(0, 10))
    objective.after_step(Progress(0, 10), read)
    assert {"buffer.center.value", "buffer.patch_center.value", "teacher.aggregation.cls_token"} <= set(
        objective.extra_state()
    )
    other.load_state_dict(objective.state_dict())
    other.load_extra_state(objective.extra_state())
    for one in (objective, other):
        one(images(seed=3), Progress(1, 10))
        one.after_step(Progress(1, 10), read)
    assert torch.equal(objective(images(seed=4), LATE).loss, other(images(seed=4), LATE).loss)


# Export, other encoders, precision


def test_exported__is_the_teachers_encoder_and_travels_with_its_resampling(tmp_path):
    objective = small()
    with torch.no_grad():
        for parameter in objective.teacher.backbone.parameters():
            parameter.mul_(1.5)
    assert objective.exported is objective.teacher.backbone
    path = tmp_path / "backbone.safetensors"
    save_backbone(path, objective.exported.timm_state_dict(), objective.exported.spec)
    loaded = load_backbone(path)
    assert loaded.position_resampling == "dino"
    x = objective.backbone.preprocess(images()["local"][0])
    features = loaded.features(x)
    assert features.cls is None and features.patches.shape == (4, 16, 64)
    torch.testing.assert_close(features.patches, objective.teacher.backbone.features(x).patches)


def test_forward__takes_an_encoder_with_class_token_registers_and_norm():
    objective = small(options={"embed_dim": 64, "depth": 2, "num_heads": 4, "reg_tokens": 2})
    loss = objective(images(), LATE).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None for p in objective.parameters())


def test_forward__needs_no_local_crops():
    objective = small(num_local=0)
    batch = images()
    del batch["local"]
    assert [view["name"] for view in objective.views()] == ["global_1", "global_2"]
    assert objective(batch, LATE).loss.isfinite()


def test_bf16__loss_stays_in_float32_and_near():
    objective, batch = small(), images()
    expected = objective(batch, LATE).loss.item()
    for parameter in objective.parameters():
        parameter.data = parameter.data.bfloat16()
    output = objective(batch, LATE)
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == pytest.approx(expected, rel=0.02)
    assert all(p.grad.isfinite().all() for p in objective.parameters())
    assert all(p.dtype == torch.float32 for p in objective.teacher.modules.parameters())
    objective.after_step(LATE, lambda parameters: [p.detach().float() for p in parameters])
    assert objective.center.value.dtype == torch.float32


# Health


def test_metrics__say_what_they_say():
    objective = small()
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    for head, size in (("cls", 256), ("patch", 128)):
        assert 0 <= metrics[f"{head}_teacher_entropy"] <= math.log(size)
        assert metrics[f"{head}_kl"] >= 0
        total = metrics[f"{head}_teacher_entropy"] + metrics[f"{head}_kl"]
        assert total == pytest.approx(metrics[f"{head}_loss"], rel=1e-5)
        assert 0 < metrics[f"{head}_prototypes"] <= 1
    assert metrics["loss"] == pytest.approx(metrics["cls_loss"] + 0.1 * metrics["patch_loss"], rel=1e-5)
    assert metrics["patch_cosine"] <= metrics["positive_similarity"] <= 1
    assert 0 < metrics["wrapped_positives"] < 1
    assert 1 <= metrics["effective_rank"] <= 8
    assert objective.diagnose(metrics, LATE) is None


@pytest.mark.parametrize("head", ["head", "patch_head"])
def test_diagnose__names_uniform_outputs(head):
    """Both networks answer 0 to everything."""
    objective = small()
    for module in (getattr(objective, head), getattr(objective.teacher, head)):
        with torch.no_grad():
            module.mlp[-1].weight.zero_()
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    finding = objective.diagnose(metrics, LATE)
    assert finding is not None and "uniform" in finding and "ln" in finding and "\n" not in finding
    assert finding.startswith("patch" if head == "patch_head" else "cls")
    assert objective.diagnose(metrics, Progress(10, 1000)) is None


def test_diagnose__names_outputs_on_one_prototype():
    objective = small(teacher_temp=0.01, teacher_temp_start=0.01)
    teacher = objective.teacher.patch_head
    with torch.no_grad():
        teacher.mlp[-1].weight.mul_(1e-6)
        teacher.mlp[-1].bias.copy_(teacher.prototypes[7])  # every patch is the seventh prototype
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    finding = objective.diagnose(metrics, LATE)
    assert finding is not None and finding.startswith("patch outputs have fallen on a few prototypes")


def test_diagnose__names_patches_that_are_all_alike():
    objective = small()
    encode = objective.teacher.backbone.features
    objective.teacher.backbone.features = lambda x: replace(  # type: ignore[method-assign]
        encode(x), tokens=encode(x).patches.mean(1, keepdim=True).expand(-1, (x.shape[-1] // 4) ** 2, -1)
    )
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    assert metrics["patch_cosine"] == pytest.approx(1, abs=1e-4)
    finding = objective.diagnose(metrics, LATE)
    assert finding is not None and "patches of an image are all alike" in finding


def test_diagnose__names_one_feature_for_all_images():
    objective = small()
    with torch.no_grad():
        objective.teacher.backbone.vit.patch_embed.proj.weight.zero_()
    metrics = {name: value.item() for name, value in objective(images(), LATE).metrics.items()}
    finding = objective.diagnose(metrics, LATE)
    assert finding is not None and "all images have the same feature" in finding


def test_pictures__have_one_size_and_leave_training_as_it_was():
    objective = small(options=VIT | {"drop_path_rate": 0.5}).train()
    state = torch.get_rng_state()
    pictures = objective.pictures(images(num=10))
    assert torch.equal(torch.get_rng_state(), state)
    assert set(pictures) == {"global 1", "global 2", "local", "features", "similarity"}
    for picture in pictures.values():
        assert picture.shape == (8, 3, 32, 32)
        assert picture.min() >= 0 and picture.max() <= 1
    torch.testing.assert_close(pictures["global 2"], images(num=10)["global_2"][:8] / 255)
    assert pictures["features"].std() > 0.1
    assert objective.training


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        ({"local_size": 8}, ObjectiveError, "crop of 8 pixels has fewer than 3 x 3 patches"),
        ({"local_size": 18}, ObjectiveError, "local_size 18 is not a multiple"),
        ({"aggregation_heads": 3}, ObjectiveError, "objective.aggregation_heads 3 does not divide"),
    ],
)
def test_selfpatch__rejections_are_one_clear_line(config, error, message):
    with pytest.raises(error, match=message) as caught:
        small(**config)
    assert "\n" not in str(caught.value)
